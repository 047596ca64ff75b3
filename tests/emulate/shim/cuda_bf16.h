#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float from);
};
inline float __bfloat162float(__nv_bfloat16 w) { return emulate::bits<float>(uint32_t(w.x) << 16); }
inline __nv_bfloat16::__nv_bfloat16(float from) {
  const uint32_t given = emulate::bits<uint32_t>(from);
  x = from != from ? 0x7fff : uint16_t((given + 0x7fff + (given >> 16 & 1)) >> 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float from) { return from; }
