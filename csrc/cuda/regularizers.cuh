// How a block reads one chunk for kure, weight_stats, msqe, partial_l2 and bin_reg, and the gradient of bin_reg.
#pragma once
#include "skeletons.cuh"

#include "../regularizers.h"

namespace r2::cuda {

// The largest magnitude, and the sum above the first weight, of so small a part of the weights that any have room.
template <class A>
struct SampleLane {
  static constexpr A kPart = A(1) / (4 * kSample);
  A origin, top = 0, total = 0;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) total += w[j] * kPart - origin, top = max_nan(top, abs_(w[j]));
  }
};

template <class A>
struct MomentsLane {
  A inverse, pivot, low, high;
  Moments::Lanes<A> sums;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      sums.add(w[j] * inverse - pivot);
      low = min_nan(low, w[j]), high = max_nan(high, w[j]);
    }
  }
};

// Sums around the mean of the sample, near enough to the mean of all that float32 loses nothing, in units of the power
// of two at its largest weight; anew where weights of the chunk are so much larger that their powers may overflow.
struct MomentsReader {
  static constexpr float kFar = 65536;

  template <class T, class A = Acc<T>>
  static __device__ void chunk(const Rows<T>& rows, Column, A* partial) {
    const Rows<T> sample = rows.first(kSample);
    SampleLane<A> of_sample = {widen(rows.memory[rows.at(0)]) * SampleLane<A>::kPart};
    sweep(sample, of_sample);
    A mean[1] = {of_sample.total}, top[1] = {of_sample.top};
    block_reduce<Sum>(mean);
    block_reduce<Max>(top);
    A unit = unit_at(top[0]), pivot = (of_sample.origin + mean[0] / sample.n) * (1 / unit) / SampleLane<A>::kPart;

#pragma unroll 1
    for (;;) {
      MomentsLane<A> lane = {1 / unit, pivot, A(INFINITY), A(-INFINITY), {}};
      sweep(rows, lane);
      A ends[2] = {lane.high, -lane.low}, sums[4] = {lane.sums.m1, lane.sums.m2, lane.sums.m3, lane.sums.m4};
      block_reduce<Max>(ends);
      block_reduce<Sum>(sums);
      const A wanted = unit_at(max_nan(ends[0], ends[1]));
      if (wanted > unit * A(kFar)) {
        pivot *= unit / wanted, unit = wanted;
        continue;
      }
      if (threadIdx.x != 0) return;
      Moments::centre(rows.n, unit, pivot, sums, partial);
      partial[5] = -ends[1], partial[6] = ends[0];
      return;
    }
  }
};

template <class A>
struct MsqeLane {
  Msqe::Lanes<A> sums;
  Coder<A> coder;
  A inverse;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) sums.add(w[j], coder, inverse);
  }
};

struct MsqeReader {
  template <class T, class A = Acc<T>>
  static __device__ void chunk(const Rows<T>& rows, Column c, A* partial) {
    ErrorUnit<A> unit(c.first);
    A sums[2];
#pragma unroll 1
    do {
      MsqeLane<A> lane = {{}, Coder<A>(c.first, c.bits, true), unit.inverse};
      sweep(rows, lane);
      sums[0] = lane.sums.squares, sums[1] = lane.sums.products;
      block_reduce<Sum>(sums);
      if (threadIdx.x == 0) partial[0] = sums[0], partial[1] = sums[1], partial[2] = unit.unit;
    } while (unit.widen(sums[0]));
  }
};

template <class A>
struct PartialL2Lane {
  A inverse, theta, total;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A v = w[j] * inverse;
      if (!(abs_(v) > theta)) total += v * v;
    }
  }
};

struct PartialL2Reader {
  template <class T, class A = Acc<T>>
  static __device__ void chunk(const Rows<T>& rows, Column c, A* partial) {
    const A inverse = 1 / unit_at(A(c.first));
    PartialL2Lane<A> lane = {inverse, A(c.first) * inverse, 0};
    sweep(rows, lane);
    A sums[1] = {lane.total};
    block_reduce<Sum>(sums);
    if (threadIdx.x == 0) partial[0] = sums[0];
  }
};

// The bins of codes; that of NaN is the first.
template <class A>
struct Binner {
  Coder<A> coder;
  A least, offset;

  __device__ Binner(double step, int bits)
      : coder(step, bits, true), least(coder.sign ? A(0) : coder.low),
        offset(kRound<A> + (coder.sign ? A(0) : A(1 << (bits - 1)))) {}
  __device__ __forceinline__ int operator()(A code) const {
    return low_bits((code > least ? code : least) + offset) & 0xff;
  }

  static __device__ __forceinline__ int low_bits(float x) { return __float_as_int(x); }
  static __device__ __forceinline__ int low_bits(double x) { return __double2loint(x); }
};

template <class A>
struct alignas(2 * sizeof(A)) Bin {
  A count, error;
};

// Every lane has bins of its own: bin b of [from, from + count) lies at own[32 b].
template <class A>
struct BinLane {
  Binner<A> binner;
  A inverse;
  Bin<A>* own;
  int from, count;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A code = binner.coder(w[j]), error = (w[j] - binner.coder.step * code) * inverse;
      const int at = binner(code) - from;
      if (unsigned(at) >= unsigned(count)) continue;
      Bin<A> bin = own[at * 32];
      bin.count += 1, bin.error += error * error;
      own[at * 32] = bin;
    }
  }
};

// With kRoom bytes of shared memory; where not all bins fit into it, the chunk is read once for each part of them.
template <int kRoom>
struct BinRegReader {
  template <class T, class A = Acc<T>>
  static __device__ void chunk(const Rows<T>& rows, Column c, A* partial) {
    extern __shared__ double2 room[];
    constexpr int most = kRoom / (kThreads * sizeof(Bin<A>));
    const int bins = 1 << c.bits, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    ErrorUnit<A> unit(c.first);
    A sum_of_all;
#pragma unroll 1
    do {
      bool finite = true;
      for (int from = 0; from < bins; from += most) {
        const int count = min(bins - from, most);
        Bin<A>* all = reinterpret_cast<Bin<A>*>(room);
        for (int i = threadIdx.x; i < count * kThreads; i += kThreads) all[i] = {0, 0};
        __syncthreads();
        BinLane<A> own = {Binner<A>(c.first, c.bits), unit.inverse, all + warp * count * 32 + lane, from, count};
        sweep(rows, own);
        __syncthreads();
        for (int b = warp; b < count; b += kWarps) {
          Bin<A> sum = all[b * 32 + lane];
          for (int other = 1; other < kWarps; ++other) {
            const Bin<A> more = all[(other * count + b) * 32 + lane];
            sum.count += more.count, sum.error += more.error;
          }
          for (int distance = 16; distance > 0; distance /= 2) {
            sum.count += __shfl_xor_sync(~0u, sum.count, distance);
            sum.error += __shfl_xor_sync(~0u, sum.error, distance);
          }
          if (lane == 0) partial[from + b] = sum.count, partial[bins + from + b] = sum.error;
          finite &= sum.error != A(INFINITY);
        }
        __syncthreads();
      }
      if (threadIdx.x == 0) partial[2 * bins] = unit.unit;
      sum_of_all = __syncthreads_and(finite) ? A(0) : A(INFINITY);
    } while (unit.widen(sum_of_all));
  }
};

template <class A>
__device__ void merge_bins(const List& list, const Forward& f, int64_t t, Merging& memory) {
  static_assert(sizeof(Merging) >= 2 * kMergers * sizeof(double));
  double (*count)[kMergers] = reinterpret_cast<double (*)[kMergers]>(&memory), (*error)[kMergers] = count + 1;
  const int bins = 1 << f.bits, groups = kMergers / bins, me = threadIdx.x;
  A* saved = static_cast<A*>(f.saved) + (t << f.bits) * 2;
  const int64_t first = tensor_of(list, t).first_chunk, parts = (tensor_of(list, t).rows + list.chunk - 1) / list.chunk;
  double counted = 0, summed = 0;
  for (int64_t part = me / bins; part < parts; part += groups) {
    const A* partial = static_cast<const A*>(f.partial) + (first + part) * BinReg::state_size(f.bits);
    const double unit = partial[2 * bins];
    counted += double(partial[me % bins]), summed += partial[bins + me % bins] * unit * unit;
  }
  (*count)[me] = counted, (*error)[me] = summed;
  __syncthreads();
  if (me < bins) {
    for (int group = 1; group < groups; ++group)
      counted += (*count)[group * bins + me], summed += (*error)[group * bins + me];
    summed = BinReg::mean(summed, counted);
    saved[me] = A(counted), saved[bins + me] = A(summed);
  }
  __syncthreads();
  (*error)[me] = summed;
  __syncthreads();
  if (me != 0) return;
  double total = 0;
  for (int b = 0; b < bins; ++b) total += (*error)[b];
  static_cast<A*>(f.out)[t] = A(total);
}

// 2 / count (w - q), from a table of 2 / count.
template <class A>
struct BinRegGradient {
  Binner<A> binner;
  const A* slopes;

  __device__ __forceinline__ A operator()(A w) const {
    const A code = binner.coder(w);
    return slopes[binner(code)] * (w - binner.coder.step * code);
  }

  // By all threads of the block.
  static __device__ void fill(const Backward& b, int64_t t, A* slopes) {
    const A* counts = static_cast<const A*>(b.saved) + (t << b.bits) * 2;
    const A twice = A(2 * LossOp<BinReg>::upstream<A>(b, t));
    for (int i = threadIdx.x; i < 1 << b.bits; i += blockDim.x) slopes[i] = twice / counts[i];
  }
};

}  // namespace r2::cuda
