// DKM's passes for any metric over rows of d numbers, and the assignment.
#include "dkm_group.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kRows = 64;  // of a block, whose sums are kept in the accumulator's type before they go to float64

// The centroids of all tensors and iterations of a pass, as groups read them.
template <class A>
class AllCentroids {
 public:
  AllCentroids(const List& list, const Clusters& clusters, const Pass& pass, int threads)
      : stride_((clusters.most + kPad - 1) / kPad * kPad), each_((3 * list.d + 1) * stride_), count_(list.count),
        memory_(pass.steps * list.count * each_ * int64_t(sizeof(A))), centroids_(pass.steps * list.count * int64_t(sizeof(Centroids<A>))) {
    const int d = list.d;
    const int64_t total = pass.steps * list.count;
#pragma omp parallel for num_threads(threads) if (threads > 1 && total * each_ > 16384)
    for (int64_t i = 0; i < total; ++i) {
      const int64_t tensor = i % list.count;
      const int size = clusters.size[tensor];
      A* to = memory_.template as<A>() + i * each_;
      const A given = static_cast<const A*>(clusters.tau)[tensor], tau = given > A(0) ? given : A(NAN);
      const auto columns = [&](const void* numbers, A* at) {
        for (int m = 0; m < d; ++m)
          for (int64_t j = 0; j < stride_; ++j) at[m * stride_ + j] = numbers && j < size ? static_cast<const A*>(numbers)[(i * clusters.most + j) * d + m] : A(0);
      };
      A *old = to, *fresh = to + d * stride_, *v = fresh + d * stride_, *behind = v + d * stride_;
      columns(pass.old, old), columns(pass.fresh, fresh), columns(pass.upstream, v);
      for (int64_t j = 0; j < stride_; ++j) behind[j] = j < size ? A(0) : A(INFINITY);
      if (pass.upstream)
        for (int64_t j = 0; j < size; ++j) {
          const A S = static_cast<const A*>(pass.moments)[i * clusters.most + j];
          for (int m = 0; m < d; ++m) v[m * stride_ + j] = S == A(0) ? A(0) : v[m * stride_ + j] / S;
        }
      const int64_t end = (size + lanes<Vec<A>> - 1) / lanes<Vec<A>> * lanes<Vec<A>>;
      centroids_.template as<Centroids<A>>()[i] = {old, fresh, v, behind, end, stride_, A(1.4426950408889634074 / double(tau)), A(1 / double(tau)), clusters.metric == 1};
    }
  }
  const Centroids<A>& of(int64_t tensor, int step = 0) const { return centroids_.template as<Centroids<A>>()[step * count_ + tensor]; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_, each_, count_;
  Memory memory_, centroids_;
};

// What one thread works in.
template <class A>
struct Room {
  Memory memory;
  A *x, *g, *out, *count, *sums;
  Group<A> group;
  Room(int d, int64_t stride, int width) : memory((3 * kRows * d + kRows + (3 * kGroup + width) * stride) * int64_t(sizeof(A))) {
    A* at = memory.template as<A>();
    const auto take = [&](int64_t n) {
      A* mine = at;
      at += n;
      return mine;
    };
    x = take(kRows * d), g = take(kRows * d), out = take(kRows * d), count = take(kRows);
    group.distance = take(kGroup * stride), group.e = take(kGroup * stride), group.pull = take(kGroup * stride), sums = take(width * stride);
  }
};

// visit(column, row of the block, first element in memory, length) for n rows from `row` on, in runs of consecutive memory
template <class Visit>
R2_HD void each_run_of(const Tensor& tensor, int d, int64_t row, int n, Visit visit) {
  const int64_t run = tensor.run;
  for (int i = 0; i < n;) {
    const int64_t within = (row + i) % run, base = (row + i) / run * d * run + within, left = run - within;
    const int length = left < n - i ? int(left) : n - i;
    for (int m = 0; m < d; ++m) visit(m, i, base + m * run, length);
    i += length;
  }
}

// Rows of d numbers one after the other, 0 behind the last.
template <class A, class T>
void take_rows(const Tensor& tensor, const T* from, int d, int64_t row, int n, A* to) {
  if (tensor.run == 1) {
    int i = 0;
    const T* at = from + row * d;
    for (; i + lanes<Vec<A>> <= n * d; i += lanes<Vec<A>>) store(to + i, load<Vec<A>>(at + i));
    for (; i < n * d; ++i) to[i] = widen(at[i]);
  } else {
    each_run_of(tensor, d, row, n, [&](int m, int first, int64_t at, int length) {
      for (int i = 0; i < length; ++i) to[(first + i) * d + m] = widen(from[at + i]);
    });
  }
  for (int i = n * d; i < (n + kGroup - 1) / kGroup * kGroup * d; ++i) to[i] = 0;
}

template <class A, class T>
void put_rows(const Tensor& tensor, const A* from, int d, int64_t row, int n, T* to) {
  if (tensor.run == 1) return narrowed(from, n * d, to + row * d);
  each_run_of(tensor, d, row, n, [&](int m, int first, int64_t at, int length) {
    for (int i = 0; i < length; ++i) to[at + i] = narrow<T>(from[(first + i) * d + m]);
  });
}

// Calls f(d), where d is small and float32 with d as a constant; 0 is any.
template <class A, class F>
R2_HD void with_width(int d, F f) {
  if (sizeof(A) == 4 && d == 1) return f(std::integral_constant<int, 1>());
  if (sizeof(A) == 4 && d == 2) return f(std::integral_constant<int, 2>());
  if (sizeof(A) == 4 && d == 4) return f(std::integral_constant<int, 4>());
  if (sizeof(A) == 4 && d == 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, 0>());
}

// The group of row i of a block; `g` where the pass has gradients.
template <class A>
R2_HD Group<A>& group_at(Room<A>& room, const Centroids<A>& c, int d, int i, bool g) {
  Group<A>& p = room.group;
  p.x = room.x + i * d, p.g = g ? room.g + i * d : nullptr, p.count = room.count + i, p.first = 0, p.end = c.size;
  return p;
}

template <Kind kKind, int kD, class A>
void sum_block(Room<A>& room, const Centroids<A>& c, int d, int n, bool g) {
  for (int i = 0; i < n; i += kGroup) {
    Group<A>& p = group_at(room, c, d, i, g);
    attend<kD>(p, c, d);
    if (kKind == Kind::recur) find_pull<kD>(p, c, d);
    add_to_sums<kKind, kD>(p, c, d, room.sums);
  }
}

template <bool kGradient, int kD, class A>
void map_block(Room<A>& room, const Centroids<A>& c, int d, int n, bool g) {
  for (int i = 0; i < n; i += kGroup) {
    Group<A>& p = group_at(room, c, d, i, g);
    attend<kD>(p, c, d);
    if (kGradient) find_pull<kD>(p, c, d);
    add_means<kGradient, kD>(p, c, kGradient ? c.v : c.fresh, d, room.out + i * d);
  }
}

template <class T, Kind kKind>
void sum_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  constexpr bool alone = kKind == Kind::update;
  const int d = list.d, width = d + alone;
  threads = threads_for(list, threads);
  const AllCentroids<A> all(list, clusters, pass, threads);
  const int64_t stride = all.stride(), each = int64_t(clusters.most) * width;
  double* partial = static_cast<double*>(pass.scratch);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room<A> room(d, stride, width);
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < list.chunks; ++chunk) {
      const Rows c(list, chunk);
      const Tensor& tensor = list.tensors[c.tensor];
      const Centroids<A>& centroids = all.of(c.tensor);
      const int size = clusters.size[c.tensor];
      const T *w = address<const T>(list.pointers, c.tensor), *g = kKind == Kind::update ? nullptr : address<const T>(pass.grads, c.tensor);
      const float* counts = address<const float>(pass.counts, c.tensor);
      double* sums = partial + chunk * each;
      for (int64_t i = 0; i < each; ++i) sums[i] = 0;
      for (int64_t i = 0; i < width * stride; ++i) room.sums[i] = 0;
      for (int64_t row = c.row; row < c.row + c.n; row += kRows) {
        const int n = c.row + c.n - row < kRows ? int(c.row + c.n - row) : kRows;
        take_rows(tensor, w, d, row, n, room.x);
        if (g) take_rows(tensor, g, d, row, n, room.g);
        if (counts) {
          for (int i = 0; i < n; ++i) room.count[i] = A(counts[row + i]);
        } else {
          for (int i = 0; i < n; ++i) room.count[i] = 1;
        }
        for (int i = n; i < kRows; ++i) room.count[i] = 0;
        with_width<A>(d, [&](auto kD) { sum_block<kKind, kD>(room, centroids, d, n, g != nullptr); });
        for (int m = 0; m < width; ++m)
          for (int j = 0; j < size; ++j) sums[j * width + m] += double(Scale<A>::down) * double(room.sums[m * stride + j]), room.sums[m * stride + j] = 0;
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < list.count; ++t) {
      const int64_t first = list.tensors[t].first, parts = (list.tensors[t].rows + list.chunk - 1) / list.chunk, at = t * clusters.most;
      double* total = partial + first * each;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t j = 0; j < each; ++j) total[j] += partial[(first + part) * each + j];
      const A* old = static_cast<const A*>(pass.old) + at * d;
      A* out = static_cast<A*>(pass.out) + at * d;
      for (int64_t j = 0; j < clusters.most; ++j) {
        const double *sums = total + j * width, S = sums[0];
        const bool real = j < clusters.size[t], empty = alone && A(S) == 0;
        if (alone) static_cast<A*>(pass.out_moments)[at + j] = real ? A(S) : A(0);
        for (int m = 0; m < d; ++m)
          out[j * d + m] = !real ? A(0) : empty ? old[j * d + m] : alone ? A(double(old[j * d + m]) + sums[1 + m] / S) : A(sums[m]);
      }
    }
  }
}

template <class T, bool kGradient>
void map_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  const int d = list.d;
  threads = threads_for(list, threads);
  const AllCentroids<A> all(list, clusters, pass, threads);
  const int64_t* targets = static_cast<const int64_t*>(pass.target);
  for (int64_t t = 0; t < list.count; ++t) ask_for_huge_pages(reinterpret_cast<void*>(targets[t]), list.tensors[t].numel * sizeof(T));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room<A> room(d, all.stride(), 0);
    for (int i = 0; i < kRows; ++i) room.count[i] = 1;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < list.chunks; ++chunk) {
      const Rows c(list, chunk);
      const Tensor& tensor = list.tensors[c.tensor];
      const T *w = address<const T>(list.pointers, c.tensor), *g = address<const T>(pass.grads, c.tensor);
      T* out = address<T>(targets, c.tensor);
      for (int64_t row = c.row; row < c.row + c.n; row += kRows) {
        const int n = c.row + c.n - row < kRows ? int(c.row + c.n - row) : kRows;
        take_rows(tensor, w, d, row, n, room.x);
        if (g) take_rows(tensor, g, d, row, n, room.g);
        for (int i = 0; i < kRows * d; ++i) room.out[i] = 0;
        for (int step = 0; step < pass.steps; ++step) {
          const Centroids<A>& centroids = all.of(c.tensor, step);
          with_width<A>(d, [&](auto kD) { map_block<kGradient, kD>(room, centroids, d, n, g && step == 0); });
        }
        put_rows(tensor, room.out, d, row, n, out);
      }
      if (c.row == 0)
        for (int64_t j = tensor.rows * d; j < tensor.numel; ++j) out[j] = kGradient ? g[j] : w[j];
    }
  }
}

// The square of the distance, which for d = 1 is its size; a vector of rows side by side
template <class A>
R2_HD Vec<A> distance(const A* x, const A* c, int d) {
  using V = Vec<A>;
  if (d == 1) return abs_(load<V>(x) - c[0]);
  V D = {};
  for (int m = 0; m < d; ++m) {
    const V difference = load<V>(x + m * kRows) - c[m];
    D += difference * difference;
  }
  return D;
}

template <class T>
void assign_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int d = list.d;
  threads = threads_for(list, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Memory memory(2 * d * kRows * int64_t(sizeof(A)));
    A *rows = memory.template as<A>(), *x = rows + d * kRows;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < list.chunks; ++chunk) {
      const Rows c(list, chunk);
      const T* w = address<const T>(list.pointers, c.tensor);
      const A* centroids = static_cast<const A*>(pass.old) + c.tensor * clusters.most * d;
      const int K = clusters.size[c.tensor];
      void* codes = address<void>(static_cast<const int64_t*>(pass.target), c.tensor);
      for (int64_t row = c.row; row < c.row + c.n; row += kRows) {
        const int n = c.row + c.n - row < kRows ? int(c.row + c.n - row) : kRows;
        take_rows(list.tensors[c.tensor], w, d, row, n, rows);
        for (int m = 0; m < d; ++m)
          for (int i = 0; i < kRows; ++i) x[m * kRows + i] = i < n ? rows[i * d + m] : A(0);
        for (int i = 0; i < n; i += lanes<V>) {
          V best = splat<V>(A(INFINITY));
          Indices<A> code = {};
          for (int j = 0; j < K; ++j) {
            const V D = distance(x + i, centroids + int64_t(j) * d, d);
            const Indices<A> nearer = ~(D >= best) & (best == best);  // a NaN is nearest, as for torch.argmin
            best = nearer ? D : best, code = nearer ? Indices<A>{} + Index<A>(j) : code;
          }
          for (int l = 0; l < lanes<V> && i + l < n; ++l) {
            if (K <= 256) static_cast<uint8_t*>(codes)[row + i + l] = uint8_t(code[l]);
            else static_cast<int32_t*>(codes)[row + i + l] = int32_t(code[l]);
          }
        }
      }
    }
  }
}

template <class T>
void update_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) { sum_rows<T, Kind::update>(list, clusters, pass, threads); }
template <class T>
void upstream_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) { sum_rows<T, Kind::upstream>(list, clusters, pass, threads); }
template <class T>
void recur_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) { sum_rows<T, Kind::recur>(list, clusters, pass, threads); }
template <class T>
void output_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) { map_rows<T, false>(list, clusters, pass, threads); }
template <class T>
void gradient_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) { map_rows<T, true>(list, clusters, pass, threads); }

void RowPasses::update(const List& list, const Clusters& clusters, const Pass& pass, int threads) { R2_FOR_DTYPE(update_rows) }
void RowPasses::output(const List& list, const Clusters& clusters, const Pass& pass, int threads) { R2_FOR_DTYPE(output_rows) }
void RowPasses::upstream(const List& list, const Clusters& clusters, const Pass& pass, int threads) { R2_FOR_DTYPE(upstream_rows) }
void RowPasses::recur(const List& list, const Clusters& clusters, const Pass& pass, int threads) { R2_FOR_DTYPE(recur_rows) }
void RowPasses::gradient(const List& list, const Clusters& clusters, const Pass& pass, int threads) { R2_FOR_DTYPE(gradient_rows) }
void RowPasses::assign(const List& list, const Clusters& clusters, const Pass& pass, int threads) { R2_FOR_DTYPE(assign_rows) }
int64_t RowPasses::scratch(int most, int d) { return int64_t(most) * (d + 1) * int64_t(sizeof(double)); }

}  // namespace R2_ISA
}  // namespace r2
