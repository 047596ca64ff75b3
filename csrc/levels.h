// LSQ's codes of msqe and bin_reg, for host and device; V as in losses.h.
#pragma once
#include "arithmetic.h"

namespace r2 {
inline namespace R2_ISA {

// Codes run from -low to high; those of one signed bit are -1 and 1.
struct Levels {
  int low, high;
  bool sign;
  R2_HD Levels(int bits, bool is_signed)
      : low(!is_signed  ? 0
            : bits == 1 ? 1
                        : 1 << (bits - 1)),
        high(!is_signed  ? (1 << bits) - 1
             : bits == 1 ? 1
                         : (1 << (bits - 1)) - 1),
        sign(is_signed && bits == 1) {}
};

// Adding it to a number below 2^22 (2^51) rounds that to an integer, half to even, in the lowest bits.
template <class A>
constexpr A kRound = sizeof(A) == 4 ? A(12582912) : A(6755399441055744);

// A NaN stays.
template <class V>
R2_HD V clip_(V v, V low, V high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<V, float>::value) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
    return v;
  }
#endif
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Codes for one step size; NaN where w is, or where the step is not positive.
template <class V>
struct Coder {
  using A = typename Scalar<V>::type;
  V step, low, high;
  bool sign;

  R2_HD Coder(double step, int bits, bool is_signed) : Coder(step, Levels(bits, is_signed)) {}
  R2_HD Coder(double size, Levels levels)
      : step(splat<V>(size > 0 ? A(size) : A(NAN))), low(splat<V>(A(-levels.low))), high(splat<V>(A(levels.high))),
        sign(levels.sign) {}

  R2_HD V operator()(V w) const {
    V v = w / step;
    if (sign) return v < splat<V>(0) ? low : v >= splat<V>(0) ? high : v;
    return (clip_(v, low, high) + kRound<A>)-kRound<A>;
  }
};

}  // namespace R2_ISA
}  // namespace r2
