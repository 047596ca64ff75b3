// The exact k-th smallest |w| of each tensor: digits of its bits from the top, by counting; and one such count, for a
// search over shards. Counts are integers, so blocks may add them in any order.
#include "launch.cuh"

namespace r2::cuda {

constexpr int kDigit = 11, kDigits = 1 << kDigit;

__device__ __forceinline__ uint32_t key_of(float w) { return __float_as_uint(w) & 0x7fffffffu; }
__device__ __forceinline__ uint64_t key_of(double w) {
  return uint64_t(__double_as_longlong(w)) & 0x7fffffffffffffffull;
}
__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key); }
__device__ __forceinline__ double value_of(uint64_t key) { return __longlong_as_double(int64_t(key)); }

template <class A>
using Key = decltype(key_of(A()));
using Count = unsigned long long;  // of a tensor; those of a chunk have 32 bits

// Where the search stands: the digits found, and which of the weights that begin with them is meant.
struct Found {
  uint64_t prefix;
  int64_t place;
};

// `rank`, and the digit [shift, shift + width) that this pass is about; `last` writes theta.
struct Digit {
  Rank rank;
  int shift, width;
  bool first, last;

  __device__ Count* counts(int64_t t) const { return static_cast<Count*>(rank.scratch) + t * kDigits; }
  __device__ Found& found(int64_t count, int64_t t) const {
    return *(reinterpret_cast<Found*>(static_cast<Count*>(rank.scratch) + count * kDigits) + t);
  }
  __device__ uint64_t prefix(int64_t count, int64_t t) const { return found(count, t).prefix; }
};

// The same of `digits`.
struct GivenDigit {
  Digits digits;
  int shift, width;
  bool first;

  __device__ Count* counts(int64_t t) const { return reinterpret_cast<Count*>(digits.counts) + t * kRadix; }
  __device__ uint64_t prefix(int64_t, int64_t t) const { return uint64_t(digits.prefix[t]); }
};

template <class A>
struct DigitLane {
  uint32_t* counts;
  Key<A> prefix;
  int shift, above;
  bool first;

  template <int n>
  __device__ void take(const A (&w)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const Key<A> key = key_of(w[j]);
      if (first || key >> above == prefix) atomicAdd(counts + (uint32_t(key >> shift) & (kDigits - 1)), 1u);
    }
  }
};

template <class T, class D>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) digits_kernel(List list, D digit) {
  using A = Acc<T>;
  __shared__ uint32_t counts[kDigits];
  const Chunk c = chunk_at(list, blockIdx.x);
  for (int i = threadIdx.x; i < kDigits; i += kThreads) counts[i] = 0;
  __syncthreads();
  const Key<A> prefix = digit.first ? Key<A>(0) : Key<A>(digit.prefix(list.count, c.tensor));
  DigitLane<A> lane = {counts, prefix, digit.shift, digit.shift + digit.width, digit.first};
  sweep(Rows<T>(list, c), lane);
  __syncthreads();
  const uint32_t within = (1u << digit.width) - 1;
  Count* all = digit.counts(c.tensor);
  for (int i = threadIdx.x; i < kDigits; i += kThreads)
    if (counts[i]) atomicAdd(all + (i & within), Count(counts[i]));
}

// A block for each tensor; leaves the counts cleared.
template <class A>
__global__ void __launch_bounds__(kMergers, 1) choose_kernel(List list, Digit digit) {
  constexpr int each = kDigits / kMergers;
  __shared__ int64_t before[kMergers + 1];
  const int64_t t = blockIdx.x;
  const int64_t rank = digit.rank.rank[t];
  if (rank < 1) {  // no weight is meant, so no digit is found
    if (digit.last && threadIdx.x == 0) static_cast<A*>(digit.rank.theta)[t] = A(NAN);
    return;
  }
  Found& found = digit.found(list.count, t);
  const Found old = digit.first ? Found{0, rank - 1} : found;
  Count* counts = digit.counts(t);
  int64_t own[each], sum = 0;
  for (int i = 0; i < each; ++i) {
    Count& count = counts[threadIdx.x * each + i];
    own[i] = int64_t(count), sum += own[i], count = 0;
  }
  before[threadIdx.x + 1] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int i = 1; i <= kMergers; ++i) before[i] += before[i - 1];
  }
  __syncthreads();
  int64_t place = old.place - before[threadIdx.x];
  if (place >= 0 && place < sum) {
    int i = 0;
    for (; i + 1 < each && place >= own[i]; ++i) place -= own[i];
    const uint64_t prefix = old.prefix << digit.width | uint64_t(threadIdx.x * each + i);
    found = {prefix, place};
    if (digit.last) static_cast<A*>(digit.rank.theta)[t] = value_of(Key<A>(prefix << digit.shift));
  }
}

int64_t rank_scratch(int64_t count) { return count * (kDigits * sizeof(Count) + sizeof(Found)); }

// As many digits as the dtype has bits that are not zero in the accumulator's.
void rank(const List& list, const Rank& r, int device, uintptr_t stream) {
  Queue queue("partial_l2_fwd", device, stream);
  check(queue.op, cudaMemsetAsync(r.scratch, 0, rank_scratch(list.count), queue.stream));
  const bool wide = list.dtype == Dtype::f64;
  const int passes = wide ? 6 : list.dtype == Dtype::f32 ? 3 : 2;
  int above = wide ? 63 : 31;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = above > kDigit ? above - kDigit : 0;
    const Digit digit = {r, shift, above - shift, pass == 0, pass == passes - 1};
    with_type(list.dtype, [&](auto tag) {
      queue.launch(digits_kernel<typename decltype(tag)::type, Digit>, list.chunks, kThreads, list, digit);
    });
    queue.launch(wide ? choose_kernel<double> : choose_kernel<float>, list.count, kMergers, list, digit);
    above = shift;
  }
}

// 16-bit numbers are all read as bfloat16, of which an accumulator has the bits above 16 more.
void digits_fwd(const List& list, const Digits& d, int device, uintptr_t stream) {
  Queue queue("digits_fwd", device, stream);
  auto count = [&](auto kernel, int bytes, int behind) {
    const GivenDigit digit = {d, 8 * (bytes - 1 - d.place) + behind, 8, d.place == 0};
    queue.launch(kernel, list.chunks, kThreads, list, digit);
  };
  switch (list.dtype) {
    case Dtype::f64: return count(digits_kernel<double, GivenDigit>, 8, 0);
    case Dtype::f32: return count(digits_kernel<float, GivenDigit>, 4, 0);
    default: return count(digits_kernel<__nv_bfloat16, GivenDigit>, 2, 16);
  }
}

}  // namespace r2::cuda
