// Scalars in the Euclidean metric (csrc/dkm.h says what intervals, shares and bends are): what a block makes of the
// centroids of one iteration, in shared memory, and how its threads look up the interval of a weight there.
#pragma once
#include "../dkm.h"
#include "numbers.cuh"

namespace r2::cuda {

// Hands out shared memory in the same order on the host, which only counts, and on the device.
struct Space {
  char* base;
  size_t used = 0;

  template <class X>
  R2_HD X* take(size_t n) {
    X* at = reinterpret_cast<X*>(base + used);
    used += (n * sizeof(X) + 15) / 16 * 16;
    return at;
  }
};

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<char*>(dynamic_memory);
}

// Numbers that lie side by side and are loaded at once.
template <class A, int n>
struct alignas(n * sizeof(A) % 16 == 0  ? 16
               : n * sizeof(A) % 8 == 0 ? 8
                                        : sizeof(A)) Numbers {
  A v[n];
};

// 1 / x for normal numbers, without the subroutine that a division has; NaN for 0 and infinities.
__device__ __forceinline__ double inverse(double x) {
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = fma(fma(-x, y, 1.0), y, y);
  return fma(fma(-x, y, 1.0), y, y);
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) { return inverse(x); }

// Sums that fall by `fall` from centroid to centroid, to the right or to the left, by one warp: out[j * n + i] has
// own(j, s), which adds to s, of centroid j and of all before it. Of each pair of sums the second is a first moment,
// relative to the centroid it is seen from.
template <int n, class Own>
__device__ void spread(int K, const double* gap, const double* fall, bool leftward, Own own, double* out) {
  const int lane = threadIdx.x % 32, each = (K + 31) / 32, from = min(lane * each, K), to = min(from + each, K);
  auto move = [](double (&s)[n], double f, double by) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      if (i + 1 < n) s[i + 1] = f * (s[i + 1] + by * s[i]);
      s[i] *= f;
    }
  };
  double s[n] = {}, all = 1, way = 0;
  auto go = [&](bool store) {
    for (int i = from; i < to; ++i) {
      const int j = leftward ? K - 1 - i : i;
      if (i > 0) {
        const double f = fall[leftward ? j : j - 1], by = leftward ? gap[j] : -gap[j - 1];
        move(s, f, by);
        all *= f, way += by;
      }
      own(j, s);
#pragma unroll
      for (int m = 0; store && m < n; ++m) out[j * n + m] = s[m];
    }
  };
  go(false);
  for (int distance = 1; distance < 32; distance *= 2) {
    double far[n];
#pragma unroll
    for (int m = 0; m < n; ++m) far[m] = __shfl_up_sync(~0u, s[m], distance);
    const double f = __shfl_up_sync(~0u, all, distance), by = __shfl_up_sync(~0u, way, distance);
    if (lane < distance) continue;
    move(far, all, way);
#pragma unroll
    for (int m = 0; m < n; ++m) s[m] += far[m];
    all *= f, way += by;
  }
#pragma unroll
  for (int m = 0; m < n; ++m) {
    s[m] = __shfl_up_sync(~0u, s[m], 1);
    if (lane == 0) s[m] = 0;
  }
  go(true);
}

// Both groups of every interval: sums of e^(-|c_j - end| / tau) {1, c'_j - end, v_j, v_j (c'_j - end)}, or the first n
// of them. The left group of interval k ends at left[k - 1], the right one at right[k].
template <int n>
struct Groups {
  double *gap, *fall, *offset, *v, *left, *right;

  R2_HD Groups(Space& space, int K)
      : gap(space.take<double>(K)), fall(space.take<double>(K)), offset(space.take<double>(n > 1 ? K : 0)),
        v(space.take<double>(n > 2 ? K : 0)), left(space.take<double>(K * n)), right(space.take<double>(K * n)) {}

  template <class A>
  __device__ void fill(const Iteration<A>& it) const {
    const double unit = -inverse(it.tau);
    for (int j = threadIdx.x; j < it.size; j += blockDim.x) {
      gap[j] = j + 1 < it.size ? it.gap(j) : 0, fall[j] = exp(gap[j] * unit);
      if (n > 1) offset[j] = it.offset(j);
      if (n > 2) v[j] = it.moments[3 * j] == A(0) ? 0 : double(it.upstream[j]) * inverse(double(it.moments[3 * j]));
    }
    __syncthreads();
    for (int side = threadIdx.x / 32; side < 2; side += blockDim.x / 32)
      spread<n>(
          it.size, gap, fall, side == 1,
          [&](int j, double (&s)[n]) {
            s[0] += 1;
            if (n > 1) s[1] += offset[j];
            if (n > 2) s[2] += v[j], s[3] += v[j] * offset[j];
          },
          side == 1 ? right : left);
    __syncthreads();
  }
};

// What does not depend on the weights of an interval.
template <int n>
struct Row {
  double bend, left_n, right_n;  // n: 1 / the sums of the exponentials, 0 for a group of none
  double left[n],
      right[n];  // means of c'_j - reference, v_j, v_j (c'_j - reference); those of a group of none are the other's

  __device__ Row(int K, const Groups<n>& groups, double slope, int k) {
    const double *l = groups.left + (k - 1) * n, *r = groups.right + k * n, by = k > 0 && k < K ? groups.gap[k - 1] : 0;
    left_n = k > 0 ? inverse(l[0]) : 0, right_n = k < K ? inverse(r[0]) : 0;
    bend = k == 0 ? -INFINITY : k == K ? INFINITY : slope / 2 * by + log2(l[0] * right_n);
    if (n == 1) return;
    if (k > 0) means(l, left_n, 0, left);
    if (k < K) means(r, right_n, by, right);
    for (int m = 0; m + 1 < n; ++m) {
      if (k == 0) left[m] = right[m];
      if (k == K) right[m] = left[m];
    }
  }
  static __device__ void means(const double* s, double unit, double by, double* mean) {
    mean[0] = s[1] * unit + by;
    if (n > 2) mean[1] = s[2] * unit, mean[2] = (s[3] + by * s[2]) * unit;
  }
  // the shares of the groups for a weight that equals the reference
  __device__ double left_of_equal() const { return share(bend); }
  __device__ double right_of_equal() const { return share(-bend); }
  static __device__ double share(double s) {
    const double e = exp2(-fabs(s)), most = inverse(1 + e);
    return s > 0 ? most : e * most;
  }
};

// The number that lies so many bytes behind the first one.
template <class A>
__device__ __forceinline__ A behind(const A* first, int bytes) {
  return *reinterpret_cast<const A*>(reinterpret_cast<const char*>(first) + bytes);
}

constexpr int kFewestCells = 128, kMostCells = 1024;

// How a block finds the interval of a weight: a grid between the first and the last centroid, whose cells know how many
// centroids lie in lower cells, and then comparisons: one, where no cell has two centroids. Exact for any centroids, as
// the cell is a monotone function; whatever these are, 0 <= interval <= K.
template <class A>
struct Finder {
  A scale, bias;
  float cells;  // of the grid less 1, as bits
  int shift;    // the grid has its numbers without so many last bits
  int half;     // less than 2 half centroids are to be compared with

  __device__ unsigned cell(A w) const {
    // the bits of a subnormal number count its units; a NaN comes to the first cell
    return __float_as_uint(__saturatef(float(fma(w, scale, bias))) * cells);
  }

  // at: the intervals times the size of A. next: the centroids and a NaN
  template <int n>
  __device__ __forceinline__ void find(const A* next, const uint8_t* grid, int K, const A (&w)[n], int (&at)[n]) const {
    constexpr int size = sizeof(A);
#pragma unroll
    for (int i = 0; i < n; ++i) at[i] = grid[cell(w[i])] * size;
    if (half > 1) {
#pragma unroll
      for (int i = 0; i < n; ++i) at[i] <<= shift;
#pragma unroll 1
      for (int h = half * size; h > size; h /= 2) {
#pragma unroll
        for (int i = 0; i < n; ++i) at[i] += w[i] >= behind(next, min(at[i] + h - size, K * size)) ? h : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (w[i] >= behind(next, at[i])) at[i] += size;
  }

  // By all threads of a block. most: a number in shared memory
  __device__ void fill(const A* next, uint8_t* grid, int K, int* most) {
    const A span = next[K - 1] - next[0];
    scale = reciprocal(span);
    if (!(span > A(0) && scale < A(INFINITY))) scale = 0;
    bias = -next[0] * scale;
    shift = 0;
    while ((K - 1) >> shift > 255) ++shift;
    int count = kFewestCells, crowded;
    for (;; count *= 2) {
      cells = __uint_as_float(count - 1);
      bool shared = false;
      for (int j = threadIdx.x; j + 1 < K; j += blockDim.x) shared |= cell(next[j]) == cell(next[j + 1]);
      crowded = __syncthreads_or(shared);
      if (!crowded || count == kMostCells) break;
    }
    if (threadIdx.x == 0) *most = 1;
    for (int c = threadIdx.x; c < count; c += blockDim.x) grid[c] = uint8_t(min(below(next, K, c), K - 1) >> shift);
    __syncthreads();
    if (crowded)
      for (int j = threadIdx.x; j < K; j += blockDim.x) atomicMax(most, below(next, K, cell(next[j]) + 1) - j);
    __syncthreads();
    const int together = *most + (1 << shift) - 1;
    half = 1;
    while (2 * half - 1 < together) half *= 2;
  }

  __device__ int below(const A* next, int K, unsigned c) const {
    int from = 0, to = K;
    while (from < to) {
      const int middle = (from + to) / 2;
      if (cell(next[middle]) < c)
        from = middle + 1;
      else
        to = middle;
    }
    return from;
  }
};

// All that a pass looks up of one iteration: the centroids, and kNumbers numbers of each interval, which Op::fill makes
// besides the first two. They lie an odd number of them apart, so that different intervals are in different banks.
template <class Op, class A>
struct Tables {
  static constexpr int kStride = Op::kNumbers | 1;
  struct Constants {
    Finder<A> finder;
    A slope, pull;  // 2 log2(e) / tau, 2 / tau
    int most;
  };

  uint8_t* grid;
  Constants* constants;
  A *next, *numbers;  // next: the centroids and a NaN

  R2_HD Tables(Space& space, int most)
      : grid(space.take<uint8_t>(kMostCells)), constants(space.take<Constants>(1)), next(space.take<A>(most + 1)),
        numbers(space.take<A>(kStride * (most + 1))) {}
  static R2_HD size_t bytes(int most) {
    Space space = {};
    Tables(space, most);
    return space.used;
  }

  // the numbers of the interval that is at / sizeof(A)
  __device__ __forceinline__ const A* row(int at) const {
    return reinterpret_cast<const A*>(reinterpret_cast<const char*>(numbers) + at * kStride);
  }

  // By all threads of a block. work: what Groups need
  __device__ void fill(const Iteration<A>& it, char* work) const {
    const int K = it.size;
    for (int k = threadIdx.x; k <= K; k += blockDim.x) next[k] = k < K ? it.old[k] : A(NAN);
    Space space = {work};
    const Groups<Op::kGroups> groups(space, K);
    groups.fill(it);
    const A slope = A(it.slope());
    for (int k = threadIdx.x; k <= K; k += blockDim.x) {
      const Row<Op::kGroups> row(K, groups, double(slope), k);
      A* to = numbers + k * kStride;
      to[kReference] = next[k ? k - 1 : 0], to[kBend] = A(row.bend);
      Op::fill(it, groups, row, k, [to](int which, double x) { to[which] = A(x); });
    }
    Finder<A> finder;
    finder.fill(next, grid, K, &constants->most);
    if (threadIdx.x == 0)
      constants->finder = finder, constants->slope = slope, constants->pull = A(2 * inverse(it.tau));
    __syncthreads();
  }
};

// The shares of both groups; s = slope x - bend. The smaller one may be subnormal, as attention may; a NaN stays one.
template <class A>
struct Shares {
  A left, right;

  __device__ explicit Shares(A s) {
    constexpr A up = sizeof(A) == 4 ? 24 : 53, down = sizeof(A) == 4 ? A(0x1p-24) : A(0x1p-53);
    const A e = exp2_(up - abs_(s)) * down, most = reciprocal(A(1) + e);
    const A least = e * most;
    right = s > A(0) ? most : least, left = s > A(0) ? least : most;
  }
};

// The right share alone, 0 where it would be subnormal.
__device__ __forceinline__ float right_share(float s) { return reciprocal(1 + exp2_(-s)); }
__device__ __forceinline__ double right_share(double s) { return Shares<double>(s).right; }

}  // namespace r2::cuda
