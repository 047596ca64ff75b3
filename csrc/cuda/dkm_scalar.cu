// DKM over scalars in the Euclidean metric, on a GPU: a constant time for each weight.
#include "dkm_bins.cuh"
#include "dkm_merges.cuh"
#include "dkm_passes.cuh"

namespace r2::cuda {

// A pass that writes a number for each weight: make(w[n], g[n], out[n]) for all n rows, in every thread equally often.
template <bool kGrads, class T, class Make>
__device__ void map_chunk(const T* w, const T* g, T* out, int n, Make make) {
  constexpr int packs = kPacks<T>, pack = kPack<T>;
  const int threads = blockDim.x, size = threads * kBatch<T>, boundary = before_boundary(w);
  const bool aligned = before_boundary(out) == boundary && (!kGrads || before_boundary(g) == boundary);
  const int head = aligned ? min(boundary, n) : 0, tiles = aligned ? (n - head) / size : 0;
  const uint4 *from_w = reinterpret_cast<const uint4*>(w + head) + threadIdx.x,
              *from_g = reinterpret_cast<const uint4*>(g + (kGrads ? head : 0)) + threadIdx.x;
  uint4* to = reinterpret_cast<uint4*>(out + head) + threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    Batch<T> batch_w, batch_g;
    batch_w.load(from_w);
    if (kGrads) batch_g.load(from_g);
    Acc<T> x[kBatch<T>], y[kBatch<T>] = {}, z[kBatch<T>];
    batch_w.numbers(x);
    if (kGrads) batch_g.numbers(y);
    make(x, y, z);
#pragma unroll
    for (int u = 0; u < packs; ++u) {
      Pack<T> made;
#pragma unroll
      for (int j = 0; j < pack; ++j) narrow(z[u * pack + j], made.number[j]);
      to[u * threads] = made.bits;
    }
    from_w += packs * threads, from_g += packs * threads, to += packs * threads;
  }
  const int done = tiles * size, rest = n - done;
#pragma unroll 1
  for (int from = 0; from < rest; from += threads) {
    const int i = from + threadIdx.x, at = i < head ? i : i + done;
    const bool valid = i < rest;
    Acc<T> x[1] = {valid ? widen(w[at]) : Acc<T>(0)}, y[1] = {kGrads && valid ? widen(g[at]) : Acc<T>(0)}, z[1];
    make(x, y, z);
    if (valid) narrow(z[0], out[at]);
  }
}

// W_hat of an interval: a number, and what the right share adds to it.
struct OutputMap {
  static constexpr int kGroups = 2, kNumbers = 4;
  template <class A, class Put>
  static __device__ void fill(const Iteration<A>& it, const Groups<2>&, const Row<2>& row, int k, Put put) {
    put(kBend + 1, double(it.old[k ? k - 1 : 0]) + row.left[0]), put(kBend + 2, row.right[0] - row.left[0]);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 8) dkm_output_kernel(List list, Clusters clusters, Pass pass) {
  using A = Acc<T>;
  const RowChunk part(list, clusters);
  const Iteration<A> it(clusters, pass, list.count, part.tensor);
  const int K = it.size;
  Space space = {shared_memory()};
  const Tables<OutputMap, A> tables(space, clusters.most);
  tables.fill(it, space.take<char>(0));
  const Finder<A> finder = tables.constants->finder;
  const A slope = tables.constants->slope;

  const T* w = place<const T>(list, list.pointers, part.tensor);
  T* out = place<T>(list, pass.target, part.tensor);
  map_chunk<false, T>(w + part.row, nullptr, out + part.row, part.rows, [&](const auto& x, const auto&, auto& y) {
    constexpr int n = sizeof(x) / sizeof(x[0]);
    int at[n];
    finder.find(tables.next, tables.grid, K, x, at);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A* row = tables.row(at[i]);
      y[i] = fma(right_share(fma(x[i] - row[kReference], slope, -row[kBend])), row[kBend + 2], row[kBend + 1]);
    }
  });
}

// dL/dW of a step: mean of v, and 2 / tau left right (what P is more in the right group). Where w equals the reference,
// the centroids that w equals have no slope; there everything but g is a constant.
struct GradientMap {
  static constexpr int kGroups = 4, kNumbers = 8;
  enum : int { kMean = kBend + 1, kSpanV, kSpanE, kSpanO, kEqual, kEqualG };

  template <class A, class Put>
  static __device__ void fill(const Iteration<A>& it, const Groups<4>& groups, const Row<4>& row, int k, Put put) {
    put(kMean, row.left[1]), put(kSpanV, row.right[1] - row.left[1]), put(kSpanE, row.right[2] - row.left[2]),
        put(kSpanO, row.right[0] - row.left[0]);
    if (k == 0) return;
    int first = k - 1;
    while (first > 0 && it.old[first - 1] == it.old[k - 1]) --first;
    double less[4] = {};  // the left group without the centroids that equal the reference
    if (first > 0) {
      const double *s = groups.left + (first - 1) * 4, fall = groups.fall[first - 1] * row.left_n,
                   by = -groups.gap[first - 1];
      for (int m = 0; m < 4; m += 2) less[m] = fall * s[m], less[m + 1] = fall * (s[m + 1] + by * s[m]);
    }
    // P is -e + g o; of a group, or of attention
    const double left = row.left_of_equal(), right = row.right_of_equal(),
                 e = left * row.left[2] + right * row.right[2], o = left * row.left[0] + right * row.right[0];
    const double n = left * less[0] - right, unit = inverse(it.tau);
    put(kEqual, left * row.left[1] + right * row.right[1] + unit * (left * less[3] - right * row.right[2] - n * e));
    put(kEqualG, -unit * (left * less[1] - right * row.right[0] - n * o));
  }
};

template <bool kLast, class A, int n>
__device__ __forceinline__ void add_step(const Tables<GradientMap, A>& tables, int K, const A (&w)[n], const A (&g)[n],
                                         A (&total)[n]) {
  const Finder<A> finder = tables.constants->finder;
  const A slope = tables.constants->slope, pull = tables.constants->pull;
  int at[n];
  A more[n];
  bool any = false;
  finder.find(tables.next, tables.grid, K, w, at);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const A *row = tables.row(at[i]), x = w[i] - row[kReference], span = row[GradientMap::kSpanV];
    const Shares<A> s(fma(x, slope, -row[kBend]));
    A P = fma(x, span, -row[GradientMap::kSpanE]);
    if (kLast) P = fma(g[i], row[GradientMap::kSpanO], P);
    more[i] = fma(s.right, span, fma(s.left * s.right, pull * P, row[GradientMap::kMean]));
    any |= x == A(0);
  }
  if (any) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A* row = tables.row(at[i]);
      if (w[i] == row[kReference])
        more[i] = row[GradientMap::kEqual] + (kLast ? g[i] * row[GradientMap::kEqualG] : A(0));
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) total[i] += more[i];
}

// kTogether: the tables of all steps lie in shared memory; else those of one, made anew for each batch of weights.
template <bool kTogether, class T>
__global__ void __launch_bounds__(kThreads, kTogether ? 4 : 2)
    dkm_gradient_kernel(List list, Clusters clusters, Pass pass) {
  using A = Acc<T>;
  const RowChunk part(list, clusters);
  const int K = part.clusters;
  Space space = {shared_memory()};
  const Tables<GradientMap, A> first(space, clusters.most);
  const size_t each_step = space.used;
  char* work = shared_memory() + each_step * (kTogether ? pass.steps : 1);
  auto tables_of = [&](int step) {
    Space own = {shared_memory() + (kTogether ? step * each_step : 0)};
    return Tables<GradientMap, A>(own, clusters.most);
  };
  auto fill = [&](int step) {
    tables_of(step).fill(Iteration<A>(clusters, pass, list.count, part.tensor, step), work);
  };
  if constexpr (kTogether) {
#pragma unroll 1
    for (int step = 0; step < pass.steps; ++step) fill(step);
  }

  const T *w = place<const T>(list, list.pointers, part.tensor), *g = place<const T>(list, pass.grads, part.tensor);
  T* out = place<T>(list, pass.target, part.tensor);
  map_chunk<true, T>(w + part.row, g + part.row, out + part.row, part.rows,
                     [&](const auto& x, const auto& y, auto& total) {
                       constexpr int n = sizeof(x) / sizeof(x[0]);
#pragma unroll
                       for (int i = 0; i < n; ++i) total[i] = 0;
#pragma unroll 1
                       for (int step = 0; step < pass.steps; ++step) {
                         if constexpr (!kTogether) __syncthreads(), fill(step);
                         step == 0 ? add_step<true>(tables_of(step), K, x, y, total)
                                   : add_step<false>(tables_of(step), K, x, y, total);
                       }
                     });
}

namespace {

constexpr int kMostBytes = 34 * 1024;   // of a warp's bins
constexpr int kBlockBytes = 74 * 1024;  // of a block, so that several are resident

int shared_limit(const Queue& queue) { return attribute(queue, cudaDevAttrMaxSharedMemoryPerBlockOptin) - 4 * 1024; }

// As many copies of the bins as fit, and warps; at the least 8 copies and one warp, and then fewer bins.
template <class Op, class A>
Shape choose(int most, int limit, int* warps) {
  Shape shape = {most + 1, 5, 0};
  const int record = sizeof(Numbers<A, Op::kRecord>);
  auto bytes = [&] { return (shape.bins << shape.copies) * record; };
  while (shape.copies > 3 && bytes() > kMostBytes) --shape.copies;
  while (shape.bins > 32 && bytes() > kMostBytes) shape.bins = (shape.bins + 1) / 2;
  if (shape.bins <= most) shape.copies = 3;
  const int fits = limit < kBlockBytes ? limit : kBlockBytes;
  *warps = 4;
  while (*warps > 1 && int(SumsRoom<Op, A>::bytes(most, shape, *warps)) > fits) *warps /= 2;
  const int copies = 1 << (5 - shape.copies), often = 128 > 8 * shape.bins ? 128 : 8 * shape.bins;
  shape.flush = often / copies / (sizeof(A) == 8 ? 4 : 8);
  return shape;
}

template <class Op, class A>
size_t sums_bytes(int most, int limit) {
  int warps;
  const Shape shape = choose<Op, A>(most, limit, &warps);
  return SumsRoom<Op, A>::bytes(most, shape, warps);
}

// What a merge works in, where it may not find room in shared memory.
int64_t outside_numbers(int most) { return most > 512 ? int64_t(Merge<1>::bytes(most) / sizeof(double)) : 0; }

template <class Map, class A>
size_t tables_bytes(int most, int steps) {
  Space space = {}, work = {};
  const Tables<Map, A> tables(space, most);
  const Groups<Map::kGroups> groups(work, most);
  return space.used * steps + work.used;
}

// kOutside: where shared memory is too small to work out the tables, Pass.scratch has room for that
template <class Op, class MergeOp, bool kOutside = false>
void sum(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  const int most = clusters.most, limit = shared_limit(queue);
  const int64_t numbers = int64_t(most + 1) * Op::kSums + (kOutside ? outside_numbers(most) : 0);
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Room = SumsRoom<Op, Acc<T>>;
    int warps;
    const Shape shape = choose<Op, Acc<T>>(most, limit, &warps);
    const bool outside = kOutside && outside_numbers(most) > 0 && Room::bytes(most, shape, warps) > size_t(limit);
    launch(queue, dkm_sums_kernel<Op, T>, list.chunks, 32 * warps, Room::bytes(most, shape, warps, outside), list,
           clusters, pass, shape, numbers, outside);
  });
  auto kernel = list.dtype == Dtype::f64 ? dkm_merge_kernel<MergeOp, double> : dkm_merge_kernel<MergeOp, float>;
  const int slices = slices_of(int64_t(most + 1) * Op::kSums);
  const size_t bytes = Merge<MergeOp::kGroups>::bytes(most);
  const bool outside = kOutside && outside_numbers(most) > 0 && bytes > size_t(limit);
  launch(queue, kernel, list.count * slices, kMergeThreads, outside ? 0 : bytes, list, clusters, pass, numbers,
         int(Op::kSums), slices, outside);
}

template <class A>
bool fits(int most, size_t limit) {
  return sums_bytes<RecurSums<true>, A>(most, int(limit)) <= limit &&
         sums_bytes<UpdateSums, A>(most, int(limit)) <= limit && tables_bytes<GradientMap, A>(most, 1) <= limit &&
         Merge<4>::bytes(most) <= limit;
}

}  // namespace

bool ScalarPasses::serves(const Queue& queue, const List& list, const Clusters& clusters) {
  if (list.d != 1 || clusters.metric != Metric::euclidean) return false;
  const size_t limit = shared_limit(queue);
  return list.dtype == Dtype::f64 ? fits<double>(clusters.most, limit) : fits<float>(clusters.most, limit);
}

int64_t ScalarPasses::scratch(int most) {
  return Scratch::bytes(int64_t(most + 1) * JacobianSums::kSums + outside_numbers(most));
}

void ScalarPasses::update(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<UpdateSums, UpdateMerge>(queue, list, clusters, pass);
}
void ScalarPasses::upstream(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<UpstreamSums, UpstreamMerge>(queue, list, clusters, pass);
}
void ScalarPasses::recur(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  pass.grads ? sum<RecurSums<true>, RecurMerge<true>>(queue, list, clusters, pass)
             : sum<RecurSums<false>, RecurMerge<false>>(queue, list, clusters, pass);
}
void ScalarPasses::jacobian(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<JacobianSums, JacobianMerge, true>(queue, list, clusters, pass);
}

void ScalarPasses::output(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(queue, dkm_output_kernel<T>, list.chunks, kThreads, tables_bytes<OutputMap, Acc<T>>(clusters.most, 1), list,
           clusters, pass);
  });
}

void ScalarPasses::gradient(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  const size_t limit = shared_limit(queue);
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const size_t all = tables_bytes<GradientMap, Acc<T>>(clusters.most, pass.steps);
    if (all <= limit)
      return launch(queue, dkm_gradient_kernel<true, T>, list.chunks, kThreads, all, list, clusters, pass);
    launch(queue, dkm_gradient_kernel<false, T>, list.chunks, kThreads,
           tables_bytes<GradientMap, Acc<T>>(clusters.most, 1), list, clusters, pass);
  });
}

}  // namespace r2::cuda
