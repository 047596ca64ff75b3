// How a block reads one chunk for each range loss: what each thread keeps, and the partial state that the block makes
// of it. `take` gets as many numbers as the thread has loaded at once.
#pragma once
#include "skeletons.cuh"

#include "../range_losses.h"

namespace r2::cuda {

template <class A>
struct LInfLane {
  A top = 0, ties = 0;

  template <int n>
  __device__ void take(const A (&w)[n]) {
    A best = abs_(w[0]);
#pragma unroll
    for (int j = 1; j < n; ++j) best = max_nan(best, abs_(w[j]));
    if (best < top || top != top) return;
    if (!(best == top)) top = best, ties = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) ties += abs_(w[j]) == top ? A(1) : A(0);
  }
};

struct LInfReader {
  template <class T, bool kColumns, class A = Acc<T>>
  static __device__ void chunk(const Rows<T, kColumns>& rows, Column, A* partial) {
    LInfLane<A> lane;
    sweep(rows, lane);
    A top[1] = {lane.top};
    block_reduce<Max>(top, rows.columns);
    A ties[1] = {lane.top == top[0] ? lane.ties : 0};
    block_reduce<Sum>(ties, rows.columns);
    if (int(threadIdx.x) < rows.columns) partial[0] = top[0], partial[1] = ties[0];
  }
};

template <class A>
struct MarginLane {
  Margin::Lanes<A> sums;
  A M;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) sums.add(w[j], M);
  }
};

struct MarginReader {
  template <class T, bool kColumns, class A = Acc<T>>
  static __device__ void chunk(const Rows<T, kColumns>& rows, Column c, A* partial) {
    MarginLane<A> lane = {{}, A(fabs(c.first))};
    sweep(rows, lane);
    A sums[2] = {lane.sums.excess, lane.sums.outside};
    block_reduce<Sum>(sums, rows.columns);
    if (int(threadIdx.x) < rows.columns) partial[0] = sums[0], partial[1] = sums[1];
  }
};

template <class A>
struct ExtremesLane {
  A high = -INFINITY, low = INFINITY;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) high = max_nan(high, w[j]), low = min_nan(low, w[j]);
  }
};

// One side of the soft extremes, relative to a weight that is the extreme or near it; k is negative for the minimum
// side.
template <class A, bool kVariance>
struct SoftSide {
  using Sums = Soft::Sums<A>;
  A k, shift;
  Sums total = {0, 0, 0};

  __device__ SoftSide(A scale, A extreme) : k(scale), shift(extreme) {}

  __device__ Sums of(A w) const { return Sums::template of<kVariance>(k * (w - shift)); }

  // In groups: equal weights, usual in bfloat16, all round the same way when they are added to one long sum.
  template <int n>
  __device__ Sums of(const A (&w)[n]) const {
    constexpr int group = 8;
    Sums all;
#pragma unroll
    for (int i = 0; i < n; i += group) {
      Sums some = of(w[i]);
#pragma unroll
      for (int j = i + 1; j < i + group && j < n; ++j) some += of(w[j]);
      if (i == 0) all = some;
      if (i != 0) all += some;
    }
    return all;
  }

  __device__ void move_to(A extreme) {
    A s[3] = {total.s0, total.s1, total.s2};
    Soft::move(s, k * (shift - extreme));
    total = {s[0], s[1], s[2]}, shift = extreme;
  }
};

// kCentred: the shifts are the soft extremes, which stay.
template <class A, bool kVariance, bool kCentred = false>
struct SoftLane {
  SoftSide<A, kVariance> high, low;

  __device__ SoftLane(A k, A top, A bottom) : high(k, top), low(-k, bottom) {}

  // No exponential is above 1 unless a weight passes a shift. A batch is summed first and looked at then, which costs
  // nothing for each weight; if it passed by much, the shifts move and the batch is summed again.
  template <int n>
  __device__ void take(const A (&w)[n]) {
    Soft::Sums<A> up, down;
    do {
      up = high.of(w), down = low.of(w);
      pin(up.s1), pin(down.s1);
      if (kVariance) pin(up.s2), pin(down.s2);
    } while (!kCentred && __builtin_expect(fmax(up.s0, down.s0) > A(2 * n), false) && widen_range(w));
    high.total += up, low.total += down;
  }

  // Whether a weight of the batch lies beyond a shift; so `take` goes round at most twice, NaN or not.
  template <int n>
  __device__ bool widen_range(const A (&w)[n]) {
    A top = high.shift, bottom = low.shift;
#pragma unroll
    for (int j = 0; j < n; ++j) top = w[j] > top ? w[j] : top, bottom = w[j] < bottom ? w[j] : bottom;
    const bool higher = top > high.shift, lower = bottom < low.shift;
    if (higher) high.move_to(top);
    if (lower) low.move_to(bottom);
    return higher || lower;
  }

  // All threads of a column to the shifts that lie farthest out, if any has left those that all began with.
  __device__ void meet(A top, A bottom, int columns) {
    if (!__syncthreads_or(high.shift != top || low.shift != bottom)) return;
    A ends[2] = {high.shift, -low.shift};
    block_reduce<Max>(ends, columns);
    high.move_to(ends[0]), low.move_to(-ends[1]);
  }
};

template <bool kVariance>
struct SoftReader {
  // Whether the variance of a side is lost to cancellation: its mean is more than two deviations from the shift.
  static __device__ bool is_lost(const double* s) {
    const double mean = s[1] / s[0];
    return mean * mean > 4 * (s[2] / s[0] - mean * mean);
  }

  template <class Lane>
  static __device__ void add_up(const Lane& lane, int columns, double (&sums)[6]) {
    const auto &up = lane.high.total, &down = lane.low.total;
    sums[0] = up.s0, sums[1] = up.s1, sums[2] = up.s2, sums[3] = down.s0, sums[4] = down.s1, sums[5] = down.s2;
    block_reduce<Sum>(sums, columns);
  }

  template <class T, bool kColumns, class A = Acc<T>>
  static __device__ void chunk(const Rows<T, kColumns>& rows, Column c, A* partial) {
    // a range so small that it may not tell that of the chunk, as exponents do not rise in it, is looked for in all
    // rows
    A ends[2], alpha = A(fabs(c.first));
    for (int n = kSample / rows.columns;; n = rows.n) {
      ExtremesLane<A> extremes;
      sweep(rows.first(n), extremes);
      ends[0] = extremes.high, ends[1] = -extremes.low;
      block_reduce<Max>(ends, rows.columns);
      if (n >= rows.n || !__syncthreads_or(alpha * (ends[0] + ends[1]) < Soft::kLeastSpan<A>)) break;
    }

    SoftLane<A, kVariance> lane(A(Soft::size(c.first, ends[0] + ends[1]) * kLog2e), ends[0], -ends[1]);
    sweep(rows, lane);
    lane.meet(ends[0], -ends[1], rows.columns);
    double sums[6];
    add_up(lane, rows.columns, sums);
    const A k = lane.high.k;
    A high = lane.high.shift, low = lane.low.shift;
    if (kVariance && __syncthreads_or(is_lost(sums) || is_lost(sums + 3))) {
      high += A(sums[1] / sums[0] / k), low -= A(sums[4] / sums[3] / k);
      SoftLane<A, kVariance, true> centred(k, high, low);
      sweep(rows, centred);
      add_up(centred, rows.columns, sums);
    }
    if (int(threadIdx.x) >= rows.columns) return;
    Soft::settle(high, sums, k, partial);
    Soft::settle(low, sums + 3, -k, partial + 4);
  }
};

template <>
constexpr bool kHasColumns<LInfReader> = true;
template <>
constexpr bool kHasColumns<MarginReader> = true;
template <bool kVariance>
constexpr bool kHasColumns<SoftReader<kVariance>> = true;
template <>
constexpr bool kHasColumns<LInfOp> = true;
template <>
constexpr bool kHasColumns<MarginOp> = true;
template <bool kExtrema>
constexpr bool kHasColumns<SoftOp<kExtrema>> = true;

}  // namespace r2::cuda
