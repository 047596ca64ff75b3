// What DKM's passes on the CPU share: memory, threads, and numbers as the accumulator's type.
#pragma once
#include <cstdlib>

#include "kernels.h"
#include "simd.h"

#include "../lists.h"

namespace r2 {
inline namespace R2_ISA {

// Uninitialised memory, aligned for vectors.
struct AlignedMemory {
  void* at;
  explicit AlignedMemory(int64_t bytes) : at(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  AlignedMemory(const AlignedMemory&) = delete;
  ~AlignedMemory() { std::free(at); }
  template <class T>
  T* as() const {
    return static_cast<T*>(at);
  }
};

template <class A>
using Index = std::remove_reference_t<decltype(typename Lane<Vec<A>>::bits{}[0])>;
template <class A>
using Indices = typename Lane<Vec<A>>::bits;

// Attention is kept times this, for it may be subnormal, and arithmetic with such numbers takes ten times as long.
template <class A>
struct AttentionScale;
template <>
struct AttentionScale<float> {
  static constexpr float shift = 60, up = 0x1p60f, down = 0x1p-60f, least = -150.5f;
};
template <>
struct AttentionScale<double> {
  static constexpr double shift = 512, up = 0x1p512, down = 0x1p-512, least = -1075.5;
};

// up 2^s for s <= 0; 0 where 2^s is
template <class V>
R2_HD V power(V s) {
  using A = typename Lane<V>::A;
  using E = Exp2<A>;
  using S = AttentionScale<A>;
  const V x = at_least(s, splat<V>(S::least)), shifted = x + (E::round + S::shift),
          f = x - (shifted - (E::round + S::shift));
  return x <= splat<V>(S::least) ? V{} : scaled(horner<0, 1>(f), shifted);
}

#if defined(__AVX512F__)
using Floats = __m512;
#define R2_SHUFFLE(name) bit_cast<Vec<float>>(_mm512_##name)
#elif defined(__AVX2__)
using Floats = __m256;
#define R2_SHUFFLE(name) bit_cast<Vec<float>>(_mm256_##name)
#endif
#if defined(__AVX2__)
R2_HD Vec<float> interleave_low(Vec<float> a, Vec<float> b) {
  return R2_SHUFFLE(unpacklo_ps(bit_cast<Floats>(a), bit_cast<Floats>(b)));
}
R2_HD Vec<float> interleave_high(Vec<float> a, Vec<float> b) {
  return R2_SHUFFLE(unpackhi_ps(bit_cast<Floats>(a), bit_cast<Floats>(b)));
}
// In every four lanes: rows to columns, and back.
R2_HD void transpose_4x4(Vec<float>* v) {
  typedef decltype(bit_cast<Vec<double>>(v[0])) D;
  const auto pair = [](bool upper, Vec<float> a, Vec<float> b) {
    const D x = bit_cast<D>(a), y = bit_cast<D>(b);
#if defined(__AVX512F__)
    const __m512d p = bit_cast<__m512d>(x), q = bit_cast<__m512d>(y);
    return bit_cast<Vec<float>>(upper ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
#else
    const __m256d p = bit_cast<__m256d>(x), q = bit_cast<__m256d>(y);
    return bit_cast<Vec<float>>(upper ? _mm256_unpackhi_pd(p, q) : _mm256_unpacklo_pd(p, q));
#endif
  };
  const Vec<float> a = interleave_low(v[0], v[1]), b = interleave_high(v[0], v[1]), c = interleave_low(v[2], v[3]),
                   d = interleave_high(v[2], v[3]);
  v[0] = pair(false, a, c), v[1] = pair(true, a, c), v[2] = pair(false, b, d), v[3] = pair(true, b, d);
}
#endif

constexpr int kPad = 16;  // blocks of weights are filled up to a multiple of it

// n numbers as A, in place where that is possible; filled up with the last one.
template <class A, class T>
R2_HD const A* widened(const T* from, int n, A* buffer) {
  if constexpr (std::is_same<A, T>::value)
    if (n % kPad == 0) return from;
  int i = 0;
  for (; i + lanes<Vec<A>> <= n; i += lanes<Vec<A>>) store(buffer + i, load<Vec<A>>(from + i));
  for (; i < n; ++i) buffer[i] = widen(from[i]);
  for (; i % kPad; ++i) buffer[i] = buffer[n - 1];
  return buffer;
}

// n numbers, filled up, times a unit of lengths; in `buffer` where that is not 1.
template <class A>
R2_HD const A* in_units(const A* from, int n, A unit, A* buffer) {
  if (unit == A(1)) return from;
  for (int i = 0; i < n; ++i) buffer[i] = from[i] * unit;
  return buffer;
}

template <class A, class T>
R2_HD void narrowed(const A* from, int n, T* to) {
  int i = 0;
  for (; i + lanes<Vec<A>> <= n; i += lanes<Vec<A>>) store(to + i, load<Vec<A>>(from + i));
  for (; i < n; ++i) to[i] = narrow<T>(from[i]);
}

// Rows [row, row + n) of a tensor, a chunk of a plan of whole rows.
struct RowChunk {
  int64_t tensor, row, n;
  RowChunk(const List& list, int64_t i)
      : tensor(owner_of(list, i)), row((i - tensor_of(list, tensor).first_chunk) * list.chunk),
        n(tensor_of(list, tensor).rows - row) {
    if (n > list.chunk) n = list.chunk;
  }
};

template <class T>
R2_HD T* address(const int64_t* table, int64_t tensor) {
  return table ? reinterpret_cast<T*>(table[tensor]) : nullptr;
}

// The passes over scalars in the Euclidean metric, and over anything else.
struct ScalarPasses {
  static void update(const List&, const Clusters&, const Pass&, int threads);
  static void output(const List&, const Clusters&, const Pass&, int threads);
  static void upstream(const List&, const Clusters&, const Pass&, int threads);
  static void recur(const List&, const Clusters&, const Pass&, int threads);
  static void gradient(const List&, const Clusters&, const Pass&, int threads);
  static void jacobian(const List&, const Clusters&, const Pass&, int threads);
  static int64_t scratch(int most);
};
struct RowPasses {
  static void update(const List&, const Clusters&, const Pass&, int threads);
  static void output(const List&, const Clusters&, const Pass&, int threads);
  static void upstream(const List&, const Clusters&, const Pass&, int threads);
  static void recur(const List&, const Clusters&, const Pass&, int threads);
  static void gradient(const List&, const Clusters&, const Pass&, int threads);
  static void assign(const List&, const Clusters&, const Pass&, int threads);
  static int64_t scratch(int most, int d);
};
struct ValuePasses {
  static void collect(const List&, const Values&, int threads);
  static void sum(const List&, const Values&, int threads);
  static void look_up(const List&, const Values&, int threads);
};

}  // namespace R2_ISA
}  // namespace r2
