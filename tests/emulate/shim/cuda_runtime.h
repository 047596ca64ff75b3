// What the kernels use of CUDA, on the host. Approximate instructions are exact here but for what they flush to 0 and
// the bits that they never give.
#pragma once
#include <math.h>

#include <new>
#include <type_traits>

#include "emulation.h"

#define __CUDACC__
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_LIST__ 900
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

// The machine: one GPU of compute capability 9.0.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // of what the kernel has used so far
  int maxDynamicSharedSizeBytes, maxThreadsPerBlock, numRegs;
};
using cudaStream_t = struct Stream*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
enum { cudaEnableDefault };
enum cudaDriverEntryPointQueryResult {};
inline cudaError_t cudaGetDriverEntryPoint(const char*, void**, int, cudaDriverEntryPointQueryResult*) {
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
namespace emulate {
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute which, int value);
cudaError_t get_attributes(cudaFuncAttributes* found, const void* kernel);
}  // namespace emulate
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute which, int value) {
  return emulate::set_attribute(reinterpret_cast<const void*>(kernel), which, value);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel* kernel) {
  return emulate::get_attributes(found, reinterpret_cast<const void*>(kernel));
}

// Meeting points.
inline void __syncthreads(emulate::Place at = emulate::Place::here()) { emulate::meet_block(at, false); }
inline int __syncthreads_or(int vote, emulate::Place at = emulate::Place::here()) {
  return emulate::meet_block(at, vote) > 0;
}
inline int __syncthreads_count(int vote, emulate::Place at = emulate::Place::here()) {
  return emulate::meet_block(at, vote);
}
inline int __syncthreads_and(int vote, emulate::Place at = emulate::Place::here()) {
  return emulate::meet_block(at, !vote) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, emulate::Place at = emulate::Place::here()) {
  emulate::meet_warp(at, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int vote, emulate::Place at = emulate::Place::here()) {
  const uint64_t* votes = emulate::meet_warp(at, mask, vote != 0);
  unsigned all = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) all |= unsigned(votes[i]) << i;
  return all;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x, emulate::Place at = emulate::Place::here()) {
  const uint64_t* given = emulate::meet_warp(at, mask, x);
  unsigned all = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) all |= unsigned(given[i]);
  return all;
}
inline int __any_sync(unsigned mask, int vote, emulate::Place at = emulate::Place::here()) {
  return __ballot_sync(mask, vote, at) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulate::Place at = emulate::Place::here()) {
  return __ballot_sync(mask, !vote, at) == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, emulate::Place at = emulate::Place::here()) {
  return emulate::exchanged(at, mask, x, (emulate::lane() & ~(width - 1)) + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32, emulate::Place at = emulate::Place::here()) {
  const int me = emulate::lane(), from = me ^ by;
  return emulate::exchanged(at, mask, x, from / width > me / width ? me : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, emulate::Place at = emulate::Place::here()) {
  const int me = emulate::lane(), within = me & (width - 1);
  return emulate::exchanged(at, mask, x, within >= int(by) ? me - int(by) : me);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, emulate::Place at = emulate::Place::here()) {
  const int me = emulate::lane(), within = me & (width - 1);
  return emulate::exchanged(at, mask, x, within + int(by) < width ? me + int(by) : me);
}

// Memory.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stwb(T* p, T x) {
  *p = x;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
template <class T, class X>
T atomicAdd(T* p, X x) {
  T old = *p;
  *p = old + T(x);
  return old;
}
template <class T, class X>
T atomicMax(T* p, X x) {
  T old = *p;
  if (T(x) > old) *p = T(x);
  return old;
}
template <class T, class X>
T atomicMin(T* p, X x) {
  T old = *p;
  if (T(x) < old) *p = T(x);
  return old;
}
template <class T, class X>
T atomicExch(T* p, X x) {
  T old = *p;
  *p = T(x);
  return old;
}

// Numbers.
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}

namespace emulate {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
// what is not to be merged with an addition that follows
template <class A>
A alone(A x) {
  volatile A kept = x;
  return kept;
}
// PTX, by the name of the instruction
inline void max_NaN_f32(float& d, float a, float b) { d = a != a || b != b ? NAN : fmaxf(a, b); }
inline void min_NaN_f32(float& d, float a, float b) { d = a != a || b != b ? NAN : fminf(a, b); }
inline void ex2_approx_ftz_f32(float& d, float a) { d = flushed(exp2f(flushed(a))); }
inline void rcp_approx_ftz_f32(float& d, float a) { d = flushed(1 / flushed(a)); }
inline void sqrt_approx_ftz_f32(float& d, float a) { d = flushed(sqrtf(flushed(a))); }
inline void rcp_approx_ftz_f64(double& d, double a) {
  a = fabs(a) < 0x1p-1022 ? copysign(0, a) : a;
  const double y = bits<double>(bits<uint64_t>(1 / a) & ~uint64_t(0xffffffff));  // the upper word
  d = fabs(y) < 0x1p-1022 ? copysign(0, y) : y;
}
inline void prefetch_global_L2(const void*) {}
}  // namespace emulate

inline unsigned __float_as_uint(float x) { return emulate::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulate::bits<int>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __uint_as_float(unsigned x) { return emulate::bits<float>(x); }
inline float __int_as_float(int x) { return emulate::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulate::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulate::bits<double>(x); }
inline int __double2loint(double x) { return int(emulate::bits<uint64_t>(x)); }
inline int __double2hiint(double x) { return int(emulate::bits<uint64_t>(x) >> 32); }
inline float __saturatef(float x) { return x >= 1 ? 1 : x > 0 ? x : 0; }
inline float __fdividef(float a, float b) {
  return fabsf(b) > 0x1p126f && fabsf(b) < INFINITY ? (fabsf(a) == INFINITY ? NAN : copysignf(0, a) * copysignf(1, b))
                                                    : emulate::flushed(emulate::flushed(a) / emulate::flushed(b));
}
inline float __fadd_rn(float a, float b) { return emulate::alone(a + b); }
inline float __fmul_rn(float a, float b) { return emulate::alone(a * b); }
inline double __dadd_rn(double a, double b) { return emulate::alone(a + b); }
inline double __dmul_rn(double a, double b) { return emulate::alone(a * b); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
