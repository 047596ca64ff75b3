// Where the numbers lie that a thread reads and writes. A place is a unit: as many numbers as 128 bits hold, or one. A
// thread has the units first(), first() + step(), ... of `units`; at(base, i, u) is where unit i + u * step() lies in
// the memory whose first unit lies at `base`: for u known to the compiler at an immediate offset, or one
// multiplication from there.
#pragma once
#include "numbers.cuh"

namespace r2::cuda {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // 128-bit loads of a thread

// Loads of a thread at a time, of units of so many numbers: 64 bytes in all, but of 16-bit numbers one by one 32.
template <class T, int unit>
constexpr int kLoads = unit == 1 ? 64 / (sizeof(T) < 4 ? 4 : int(sizeof(T))) : kInFlight;

// p and so many times so many bytes, in one instruction: a factor that the compiler had widened before would make more.
template <class T>
__device__ __forceinline__ T* farther(T* p, uint32_t times, uint32_t bytes) {
  asm volatile("" : "+r"(bytes));
  using Bytes = std::conditional_t<std::is_const<T>::value, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Bytes*>(p) + uint64_t(times) * bytes);
}

// Units one behind the other.
template <int unit>
struct Dense {
  __device__ int first() const { return threadIdx.x; }
  __device__ constexpr int step() const { return kThreads; }
  template <class T>
  __device__ __forceinline__ T* at(T* base, int i, int u) const {
    return base + i * unit + u * kThreads * unit;
  }
};

// Units in runs apart. Divides by a multiplication that is right for all that is `kept`: of the reciprocals next below
// and above one errs by half a run of units at most, and no thread asks for unit 2^17.
template <int unit>
struct Runs {
  uint32_t from, inverse, wrap;  // how far the first unit is in its run; 2^32 / units of a run; bytes between two runs

  // Begins `within` a run, and after each there are so many elements of others.
  __device__ Runs(int64_t within, int64_t run, int64_t others, int size) : wrap(uint32_t(others * size)) {
    within /= unit, run /= unit;
    if (run <= kMost) {
      const uint64_t above = uint64_t(UINT32_MAX / uint32_t(run)) + 1;
      const bool is_nearer = run > 1 && int64_t(above * run - (uint64_t(1) << 32)) <= run / 2;
      from = uint32_t(is_nearer ? within : within + 1), inverse = uint32_t(is_nearer ? above : above - 1);
    } else {  // ends once at most, which takes it past 2^31
      const int64_t ahead = run - within;
      from = uint32_t((int64_t(1) << 31) - ahead), inverse = ahead < int64_t(1) << 31 ? 2 : 0;
    }
  }
  static constexpr int kMost = 65536;
  static __device__ bool kept(int64_t n, int64_t others, int size) { return n <= kMost && others * size <= UINT32_MAX; }

  __device__ int first() const { return threadIdx.x; }
  __device__ constexpr int step() const { return kThreads; }
  template <class T>
  __device__ __forceinline__ T* at(T* base, int i, int u) const {
    return farther(base + i * unit, __umulhi(from + i + u * kThreads, inverse), wrap) + u * kThreads * unit;
  }
};

// Rows of columns that alternate in memory: a thread has one of `columns` columns that lie side by side, out of d.
struct Interleaved {
  int row, rows;         // of the thread, and of the block at a time
  int64_t bytes, steps;  // from row to row, and to the next one of the thread

  __device__ Interleaved(int columns, int64_t d, int size)
      : row(threadIdx.x / columns), rows(kThreads / columns), bytes(d * size), steps(rows * bytes) {}

  // those too many have nothing to do
  __device__ int first() const { return row < rows ? row : INT32_MAX / 2; }
  __device__ int step() const { return rows; }
  template <class T>
  __device__ __forceinline__ T* at(T* base, int i, int u) const {
    using Bytes = std::conditional_t<std::is_const<T>::value, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Bytes*>(base) + i * bytes + u * steps);
  }
};

}  // namespace r2::cuda
