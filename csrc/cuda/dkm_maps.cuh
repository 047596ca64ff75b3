// The passes of DKM over scalars that write a number for each weight: output and gradient.
#pragma once
#include "dkm_bins.cuh"

namespace r2::cuda {

// A pass that writes a number for each weight: make(w[n], g[n], out[n]) for all n rows, in every thread equally often.
template <bool kGrads, class T, class Make>
__device__ void map_chunk(const T* w, const T* g, T* out, int n, Make make) {
  constexpr int packs = kPacks<T>;
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
    write_packs<T>(z, to, threads);
    from_w += packs * threads, from_g += packs * threads, to += packs * threads;
  }
  const int done = tiles * size, rest = n - done;
#pragma unroll 1
  for (int from = 0; from < rest; from += threads) {
    const int i = from + threadIdx.x, at = i < head ? i : i + done;
    const bool valid = i < rest;
    Acc<T> x[1] = {valid ? widen(w[at]) : Acc<T>(0)}, y[1] = {kGrads && valid ? widen(g[at]) : Acc<T>(0)}, z[1];
    make(x, y, z);
    if (valid) write_one(z[0], out + at);
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
__global__ void __launch_bounds__(kThreads, 8) dkm_output_kernel(List list, Clusters clusters, Pass pass, Rooms rooms) {
  using A = Acc<T>;
  const RowChunk part(list, clusters);
  const int K = part.clusters;
  Space space = {shared_memory()};
  const Tables<OutputMap, A> tables(space, clusters.most);
  copy(tables.grid, rooms.of(part.tensor), rooms.tables);
  __syncthreads();
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
#pragma unroll
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

// kTogether: the tables of all steps lie in shared memory; else those of one, copied anew for each batch of weights.
template <bool kTogether, class T>
__global__ void __launch_bounds__(kThreads, kTogether ? 4 : 2)
    dkm_gradient_kernel(List list, Clusters clusters, Pass pass, Rooms rooms) {
  using A = Acc<T>;
  const RowChunk part(list, clusters);
  const int K = part.clusters;
  auto tables_of = [&](int step) {
    Space own = {shared_memory() + (kTogether ? step * rooms.tables : 0)};
    return Tables<GradientMap, A>(own, clusters.most);
  };
  auto fetch = [&](int step) {
    copy(tables_of(step).grid, rooms.of(step * list.count + part.tensor), rooms.tables);
    __syncthreads();
  };
  if constexpr (kTogether) {
#pragma unroll 1
    for (int step = 0; step < pass.steps; ++step) fetch(step);
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
                         if constexpr (!kTogether) __syncthreads(), fetch(step);
                         step == 0 ? add_step<true>(tables_of(step), K, x, y, total)
                                   : add_step<false>(tables_of(step), K, x, y, total);
                       }
                     });
}

}  // namespace r2::cuda
