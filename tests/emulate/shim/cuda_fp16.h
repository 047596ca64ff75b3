#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t x;
  __half() = default;
  __half(float from);
};
inline float __half2float(__half w) {
  const uint32_t sign = uint32_t(w.x & 0x8000) << 16, size = w.x & 0x7fff;
  const float subnormal = float(size) * 0x1p-24f;
  return emulate::bits<float>(sign | (size >= 0x7c00  ? 0x7f800000 | (size & 0x3ff) << 13
                                      : size >= 0x400 ? (size << 13) + 0x38000000
                                                      : emulate::bits<uint32_t>(subnormal)));
}
inline __half::__half(float from) {
  const uint32_t given = emulate::bits<uint32_t>(from), size = given & 0x7fffffff;
  const uint32_t sum =
      emulate::bits<uint32_t>(fabsf(from) + 0.5f);  // rounds to multiples of the least subnormal number
  x = uint16_t(given >> 16 & 0x8000) |
      uint16_t(size > 0x7f800000    ? 0x7fff
               : size >= 0x477ff000 ? 0x7c00
               : size >= 0x38800000 ? (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13
                                    : sum - 0x3f000000);
}
inline __half __float2half_rn(float from) { return from; }
