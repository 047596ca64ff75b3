// DKM over rows of d numbers, in either metric, and hard assignment: the attention of a row to all centroids is made
// anew wherever it is needed. A thread takes a row; centroids come through shared memory in tiles. D is d rounded up
// (the rest is zeros), or 0 for any d, where numbers are read from memory each time.
#pragma once
#include "../dkm.h"
#include "dkm_common.cuh"

namespace r2::cuda {

constexpr int kTile = 256;  // centroids

__device__ __forceinline__ float root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float reciprocal_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal_of(double x) { return 1 / x; }

// Numbers of the list's dtype.
template <class A>
struct Memory {
  char* base;
  Dtype dtype;

  __device__ Memory(int64_t address, Dtype dtype) : base(reinterpret_cast<char*>(address)), dtype(dtype) {}
  __device__ A get(int64_t i) const {
    switch (dtype) {
      case Dtype::f64: return A(reinterpret_cast<const double*>(base)[i]);
      case Dtype::f32: return A(reinterpret_cast<const float*>(base)[i]);
      case Dtype::bf16: return A(widen(reinterpret_cast<const bf16*>(base)[i]));
      default: return A(widen(reinterpret_cast<const f16*>(base)[i]));
    }
  }
  __device__ void put(int64_t i, A x) const {
    switch (dtype) {
      case Dtype::f64: reinterpret_cast<double*>(base)[i] = double(x); break;
      case Dtype::f32: reinterpret_cast<float*>(base)[i] = float(x); break;
      case Dtype::bf16: narrow(float(x), reinterpret_cast<bf16*>(base)[i]); break;
      case Dtype::f16: narrow(float(x), reinterpret_cast<f16*>(base)[i]); break;
    }
  }
};

// Where a row lies: its numbers are `run` apart.
struct RowPlace {
  int64_t at, run;
};

// Where the rows of a part lie, with one 64-bit division for all of them.
struct RowPlaces {
  int64_t base, within, run, wrap;

  __device__ RowPlaces(const Tensor& t, int64_t row, int d)
      : base(row / t.run * d * t.run), within(row % t.run), run(t.run), wrap((d - 1) * t.run) {}
  __device__ RowPlace of(int row) const {
    const int64_t i = within + row;
    const int64_t turns = run <= INT32_MAX ? int64_t(unsigned(i) / unsigned(run)) : i >= run;
    return {base + i + turns * wrap, run};
  }
};

template <int D, class A>
struct Point {
  A v[D];

  __device__ void load(const Memory<A>& memory, RowPlace where, int d, A unit = 1) {
#pragma unroll
    for (int c = 0; c < D; ++c) v[c] = c < d ? memory.get(where.at + c * where.run) * unit : A(0);
  }
};
template <class A>
struct Point<0, A> {
  Memory<A> memory = {0, Dtype::f32};
  RowPlace where = {0, 1};
  A unit = 1;

  __device__ void load(const Memory<A>& from, RowPlace at, int, A by = 1) { memory = from, where = at, unit = by; }
};

// The c-th number of a point or of a centroid.
template <int D, class A>
__device__ __forceinline__ A number(const Point<D, A>& p, int c) {
  if constexpr (D > 0)
    return p.v[c];
  else
    return p.memory.get(p.where.at + c * p.where.run) * p.unit;
}

// One iteration of one tensor.
template <class A>
struct Iterated {
  const A *old, *fresh, *upstream, *moments;
  int K, d, stride;  // stride: numbers of moments for each centroid
  bool squared;
  A unit;       // of tau and of all lengths that are taken from here and from rows: it multiplies them
  A tau, rate;  // NaN where tau is not positive; log2(e) / tau

  __device__ Iterated(const List& list, const Clusters& clusters, const Pass& pass, int64_t tensor, int step = 0)
      : K(clusters.size[tensor]), d(list.d), stride(clusters.metric == Metric::euclidean && list.d == 1 ? 3 : 1),
        squared(clusters.metric == Metric::sqeuclidean) {
    const int64_t at = (step * list.count + tensor) * clusters.most;
    old = static_cast<const A*>(pass.old) + at * d;
    fresh = pass.fresh ? static_cast<const A*>(pass.fresh) + at * d : nullptr;
    upstream = pass.upstream ? static_cast<const A*>(pass.upstream) + at * d : nullptr;
    moments = pass.moments ? static_cast<const A*>(pass.moments) + at * stride : nullptr;
    const A given = clusters.tau ? static_cast<const A*>(clusters.tau)[tensor] : A(1);
    unit = unit_of(given, squared);
    tau = given > A(0) ? given * unit * (squared ? unit : A(1)) : A(NAN), rate = A(kLog2e / double(tau));
  }
  __device__ A old_at(int64_t i) const { return old[i] * unit; }
  __device__ A fresh_at(int64_t i) const { return fresh[i] * unit; }
  __device__ A v(int j, int c) const {
    const A S = moments[j * stride];
    return S == A(0) ? A(0) : upstream[int64_t(j) * d + c] / S;
  }
  __device__ A distance(A square) const { return squared ? square : root(square); }
  // slope of the distance is this times the difference
  __device__ A slope(A square) const { return squared ? A(2) : square == A(0) ? A(0) : reciprocal_of(root(square)); }
};

// A tile of centroids, of each kArrays of c, c', v.
template <int D, class A, int kArrays>
struct Tile {
  static constexpr int kWidth = D * kArrays;
  alignas(16) A numbers[D > 0 ? kTile * kWidth : 1];
};

template <int D, class A, int kArrays>
struct Centroids {
  const Iterated<A>& it;
  Tile<D, A, kArrays>& tile;
  int loaded = -1;

  // Calls run(j, c, c', v) for all centroids in order, in all threads of the block; the last three give the i-th
  // number.
  template <class Run>
  __device__ __forceinline__ void sweep(Run run) {
    if constexpr (D == 0) {
      for (int j = 0; j < it.K; ++j) at(j, run);
    } else {
      constexpr int width = Tile<D, A, kArrays>::kWidth;
      for (int from = 0; from < it.K; from += kTile) {
        const int n = min(kTile, it.K - from);
        load(from, n);
#pragma unroll(D <= 2 ? 4 : 2)
        for (int j = 0; j < n; ++j) {
          const A* at = tile.numbers + j * width;
          run(
              from + j, [at](int i) { return at[i]; }, [at](int i) { return at[D + i]; },
              [at](int i) { return at[2 * D + i]; });
        }
      }
    }
  }
  // The same for one centroid.
  template <class Run>
  __device__ __forceinline__ void at(int j, Run run) const {
    const int64_t at = int64_t(j) * it.d;
    auto is_real = [&](int i) { return D == 0 || i < it.d; };
    run(
        j, [&](int i) { return is_real(i) ? it.old_at(at + i) : A(0); },
        [&](int i) { return is_real(i) ? it.fresh_at(at + i) : A(0); },
        [&](int i) { return is_real(i) ? it.v(j, i) : A(0); });
  }
  __device__ void load(int from, int n) {
    if (loaded == from) return;
    constexpr int width = Tile<D, A, kArrays>::kWidth, each = D > 0 ? D : 1;
    __syncthreads();
    for (int i = threadIdx.x; i < n * width; i += blockDim.x) {
      const int j = from + i / width, c = i % width % each, which = i % width / each;
      const int64_t at = int64_t(j) * it.d + c;
      A x = 0;
      if (c < it.d) x = which == 0 ? it.old_at(at) : which == 1 ? it.fresh_at(at) : it.v(j, c);
      tile.numbers[i] = x;
    }
    __syncthreads();
    loaded = from;
  }
};

template <int D, class A, class Number>
__device__ __forceinline__ A square_distance(const Point<D, A>& p, Number c, int d) {
  A sum = 0;
  if constexpr (D > 0) {
#pragma unroll
    for (int i = 0; i < D; ++i) {
      const A difference = p.v[i] - c(i);
      sum = fma(difference, difference, sum);
    }
  } else {
    for (int i = 0; i < d; ++i) {
      const A difference = number(p, i) - c(i);
      sum = fma(difference, difference, sum);
    }
  }
  return sum;
}

// What a weight's attention to a centroid pulls at, up to a number for the row: (w - c'_j) (v_j - g)
template <bool kLast, int D, class A, class Fresh, class V>
__device__ __forceinline__ A pull(const Point<D, A>& w, const Point<D, A>& g, Fresh fresh, V v, int d) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < (D > 0 ? D : d); ++i)
    sum = fma(number(w, i) - fresh(i), v(i) - (kLast ? number(g, i) : A(0)), sum);
  return sum;
}

// The nearest centroid of a row, and its distance.
template <class A>
struct Nearest {
  A distance = INFINITY;
  int index = 0;

  template <int D, int kArrays>
  __device__ void find(Centroids<D, A, kArrays>& centroids, const Point<D, A>& w) {
    A least = INFINITY;
    centroids.sweep([&](int j, auto c, auto, auto) {
      const A square = square_distance(w, c, centroids.it.d);
      if (square < least) least = square, index = j;
    });
    distance = centroids.it.distance(least);
  }
  // e^(-distance / tau) relative to the nearest one's; may be subnormal, as attention may
  __device__ A attention(const Iterated<A>& it, A square) const {
    constexpr A up = sizeof(A) == 4 ? 24 : 53, down = sizeof(A) == 4 ? A(0x1p-24) : A(0x1p-53);
    return exp2_(fma(distance - it.distance(square), it.rate, up)) * down;
  }
};

constexpr int kBlock = 8;  // numbers of a row that a thread sums at a time where D is 0
template <int D>
constexpr int kWide = D > 0 ? D : kBlock;

template <int D, class A>
constexpr int kResident = sizeof(A) == 8 || D == 0 ? 2
                          : D == 8                 ? 4
                          : D == 4                 ? 6
                                                   : 8;  // blocks to a multiprocessor, at least

}  // namespace r2::cuda
