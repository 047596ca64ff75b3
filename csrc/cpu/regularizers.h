// How kure, weight_stats, msqe, partial_l2 and bin_reg read one chunk on the CPU, and the gradient of bin_reg.
#pragma once
#include <algorithm>

#include "skeletons.h"

#include "../regularizers.h"

namespace r2 {
inline namespace R2_ISA {

#if defined(__AVX512F__)
template <>
R2_HD Vec<float> clip_<Vec<float>>(Vec<float> v, Vec<float> low, Vec<float> high) {
  return bit_cast<Vec<float>>(
      _mm512_min_ps(bit_cast<__m512>(high), _mm512_max_ps(bit_cast<__m512>(low), bit_cast<__m512>(v))));
}
#endif

// The chunk lies in cache: its extremes first, then its mean, then the powers of what is left.
template <class T, class A>
R2_HD void moments_chunk(const T* w, int64_t n, A* state) {
  using V = Vec<A>;
  struct Total {
    V wide = {};
    A tail = 0;
  } total;
  auto [low, high] = extremes(w, n);
  const A unit = unit_at(abs_(low) > abs_(high) ? low : high), scale = 1 / unit, pivot = widen(w[0]) * scale;
  auto above = [scale](auto x, A centre) { return x * splat<decltype(x)>(scale) - splat<decltype(x)>(centre); };
  sweep(w, n, total.wide, total.tail, [&above, pivot](auto& t, auto x) { t += above(x, pivot); });
  const A mean = A(double(pivot) + (sum(total.wide) + total.tail) / n);
  Moments::Lanes<V> lane = {};
  Moments::Lanes<A> tail = {};
  sweep(w, n, lane, tail, [&above, mean](auto& l, auto x) { l.add(above(x, mean)); });
  if (!(mean - mean == 0))
    for (int64_t i = 0; i < n; ++i)
      if (widen(w[i]) != widen(w[i])) low = high = A(NAN);
  state[0] = A(n), state[1] = mean + A((sum(lane.m1) + tail.m1) / n), state[2] = A(sum(lane.m2) + tail.m2);
  state[3] = A(sum(lane.m3) + tail.m3), state[4] = A(sum(lane.m4) + tail.m4), state[5] = low, state[6] = high;
  state[7] = unit;
}

struct MomentsReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column, bool, A* state) {
    moments_chunk(w, n, state);
  }
};

struct MsqeReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool, A* state) {
    const Coder<Vec<A>> wide(c.first, c.bits, true);
    const Coder<A> narrow(c.first, c.bits, true);
    ErrorUnit<A> unit(c.first);
    do {
      const A inverse = unit.inverse;
      Msqe::Lanes<Vec<A>> lane = {};
      Msqe::Lanes<A> tail = {};
      sweep(w, n, lane, tail, [&](auto& l, auto x) {
        if constexpr (std::is_same<decltype(x), A>::value) {
          l.add(x, narrow, inverse);
        } else {
          l.add(x, wide, splat<Vec<A>>(inverse));
        }
      });
      state[0] = A(sum(lane.squares) + tail.squares), state[1] = A(sum(lane.products) + tail.products);
      state[2] = unit.unit;
    } while (unit.widen(state[0]));
  }
};

struct PartialL2Reader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool, A* state) {
    Vec<A> lane = {};
    A tail = 0;
    const A inverse = 1 / unit_at(A(c.first)), theta = A(c.first) * inverse;
    sweep(w, n, lane, tail, [inverse, theta](auto& l, auto x) {
      auto kept = PartialL2::kept(x * splat<decltype(x)>(inverse), splat<decltype(x)>(theta));
      l += kept * kept;
    });
    state[0] = A(sum(lane) + tail);
  }
};

// The bins of codes; that of NaN is the first.
template <class V>
struct Binner {
  using A = typename Lane<V>::A;
  using Index = typename Lane<V>::bits;
  Coder<V> coder;
  V inverse, least, offset;  // inverse: of the unit of errors

  Binner(double step, int bits, A inverse)
      : coder(step, bits, true), inverse(splat<V>(inverse)), least(coder.sign ? splat<V>(0) : coder.low),
        offset(splat<V>(kRound<A> + (coder.sign ? A(0) : A(1 << (bits - 1))))) {}

  struct Error {
    V code, squared;
  };
  // with the code of the first bin where w is NaN
  R2_HD Error error(V w) const {
    V code = coder(w), e = (w - coder.step * code) * inverse;
    return {code > coder.low ? code : coder.low, e * e};
  }
  R2_HD Index operator()(V code) const {
    return bit_cast<Index>((code > least ? code : least) + offset) & (Index{} + 0xff);
  }
};

constexpr int kMasked = 4;   // bins: so many are kept in registers
constexpr int kStrip = 512;  // weights whose errors and bins are written down before they are summed
constexpr int kCopies = 8;   // of each bin, so that one addition need not wait for the one before

template <int kBins, class T, class A>
inline void masked_bins(const T* w, int64_t n, Column c, A inverse, A* state) {
  using V = Vec<A>;
  const Binner<V> wide(c.first, c.bits, inverse);
  const Binner<A> narrow(c.first, c.bits, inverse);
  V count[kBins] = {}, error[kBins] = {}, code[kBins];
  for (int b = 0; b < kBins; ++b) code[b] = splat<V>(A(kBins == 2 ? 2 * b - 1 : b - kBins / 2));
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) {
    __builtin_prefetch(w + n + i);
    auto e = wide.error(load<V>(w + i));
    for (int b = 0; b < kBins; ++b) {
      count[b] = e.code == code[b] ? count[b] + A(1) : count[b];
      error[b] = e.code == code[b] ? error[b] + e.squared : error[b];
    }
  }
  for (int b = 0; b < kBins; ++b) state[b] = A(sum(count[b])), state[kBins + b] = A(sum(error[b]));
  for (; i < n; ++i) {
    auto e = narrow.error(widen(w[i]));
    auto bin = narrow(e.code);
    state[bin] += 1, state[kBins + bin] += e.squared;
  }
}

template <class A>
using Pair __attribute__((vector_size(2 * sizeof(A)))) = A;

struct BinRegReader {
  // A function of its own: inlined into the loop over terms, its sums would be kept in memory.
  template <class T, class A>
  __attribute__((noinline)) static void sums(const T* w, int64_t n, Column c, A inverse, A* state) {
    using V = Vec<A>;
    const int bins = 1 << c.bits;
    if (bins == 2) return masked_bins<2>(w, n, c, inverse, state);
    if (bins == kMasked) return masked_bins<kMasked>(w, n, c, inverse, state);
    const Binner<V> wide(c.first, c.bits, inverse);
    const Binner<A> narrow(c.first, c.bits, inverse);
    alignas(64) A errors[kStrip];
    alignas(64) typename Lane<A>::bits at[kStrip];
    alignas(64) Pair<A> sums[256 * kCopies];
    for (int b = 0; b < bins * kCopies; ++b) sums[b] = Pair<A>{};
    for (int64_t begin = 0; begin < n; begin += kStrip) {
      const int64_t size = n - begin < kStrip ? n - begin : kStrip;
      const T* from = w + begin;
      int64_t i = 0;
      for (; i + lanes<V> <= size; i += lanes<V>) {
        __builtin_prefetch(from + n + i);
        auto e = wide.error(load<V>(from + i));
        auto bin = wide(e.code) * kCopies;
        store(errors + i, e.squared);
        std::memcpy(at + i, &bin, sizeof(bin));
      }
      for (; i < size; ++i) {
        auto e = narrow.error(widen(from[i]));
        errors[i] = e.squared, at[i] = narrow(e.code) * kCopies;
      }
      for (i = 0; i + kCopies <= size; i += kCopies)
        for (int j = 0; j < kCopies; ++j) sums[at[i + j] + j] += Pair<A>{1, errors[i + j]};
      for (; i < size; ++i) sums[at[i]] += Pair<A>{1, errors[i]};
    }
    for (int b = 0; b < bins; ++b) {
      Pair<A> total = {};
      for (int j = 0; j < kCopies; ++j) total += sums[b * kCopies + j];
      state[b] = total[0], state[bins + b] = total[1];
    }
  }

  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool, A* state) {
    A *const errors = state + (1 << c.bits), *const end = errors + (1 << c.bits);
    ErrorUnit<A> unit(c.first);
    do sums(w, n, c, unit.inverse, state);
    while (unit.widen(*std::max_element(errors, end)));
    *end = unit.unit;
  }
};

// The numbers of a table at these places.
template <class V>
struct CountTable {
  using A = typename Lane<V>::A;
  using Index = typename Lane<V>::bits;
  const A* numbers;
#if defined(__AVX512F__)
  __m512 row;
  bool short_;
#endif

  CountTable(const A* table, int size) : numbers(table) {
#if defined(__AVX512F__)
    short_ = sizeof(A) == 4 && size <= 16;
    if constexpr (sizeof(A) == 4) row = _mm512_maskz_loadu_ps(__mmask16(size < 16 ? (1 << size) - 1 : 0xffff), numbers);
#endif
    (void)size;
  }
  R2_HD V operator[](Index at) const {
    if constexpr (sizeof(V) == sizeof(A)) {
      return numbers[at];
    } else {
#if defined(__AVX512F__)
      if constexpr (sizeof(A) == 4)
        return bit_cast<V>(short_ ? _mm512_permutexvar_ps(bit_cast<__m512i>(at), row)
                                  : _mm512_i32gather_ps(bit_cast<__m512i>(at), numbers, 4));
#elif defined(__AVX2__)
      if constexpr (sizeof(A) == 4) return bit_cast<V>(_mm256_i32gather_ps(numbers, bit_cast<__m256i>(at), 4));
#endif
      V v;
      for (int i = 0; i < lanes<V>; ++i) v[i] = numbers[at[i]];
      return v;
    }
  }
};

// 2 / count (w - q); `saved` are the counts.
template <class V>
struct BinRegGradient {
  Binner<V> binner;
  CountTable<V> counts;
  V twice;
  template <class A>
  BinRegGradient(double grad, Column c, const A* saved)
      : binner(c.first, c.bits, 1), counts(saved, 1 << c.bits), twice(splat<V>(A(2 * grad))) {}
  R2_HD V operator()(V w) const {
    V code = binner.coder(w);
    return twice / counts[binner(code)] * (w - binner.coder.step * code);
  }
};

}  // namespace R2_ISA
}  // namespace r2
