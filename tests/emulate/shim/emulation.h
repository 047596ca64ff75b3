// Kernels on the host: the threads of a block are fibers of one thread of the machine, blocks run one after the other.
// A warp runs until all its lanes wait or have ended, then the next one does: in rising order, or in falling order.
// What a real card would not allow, or leave to chance, ends the launch with an error that names its place.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace emulate {

// As a default argument: where the function is called.
struct Place {
  const char* file;
  int line;
  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch; only within a kernel.
[[noreturn]] void fail(Place place, const std::string& what);

// All threads of a block meet; `vote` is counted over them.
int meet_block(Place place, bool vote);
// The lanes of `mask` meet, each with a number; `numbers` has those of all lanes then.
const uint64_t* meet_warp(Place place, uint32_t mask, uint64_t number);
int lane();

// Shared memory of the block: full of NaN at its start, with guards on both sides.
void* shared_of(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();

template <class T, size_t alignment = alignof(T), class Site>
T& shared(Site) {
  static const char key = 0;
  return *static_cast<T*>(shared_of(&key, sizeof(T), alignment > alignof(T) ? alignment : alignof(T)));
}

struct Shape {
  int64_t blocks;
  int threads;
  size_t dynamic;
};
void run(const void* kernel, const Shape& shape, const std::function<void()>& thread);

// kernel<<<blocks, threads, dynamic, stream>>>(arguments...), as translate.py writes it
template <class... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  Shape shape;

  template <class Stream>
  Launch(void (*kernel)(Parameters...), unsigned blocks, int threads, size_t dynamic, Stream)
      : kernel(kernel), shape{blocks, threads, dynamic} {}
  void operator()(Parameters... arguments) const {
    run(reinterpret_cast<const void*>(kernel), shape, [&] { kernel(arguments...); });
  }
};

template <class T>
T exchanged(Place place, uint32_t mask, T mine, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t number = 0;
  memcpy(&number, &mine, sizeof(T));
  const uint64_t* numbers = meet_warp(place, mask, number);
  if (!(mask >> from & 1)) fail(place, "a lane reads of one that is not in the mask");
  memcpy(&mine, numbers + from, sizeof(T));
  return mine;
}

}  // namespace emulate
