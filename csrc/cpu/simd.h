// Vectors of the accumulator as GCC and Clang have them, one native register wide; 16-bit weights are widened as they
// are loaded.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../arithmetic.h"

namespace r2 {
inline namespace R2_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t bits __attribute__((vector_size(kBytes)));
  typedef uint32_t words __attribute__((vector_size(kBytes)));
  typedef uint16_t half __attribute__((vector_size(kBytes / 2)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t bits __attribute__((vector_size(kBytes)));
  typedef uint64_t words __attribute__((vector_size(kBytes)));
};
template <class A>
using Vec = typename Vector<A>::type;

template <class V>
constexpr int lanes = sizeof(V) / sizeof(typename Scalar<V>::type);

template <class To, class From>
R2_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 2^e next above x, within limits: divided by it, squares neither overflow nor vanish.
inline double power_above(double x, int limit) {
  int e;
  std::frexp(x, &e);
  return std::ldexp(1, e < -limit ? -limit : e > limit ? limit : e);
}

// float or double, or vectors of them, with signed and unsigned integers of the same shape
template <class V>
struct Lane;
template <>
struct Lane<float> {
  using A = float;
  using bits = int32_t;
  using words = uint32_t;
};
template <>
struct Lane<double> {
  using A = double;
  using bits = int64_t;
  using words = uint64_t;
};
template <>
struct Lane<Vec<float>> {
  using A = float;
  using bits = Vector<float>::bits;
  using words = Vector<float>::words;
};
template <>
struct Lane<Vec<double>> {
  using A = double;
  using bits = Vector<double>::bits;
  using words = Vector<double>::words;
};

template <class V, class = std::enable_if_t<!std::is_arithmetic<V>::value>>
R2_HD V abs_(V x) {
  using bits = typename Lane<V>::bits;
  constexpr auto most = sizeof(typename Lane<V>::A) == 4 ? INT32_MAX : INT64_MAX;
  return bit_cast<V>(bit_cast<bits>(x) & (bits{} + static_cast<std::remove_reference_t<decltype(bits{}[0])>>(most)));
}

// max(x, least), NaN where x is
template <class V>
R2_HD V at_least(V x, V least) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<V, Vec<float>>::value)
    return bit_cast<V>(_mm512_max_ps(bit_cast<__m512>(least), bit_cast<__m512>(x)));
  if constexpr (std::is_same<V, Vec<double>>::value)
    return bit_cast<V>(_mm512_max_pd(bit_cast<__m512d>(least), bit_cast<__m512d>(x)));
#endif
  return x < least ? least : x;
}

// Minimax polynomials of 2^f for |f| <= 1/2, highest power first: relative error 2e-9, 3e-18.
template <class A>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int degree = 6, mantissa = 23;
  static constexpr float least = -125,
                         round = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, in the lowest bits
  static constexpr float c[degree + 1] = {
      1.534581216e-4f, 1.339993118e-3f, 9.618488956e-3f, 5.550328777e-2f, 2.402264689e-1f, 6.931472057e-1f, 1.0f};
};
template <>
struct Exp2<double> {
  static constexpr int degree = 11, mantissa = 52;
  static constexpr double least = -1021, round = 6755399441055744.0;
  static constexpr double c[degree + 1] = {4.43528270695727715e-10, 7.0741056135081428e-9,  1.01781980216719308e-7,
                                           1.32154330896763992e-6,  1.52527334899885256e-5, 1.54035304625144321e-4,
                                           1.33335581467899217e-3,  9.61812910758833524e-3, 5.55041086648199216e-2,
                                           2.40226506959101562e-1,  6.9314718055994533e-1,  1.0};
};

// Powers begin, begin + 2, ... of the polynomial (or all, with stride 1), in x.
template <int kFrom, int kStride, class V>
R2_HD V horner(V x) {
  using E = Exp2<typename Lane<V>::A>;
  V p = splat<V>(E::c[kFrom]);
  for (int i = kFrom + kStride; i <= E::degree; i += kStride) p = p * x + E::c[i];
  return p;
}

// An exponent whose power of two is a normal number; below, delta^n 2^delta is as good as 0.
template <class V>
R2_HD V bounded(V x) {
  return at_least(x, splat<V>(Exp2<typename Lane<V>::A>::least));
}

// The integer of a number to which Exp2::round was added, where a number has its exponent; unsigned, for a negative one
// must not be shifted
template <class V>
R2_HD auto exponent(V shifted) {
  return bit_cast<typename Lane<V>::words>(shifted) << Exp2<typename Lane<V>::A>::mantissa;
}

// x 2^k for such a number of k
template <class V>
R2_HD V scaled(V x, V shifted) {
  return bit_cast<V>(bit_cast<typename Lane<V>::words>(x) + exponent(shifted));
}

// 2^x for bounded x <= 126 (1022)
template <class V>
R2_HD V exp2_fast(V x) {
  using E = Exp2<typename Lane<V>::A>;
  V shifted = x + E::round, f = x - (shifted - E::round);
  return scaled(horner<0, 1>(f), shifted);
}

// 2^y and 2^-y for |y| < 120 (1000), from one reduction and one polynomial: its even and odd halves
template <class V>
struct Exp2Pair {
  V up, down;
  R2_HD explicit Exp2Pair(V y) {
    using E = Exp2<typename Lane<V>::A>;
    V shifted = y + E::round, f = y - (shifted - E::round), square = f * f;
    V even = horner<E::degree % 2, 2>(square), odd = horner<1 - E::degree % 2, 2>(square) * f;
    up = scaled(even + odd, shifted);
    down = bit_cast<V>(bit_cast<typename Lane<V>::words>(even - odd) - exponent(shifted));
  }
};

R2_HD float bounded_(float x) { return bounded(x); }
R2_HD double bounded_(double x) { return bounded(x); }
R2_HD Vec<float> bounded_(Vec<float> x) { return bounded(x); }
R2_HD Vec<double> bounded_(Vec<double> x) { return bounded(x); }
R2_HD float exp2_(float x) { return exp2_fast(x); }
R2_HD Vec<float> exp2_(Vec<float> x) { return exp2_fast(x); }
R2_HD Vec<double> exp2_(Vec<double> x) { return exp2_fast(x); }

R2_HD float widen(bf16 w) { return bit_cast<float>(uint32_t(w.bits) << 16); }
R2_HD float widen(f16 w) {
  // exponent moved by a multiplication, which also normalises subnormals; infinities and NaN come out above 2^16
  float x = bit_cast<float>(uint32_t(w.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(x) | (x >= 65536.0f ? 0x7f800000u : 0u) | uint32_t(w.bits & 0x8000) << 16;
  return bit_cast<float>(bits);
}
R2_HD float widen(float w) { return w; }
R2_HD double widen(double w) { return w; }

// to nearest, ties to even; NaN stays NaN
template <class T>
R2_HD T narrow(Acc<T> x);
template <>
R2_HD float narrow<float>(float x) {
  return x;
}
template <>
R2_HD double narrow<double>(double x) {
  return x;
}
template <>
R2_HD bf16 narrow<bf16>(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  return {uint16_t(x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0)};
}
template <>
R2_HD f16 narrow<f16>(float x) {
  uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u >= 0x47800000) return {uint16_t(sign | (u > 0x7f800000 ? 0x7e00 : 0x7c00))};
  if (u < 0x38800000)
    return {uint16_t(
        sign | (bit_cast<uint32_t>(bit_cast<float>(u) + 0.5f) - 0x3f000000))};  // subnormal: rounded by the addition
  return {uint16_t(sign | ((u + 0xc8000fff + (u >> 13 & 1)) >> 13))};
}

template <class V, class T>
R2_HD V load(const T* p) {
  if constexpr (sizeof(V) == sizeof(typename Lane<V>::A)) {
    return widen(*p);
  } else if constexpr (std::is_same<T, bf16>::value) {
    Vector<float>::half half;
    std::memcpy(&half, p, sizeof(half));
    return bit_cast<V>(__builtin_convertvector(half, Vector<float>::words) << 16);
  } else if constexpr (std::is_same<T, f16>::value) {
#if defined(__AVX512F__)
    return bit_cast<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return bit_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    V v;
    for (int i = 0; i < lanes<V>; ++i) v[i] = widen(p[i]);
    return v;
#endif
  } else {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class V, class T>
R2_HD void store(T* p, V v) {
  if constexpr (sizeof(V) == sizeof(typename Lane<V>::A)) {
    *p = narrow<T>(v);
  } else if constexpr (std::is_same<T, bf16>::value) {
    auto u = bit_cast<Vector<float>::bits>(v);
    auto rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    auto half = __builtin_convertvector(v == v ? rounded : rounded - rounded + 0x7fc0, Vector<float>::half);
    std::memcpy(p, &half, sizeof(half));
  } else if constexpr (std::is_same<T, f16>::value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < lanes<V>; ++i) p[i] = narrow<T>(v[i]);
#endif
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// run(a number of the dtype)
template <class Run>
void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::f64: return run(double{});
    case Dtype::f32: return run(float{});
    case Dtype::bf16: return run(bf16{});
    case Dtype::f16: return run(f16{});
  }
}

// The lanes of v as numbers of type R, two by two: a chain of log2(lanes) steps.
template <class R, class V, class F>
R2_HD R fold(V v, F f) {
  R r[lanes<V>];
  for (int i = 0; i < lanes<V>; ++i) r[i] = v[i];
  for (int half = lanes<V> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) r[i] = f(r[i], r[i + half]);
  return r[0];
}
template <class V>
R2_HD double sum(V v) {
  return fold<double>(v, [](double a, double b) { return a + b; });
}

}  // namespace R2_ISA
}  // namespace r2
