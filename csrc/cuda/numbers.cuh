// Weights as a GPU reads and writes them: one at a time, or packed in 128 bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../arithmetic.h"

namespace r2::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

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

__device__ __forceinline__ double widen(double w) { return w; }
__device__ __forceinline__ float widen(float w) { return w; }
__device__ __forceinline__ float widen(bf16 w) { return __bfloat162float(w); }
__device__ __forceinline__ float widen(f16 w) { return __half2float(w); }

__device__ __forceinline__ void narrow(double x, double& w) { w = x; }
__device__ __forceinline__ void narrow(float x, float& w) { w = x; }
__device__ __forceinline__ void narrow(float x, bf16& w) { w = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, f16& w) { w = __float2half_rn(x); }

constexpr int kPackBytes = 16;
template <class T>
constexpr int kPack = kPackBytes / sizeof(T);

// As many numbers as one access moves: 128 bits, or one number.
template <class T, int n = kPack<T>>
union Pack {
  using Bits = std::conditional_t<n == 1, T, uint4>;
  Bits bits;
  T number[n];
  __device__ Pack() {}
  __device__ explicit Pack(Bits from) : bits(from) {}

  static __device__ __forceinline__ Pack read(const T* p) { return Pack(__ldg(reinterpret_cast<const Bits*>(p))); }
  static __device__ __forceinline__ Pack reread(const T* p) { return Pack(__ldcg(reinterpret_cast<const Bits*>(p))); }
  __device__ __forceinline__ void write(T* p) const { __stwb(reinterpret_cast<Bits*>(p), bits); }
};

template <class T>
__device__ __forceinline__ void write_one(Acc<T> x, T* p) {
  Pack<T, 1> made;
  narrow(x, made.number[0]);
  made.write(p);
}

// Packs that lie so many of them apart.
template <class T, int n>
__device__ __forceinline__ void write_packs(const Acc<T> (&x)[n], uint4* to, int apart) {
  constexpr int pack = kPack<T>;
#pragma unroll
  for (int u = 0; u < n / pack; ++u) {
    Pack<T> made;
#pragma unroll
    for (int j = 0; j < pack; ++j) narrow(x[u * pack + j], made.number[j]);
    __stwb(to + u * apart, made.bits);
  }
}

// How many numbers lie before the first 16-byte boundary.
template <class T>
__device__ __forceinline__ int before_boundary(const T* p) {
  return int(-reinterpret_cast<uintptr_t>(p) % kPackBytes / sizeof(T));
}

// Computed before what follows: a compiler that puts a sum off until after a branch keeps its terms in registers.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void pin(double& x) { asm volatile("" : "+d"(x)); }
// Or a compiler adds up anew, for every access, all that a pointer was made of.
template <class T>
__device__ __forceinline__ void pin(T*& p) {
  asm volatile("" : "+l"(p));
}

// A NaN in either comes out.
__device__ __forceinline__ float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a >= b || a != a ? a : b;
#endif
}
__device__ __forceinline__ double max_nan(double a, double b) { return a >= b || a != a ? a : b; }
template <class A>
__device__ __forceinline__ A min_nan(A a, A b) {
  return -max_nan(-a, -b);
}

}  // namespace r2::cuda
