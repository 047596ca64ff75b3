// Rounding half to even, of vectors and numbers; NaN and the sign of 0 stay. Not by adding and taking away a large
// number where a compiler might fuse that with a product before it.
#pragma once
#include "simd.h"

namespace r2 {
inline namespace R2_ISA {

R2_HD float rint_(float x) { return __builtin_rintf(x); }
R2_HD double rint_(double x) { return __builtin_rint(x); }

template <class V, class = std::enable_if_t<!std::is_arithmetic<V>::value>>
R2_HD V rint_(V x) {
  [[maybe_unused]] constexpr bool single = sizeof(typename Lane<V>::A) == 4;
#if defined(__AVX512F__)
  if constexpr (single)
    return bit_cast<V>(_mm512_roundscale_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
  else
    return bit_cast<V>(_mm512_roundscale_pd(bit_cast<__m512d>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  if constexpr (single)
    return bit_cast<V>(_mm256_round_ps(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  else
    return bit_cast<V>(_mm256_round_pd(bit_cast<__m256d>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__SSE2__) && !defined(__FMA__)
  constexpr typename Lane<V>::A whole = single ? 8388608.0 : 4503599627370496.0;
  V a = abs_(x), r = (a + whole) - whole;
  r = a < splat<V>(whole) ? r : a;
  using bits = typename Lane<V>::bits;
  return bit_cast<V>(bit_cast<bits>(r) | (bit_cast<bits>(x) ^ bit_cast<bits>(a)));
#else
  V r;
  for (int i = 0; i < lanes<V>; ++i) r[i] = rint_(x[i]);
  return r;
#endif
}

}  // namespace R2_ISA
}  // namespace r2
