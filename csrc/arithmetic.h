// What the formulas are written in: R2_HD, splat, and the functions of a single number.
#pragma once
#include <cmath>
#include <type_traits>
#include <utility>

#include "contract.h"

#if defined(__CUDACC__)
#define R2_HD __host__ __device__ __forceinline__
#else
#define R2_HD inline __attribute__((always_inline))
#endif

// The host's kernels are compiled once for each instruction set; each, and the device's, keeps its own copy of what is
// inlined.
#if defined(__CUDACC__)
#define R2_ISA device
#elif !defined(R2_ISA)
#define R2_ISA portable
#endif

namespace r2 {
inline namespace R2_ISA {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class V>
struct Scalar {
  using type = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
};
template <>
struct Scalar<float> {
  using type = float;
};
template <>
struct Scalar<double> {
  using type = double;
};

template <class V>
R2_HD V splat(typename Scalar<V>::type a) {
  return V{} + a;
}

R2_HD float abs_(float x) { return fabsf(x); }
R2_HD double abs_(double x) { return fabs(x); }
R2_HD double exp2_(double x) { return exp2(x); }
#if defined(__CUDACC__)
// exponents need no bound: powers below the normal numbers are 0
R2_HD float bounded_(float x) { return x; }
R2_HD double bounded_(double x) { return x; }
// one instruction, accurate to 2 ulp
R2_HD float exp2_(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
#endif

}  // namespace R2_ISA
}  // namespace r2
