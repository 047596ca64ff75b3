#include "dkm_rows.cuh"
#include "dkm_passes.cuh"

namespace r2::cuda {

constexpr int kBlock = 8;  // numbers of a row that a thread sums at a time where D is 0
template <int D>
constexpr int kWide = D > 0 ? D : kBlock;

template <int D, class A>
constexpr int kResident = sizeof(A) == 8 || D == 0 ? 2 : D == 8 ? 4 : 8;  // blocks to a multiprocessor, at least

// What the second half of a sum needs of a row: D numbers and as many gradients, then what the first half found.
template <int D, class A, bool kGrads>
struct RowRecord {
  static constexpr int kNumbers = D * (1 + kGrads) + 4, kStride = (kNumbers + 3) / 4 * 4;
};

// The passes that sum over rows. First a thread for each row finds the nearest centroid and the sum of its exponentials; then a thread for each centroid and
// group of rows makes the attention anew and sums it in a fixed order, in runs of at most a block's rows, and these in float64.
enum class RowSum { update, upstream, recur, recur_last };

template <RowSum kOp, int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>) dkm_row_sums_kernel(List list, Clusters clusters, Pass pass, int64_t numbers) {
  constexpr bool kLast = kOp == RowSum::recur_last, kAll = kOp == RowSum::recur || kLast, kGrads = kLast || kOp == RowSum::upstream, kUpdate = kOp == RowSum::update;
  constexpr int wide = kWide<D>, kSums = wide + (kUpdate ? 3 : 0), kArrays = kAll ? 3 : 1, stride = RowRecord<D, A, kGrads>::kStride;
  __shared__ Tile<D, A, kArrays> tile;
  alignas(16) __shared__ A rows[kThreads][stride];
  __shared__ A sums[kThreads][kSums];

  const Part part(list, clusters);
  const Iterated<A> it(list, clusters, pass, part.tensor);
  const int K = it.K, d = it.d, me = threadIdx.x;
  const bool is_signed = kUpdate && it.stride == 3;
  const int per_centroid = kUpdate ? (is_signed ? 4 : d + 1) : d;
  const Memory<A> w(list.pointers[part.tensor], list.dtype), g(kGrads ? pass.grads[part.tensor] : 0, list.dtype);
  const Places places(list.tensors[part.tensor], part.row, d);
  double* out = Scratch(list, pass, numbers).of(part);
  Centroids<D, A, kArrays> centroids = {it, tile};
  int each_group = 1;  // threads of a group
  while (each_group < K && each_group < kThreads) each_group *= 2;
  const int groups = kThreads / each_group, group = me / each_group;

  for (int first = 0; first < part.rows; first += kThreads) {
    const int n = min(kThreads, part.rows - first);
    Point<D, A> x, y;
    const Where where = places.of(first + min(me, n - 1));
    x.load(w, where, d);
    if (kGrads) y.load(g, where, d);
    Nearest<A> nearest;
    nearest.find(centroids, x);
    A Z = 0, base = 0, mean = 0;
    if constexpr (kAll) centroids.at(nearest.index, [&](int, auto, auto fresh, auto v) { base = pull<kLast>(x, y, fresh, v, d); });
    centroids.sweep([&](int, auto c, auto fresh, auto v) {
      const A e = nearest.attention(it, square_distance(x, c, d));
      Z += e;
      if constexpr (kAll) mean = fma(e, pull<kLast>(x, y, fresh, v, d) - base, mean);
    });
    __syncthreads();
    A* record = rows[me];
    if constexpr (D > 0) {
#pragma unroll
      for (int c = 0; c < D; ++c) {
        record[c] = x.v[c];
        if (kGrads) record[D + c] = y.v[c];
      }
    }
    A* found = record + D * (1 + kGrads);
    found[0] = nearest.distance, found[1] = 1 / Z, found[2] = base, found[3] = mean / Z;
    __syncthreads();

    for (int from = 0; from < K; from += each_group) {
      const int j = from + me % each_group;
      const int64_t at = int64_t(min(j, K - 1)) * d;
      A c[wide], fresh[wide], v[wide];
#pragma unroll
      for (int i = 0; i < wide; ++i) {
        const bool in = D > 0 && i < d;
        c[i] = in ? it.old[at + i] : A(0);
        if (kAll) fresh[i] = in ? it.fresh[at + i] : A(0), v[i] = in ? it.v(min(j, K - 1), i) : A(0);
      }
      for (int block = 0; block < d; block += wide) {
        A sum[kSums] = {};
        for (int r = group; j < K && r < n; r += groups) {
          const A* from_row = rows[r] + D * (1 + kGrads);
          const Nearest<A> of = {from_row[0], 0};
          Point<D, A> p, q;
          if constexpr (D > 0) {
#pragma unroll
            for (int i = 0; i < D; ++i) {
              p.v[i] = rows[r][i];
              if (kGrads) q.v[i] = rows[r][D + i];
            }
          } else {
            const Where that = places.of(first + r);
            p.load(w, that, d);
            if (kGrads) q.load(g, that, d);
          }
          auto old_of = [&](int i) { if constexpr (D > 0) return c[i]; else return it.old[at + i]; };
          const A square = square_distance(p, old_of, d);
          A a = of.attention(it, square) * from_row[1];
          if constexpr (kAll) {
            const A P = pull<kLast>(p, q, [&](int i) { if constexpr (D > 0) return fresh[i]; else return it.fresh[at + i]; },
                                    [&](int i) { if constexpr (D > 0) return v[i]; else return it.v(j, i); }, d);
            a *= (P - from_row[2] - from_row[3]) * it.slope(square);
          }
#pragma unroll
          for (int i = 0; i < wide; ++i) {
            const int at_i = D > 0 ? i : block + i;
            const A what = D == 0 && at_i >= d ? A(0) : kOp == RowSum::upstream ? number(q, at_i) : number(p, at_i) - old_of(at_i);
            sum[i] = fma(a, what, sum[i]);
          }
          if constexpr (kUpdate) {
            sum[wide] += a;
            if (is_signed) {
              const A difference = number(p, 0) - old_of(0), s = sign_(difference) * a;
              sum[wide + 1] += s, sum[wide + 2] = fma(s, difference, sum[wide + 2]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[me][i] = sum[i];
        __syncthreads();
        const int here = min(each_group, K - from), some = min(wide, d - block), more = kUpdate && block == 0 ? per_centroid - d : 0;
        for (int i = me; i < here * (some + more); i += kThreads) {
          const int centroid = i % here, which = i / here;
          double total = 0;
          for (int other = 0; other < groups; ++other) total += double(sums[other * each_group + centroid][which < some ? which : wide + which - some]);
          double& to = out[int64_t(from + centroid) * per_centroid + (which < some ? block + which : d + which - some)];
          to = first == 0 ? total : to + total;
        }
        __syncthreads();
      }
    }
  }
}

// From the totals of a tensor to numbers of its centroids.
template <RowSum kOp, class A>
__global__ void __launch_bounds__(kMergeThreads) dkm_row_merge_kernel(List list, Clusters clusters, Pass pass, int64_t numbers, int slices) {
  constexpr bool kUpdate = kOp == RowSum::update;
  const int64_t tensor = blockIdx.x / slices;
  const int slice = blockIdx.x % slices;
  const Iterated<A> it(list, clusters, pass, tensor);
  const int d = it.d, per_centroid = kUpdate ? (it.stride == 3 ? 4 : d + 1) : d;
  const int64_t used = int64_t(it.K) * per_centroid, most = clusters.most;
  const double* totals;
  if (slice >= slices_of(used) || !add_up(list, Scratch(list, pass, numbers), tensor, slice, used, &totals)) return;
  A* out = static_cast<A*>(pass.out) + tensor * most * d;
  each(int(most) * d, [&](int i) {
    const int j = i / d, c = i % d;
    const bool real = j < it.K;
    if constexpr (kUpdate) {
      const double S = real ? total(totals, j * per_centroid + d) : 0;
      const bool empty = A(S) == A(0);
      out[i] = !real ? A(0) : empty ? it.old[i] : A(double(it.old[i]) + total(totals, j * per_centroid + c) / S);
      if (c > 0) return;
      A* moments = static_cast<A*>(pass.out_moments) + (tensor * most + j) * it.stride;
      moments[0] = A(S);
      if (it.stride == 1) return;
      const double n = empty ? 0 : total(totals, j * 4 + 2), x = empty ? 0 : total(totals, j * 4 + 3);
      moments[1] = A(n), moments[2] = A(empty ? 0 : x - (double(out[i]) - double(it.old[i])) * n);
    } else {
      const double sum = real ? total(totals, i) : 0;
      out[i] = kOp == RowSum::upstream ? A(sum) : real ? A(sum / double(it.tau)) : A(0);
    }
  });
}

// The leftovers of a row's tensor: they lie at its end.
template <class A>
__device__ void put_leftovers(const Tensor& tensor, int d, const Memory<A>& from, const Memory<A>& out) {
  const int64_t begin = tensor.rows * d, end = (tensor.numel + kSegment - 1) / kSegment * kSegment;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) out.put(i, i < tensor.numel ? from.get(i) : A(0));
}

__device__ __forceinline__ int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

template <int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>) dkm_row_output_kernel(List list, Clusters clusters, Pass pass) {
  constexpr int wide = kWide<D>;
  __shared__ Tile<D, A, 2> tile;
  const Part part(list, clusters);
  const Iterated<A> it(list, clusters, pass, part.tensor);
  const Tensor& tensor = list.tensors[part.tensor];
  const Memory<A> w(list.pointers[part.tensor], list.dtype), out(reinterpret_cast<int64_t>(pass.target) + tensor.offset * size_of(list.dtype), list.dtype);
  const Places places(tensor, part.row, it.d);
  Centroids<D, A, 2> centroids = {it, tile};
  for (int first = 0; first < part.rows; first += kThreads) {
    const int n = min(kThreads, part.rows - first);
    const Where where = places.of(first + min(int(threadIdx.x), n - 1));
    Point<D, A> x;
    x.load(w, where, it.d);
    Nearest<A> nearest;
    nearest.find(centroids, x);
    for (int block = 0; block < it.d; block += wide) {
      A Z = 0, sum[wide] = {};
      centroids.sweep([&](int, auto c, auto fresh, auto) {
        const A e = nearest.attention(it, square_distance(x, c, it.d));
        Z += e;
#pragma unroll
        for (int i = 0; i < wide; ++i) {
          const int at = D > 0 ? i : block + i;
          sum[i] = fma(e, D > 0 || at < it.d ? fresh(at) : A(0), sum[i]);
        }
      });
#pragma unroll
      for (int i = 0; i < wide; ++i)
        if (int(threadIdx.x) < n && block + i < it.d) out.put(where.at + (block + i) * where.run, sum[i] / Z);
    }
  }
  if (part.row == 0) put_leftovers(tensor, it.d, w, out);
}

// A step's part of dL/dw: sum_j a_j v_j - sum_j a_j (P_j - mean P) slope_j / tau, with P and the slope relative to those of the nearest centroid, which nothing
// can then cancel where it has all the attention.
template <bool kLast, int D, class A>
__device__ void add_row_step(Centroids<D, A, 3>& centroids, const Point<D, A>& x, const Point<D, A>& g, int block, A (&into)[kWide<D>]) {
  constexpr int wide = kWide<D>;
  const Iterated<A>& it = centroids.it;
  const int d = it.d;
  auto difference = [&](auto c, int i) {
    const int at = D > 0 ? i : block + i;
    return D > 0 || at < d ? number(x, at) - c(at) : A(0);
  };
  Nearest<A> nearest;
  nearest.find(centroids, x);
  A base = 0, slope[wide] = {};
  centroids.at(nearest.index, [&](int, auto c, auto fresh, auto v) {
    base = pull<kLast>(x, g, fresh, v, d);
    const A s = it.slope(square_distance(x, c, d));
#pragma unroll
    for (int i = 0; i < wide; ++i) slope[i] = s * difference(c, i);
  });
  A Z = 0, mean = 0, sum_v[wide] = {}, sum_slope[wide] = {}, sum_both[wide] = {};
  centroids.sweep([&](int, auto c, auto fresh, auto v) {
    const A square = square_distance(x, c, d), e = nearest.attention(it, square), s = it.slope(square), P = pull<kLast>(x, g, fresh, v, d) - base;
    Z += e, mean = fma(e, P, mean);
#pragma unroll
    for (int i = 0; i < wide; ++i) {
      const A other = e * (fma(s, difference(c, i), -slope[i]));
      const int at = D > 0 ? i : block + i;
      sum_v[i] = fma(e, D > 0 || at < d ? v(at) : A(0), sum_v[i]);
      sum_slope[i] += other, sum_both[i] = fma(P, other, sum_both[i]);
    }
  });
  const A scale = 1 / Z, unit = 1 / it.tau;
#pragma unroll
  for (int i = 0; i < wide; ++i) into[i] += scale * (sum_v[i] - (sum_both[i] - mean * scale * sum_slope[i]) * unit);
}

template <int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>) dkm_row_gradient_kernel(List list, Clusters clusters, Pass pass) {
  constexpr int wide = kWide<D>;
  __shared__ Tile<D, A, 3> tile;
  const Part part(list, clusters);
  const Tensor& tensor = list.tensors[part.tensor];
  const Memory<A> w(list.pointers[part.tensor], list.dtype), gs(pass.grads[part.tensor], list.dtype);
  const Memory<A> out(reinterpret_cast<int64_t>(pass.target) + tensor.offset * size_of(list.dtype), list.dtype);
  const int d = list.d;
  const Places places(tensor, part.row, d);
  for (int first = 0; first < part.rows; first += kThreads) {
    const int n = min(kThreads, part.rows - first);
    const Where where = places.of(first + min(int(threadIdx.x), n - 1));
    Point<D, A> x, g;
    x.load(w, where, d), g.load(gs, where, d);
    for (int block = 0; block < d; block += wide) {
      A sum[wide] = {};
      for (int step = 0; step < pass.steps; ++step) {
        const Iterated<A> it(list, clusters, pass, part.tensor, step);
        Centroids<D, A, 3> centroids = {it, tile};
        step == 0 ? add_row_step<true>(centroids, x, g, block, sum) : add_row_step<false>(centroids, x, g, block, sum);
      }
#pragma unroll
      for (int i = 0; i < wide; ++i)
        if (int(threadIdx.x) < n && block + i < d) out.put(where.at + (block + i) * where.run, sum[i]);
    }
  }
  if (part.row == 0) put_leftovers(tensor, d, gs, out);
}

// The nearest centroid in the caller's order, without fused multiply-adds: ties are then those of the plain formula.
__device__ __forceinline__ float plain_add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float plain_square(float a) { return __fmul_rn(a, a); }
__device__ __forceinline__ double plain_add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double plain_square(double a) { return __dmul_rn(a, a); }

template <int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>) dkm_assign_kernel(List list, Clusters clusters, Pass pass) {
  constexpr int kRows = D == 1 ? 4 : D == 2 ? 2 : 1;
  __shared__ Tile<D, A, 1> tile;
  const Part part(list, clusters);
  const Iterated<A> it(list, clusters, pass, part.tensor);
  const int64_t target = static_cast<const int64_t*>(pass.target)[part.tensor];
  const Memory<A> w(list.pointers[part.tensor], list.dtype);
  const Places places(list.tensors[part.tensor], part.row, it.d);
  Centroids<D, A, 1> centroids = {it, tile};
  for (int first = 0; first < part.rows; first += kThreads * kRows) {
    Point<D, A> x[kRows];
    A least[kRows];
    int best[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = min(first + r * kThreads + int(threadIdx.x), part.rows - 1);
      x[r].load(w, places.of(row), it.d);
      least[r] = INFINITY, best[r] = 0;
    }
    centroids.sweep([&](int j, auto c, auto, auto) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        A sum;
        if constexpr (D == 1) {
          sum = abs_(x[r].v[0] - c(0));
        } else {
          sum = 0;
#pragma unroll
          for (int i = 0; i < (D > 0 ? D : it.d); ++i) sum = plain_add(sum, plain_square(number(x[r], i) - c(i)));
        }
        if (sum < least[r]) least[r] = sum, best[r] = j;
      }
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r * kThreads + threadIdx.x;
      if (row >= part.rows) continue;
      if (it.K <= 256) reinterpret_cast<uint8_t*>(target)[part.row + row] = uint8_t(best[r]);
      else reinterpret_cast<int32_t*>(target)[part.row + row] = best[r];
    }
  }
}

namespace {

// run(A, D) for a list: numbers of a row in registers in float32, d up to 8
template <class Run>
void with_width(const List& list, Run run) {
  const auto any = std::integral_constant<int, 0>{};
  if (list.dtype == Dtype::f64) return run(Tag<double>{}, any);
  if (list.d == 1) return run(Tag<float>{}, std::integral_constant<int, 1>{});
  if (list.d == 2) return run(Tag<float>{}, std::integral_constant<int, 2>{});
  if (list.d <= 4) return run(Tag<float>{}, std::integral_constant<int, 4>{});
  if (list.d <= 8) return run(Tag<float>{}, std::integral_constant<int, 8>{});
  run(Tag<float>{}, any);
}

int64_t numbers_of(int most, int d) { return int64_t(most) * (d == 1 ? 4 : d + 1); }

template <RowSum kOp>
void sum(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  const int64_t numbers = numbers_of(clusters.most, list.d);
  const int slices = slices_of(numbers);
  with_width(list, [&](auto type, auto width) {
    using A = typename decltype(type)::type;
    launch(queue, dkm_row_sums_kernel<kOp, width, A>, list.chunks, kThreads, 0, list, clusters, pass, numbers);
  });
  auto kernel = list.dtype == Dtype::f64 ? dkm_row_merge_kernel<kOp, double> : dkm_row_merge_kernel<kOp, float>;
  launch(queue, kernel, list.count * slices, kMergeThreads, 0, list, clusters, pass, numbers, slices);
}

}  // namespace

#define R2_MAP(pass, kernel)                                                                                           \
  void RowPasses::pass(const Queue& queue, const List& list, const Clusters& clusters, const Pass& p) {                \
    with_width(list, [&](auto type, auto width) {                                                                      \
      launch(queue, kernel<width, typename decltype(type)::type>, list.chunks, kThreads, 0, list, clusters, p);        \
    });                                                                                                                \
  }
R2_MAP(output, dkm_row_output_kernel)
R2_MAP(gradient, dkm_row_gradient_kernel)
R2_MAP(assign, dkm_assign_kernel)

int64_t RowPasses::scratch(int most, int d) { return Scratch::bytes(numbers_of(most, d)); }
void RowPasses::update(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) { sum<RowSum::update>(queue, list, clusters, pass); }
void RowPasses::upstream(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) { sum<RowSum::upstream>(queue, list, clusters, pass); }
void RowPasses::recur(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  pass.grads ? sum<RowSum::recur_last>(queue, list, clusters, pass) : sum<RowSum::recur>(queue, list, clusters, pass);
}

}  // namespace r2::cuda
