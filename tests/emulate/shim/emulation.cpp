#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {
namespace {

constexpr size_t kStack = 256 * 1024, kPage = 4096, kGuard = 256;
constexpr size_t kPlain = 48 * 1024, kOptIn = 227 * 1024, kArena = 1024 * 1024;
constexpr int kMostThreads = 1024;
constexpr unsigned char kGarbage = 0xff, kGuarded = 0xa5;  // garbage: NaN, or -1

enum class State { ready, at_block, at_warp, ended };

struct Thread {
  ucontext_t begin;
  jmp_buf here;
  char* stack = nullptr;
  bool started = false;
  State state;
  Place place;
  uint32_t mask;
  uint64_t given;
};

struct Piece {
  const void* key;
  size_t begin, bytes;
};

struct Kernel {
  size_t fixed = 0, most_dynamic = kPlain;
  bool opted_in = false;
};

std::mutex one_launch;
bool reversed = false;
std::map<const void*, Kernel> kernels;
std::string error;  // of the last launch

// of the launch that is under way
Thread threads[kMostThreads];
int count, current = -1;
const std::function<void()>* body;
jmp_buf scheduler;
int votes, counted;
uint64_t exchange[kMostThreads];

alignas(4096) unsigned char arena[kArena];
size_t used, dynamic_at;
std::vector<Piece> pieces;

std::string at(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

// Back in the thread that called it when it is given the turn again.
__attribute__((noinline)) void give_up() {
  if (_setjmp(threads[current].here) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*body)();
    threads[current].state = State::ended;
    give_up();
  }
}

__attribute__((noinline)) void give_turn(int i) {
  Thread& thread = threads[i];
  current = i, threadIdx.x = i;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.here, 1);
    if (!thread.stack) {
      void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, kPage, PROT_NONE);
      thread.stack = static_cast<char*>(memory) + kPage;
    }
    getcontext(&thread.begin);
    thread.begin.uc_stack.ss_sp = thread.stack, thread.begin.uc_stack.ss_size = kStack, thread.begin.uc_link = nullptr;
    makecontext(&thread.begin, live, 0);
    thread.started = true;
    setcontext(&thread.begin);
  }
  current = -1;
}

int in_order(int i, int n) { return reversed ? n - 1 - i : i; }

// Lets lanes go on that all others of their mask have met.
bool release_warp(int first, int lanes) {
  bool any = false;
  for (int i = first; i < first + lanes; ++i) {
    const Thread& one = threads[i];
    if (one.state != State::at_warp) continue;
    auto meets = [&](int j) {
      const Thread& other = threads[j];
      return !(one.mask >> (j - first) & 1) ||
             (other.state == State::at_warp && other.mask == one.mask && other.place.line == one.place.line &&
              !strcmp(other.place.file, one.place.file));
    };
    bool all = true;
    for (int j = first; j < first + lanes && all; ++j) all = meets(j);
    if (!all) continue;
    const uint32_t mask = one.mask;
    for (int j = first; j < first + lanes; ++j)
      if (mask >> (j - first) & 1) exchange[j] = threads[j].given, threads[j].state = State::ready;
    any = true;
  }
  return any;
}

void run_warp(int first) {
  const int lanes = std::min(32, count - first);
  do {
    for (int i = 0; i < lanes; ++i) {
      const int me = first + in_order(i, lanes);
      if (threads[me].state == State::ready) give_turn(me);
      if (!error.empty()) return;
    }
  } while (release_warp(first, lanes));
}

std::string standing() {
  std::map<std::string, std::pair<int, int>> groups;  // where -> how many, the first of them
  for (int i = 0; i < count; ++i) {
    const Thread& one = threads[i];
    std::string where = one.state == State::ended      ? "ended"
                        : one.state == State::at_block ? "at the block's meeting point " + at(one.place)
                                                       : "at the warp's meeting point " + at(one.place);
    auto found = groups.emplace(where, std::make_pair(0, i)).first;
    ++found->second.first;
  }
  std::string all;
  for (auto& [where, group] : groups)
    all += "; " + std::to_string(group.first) + " threads, from " + std::to_string(group.second) + " on, " + where;
  return all;
}

// Whether the block goes on: all threads wait at the same place.
bool release_block() {
  int ended = 0;
  for (int i = 0; i < count; ++i) ended += threads[i].state == State::ended;
  if (ended == count) return false;
  for (int i = 0; i < count; ++i) {
    const Thread &one = threads[i], &first = threads[0];
    if (one.state != State::at_block || one.place.line != first.place.line ||
        strcmp(one.place.file, first.place.file)) {
      error = "the threads of a block do not meet" + standing();
      return false;
    }
  }
  counted = votes, votes = 0;
  for (int i = 0; i < count; ++i) threads[i].state = State::ready;
  return true;
}

size_t add_piece(const void* key, size_t bytes, size_t alignment) {
  size_t begin = used + kGuard;
  // aligned as it asks, and no better
  begin = (begin + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  if (begin + bytes + kGuard > kArena) return 0;
  memset(arena + used, kGuarded, begin - used);
  memset(arena + begin, kGarbage, bytes);
  memset(arena + begin + bytes, kGuarded, kGuard);
  used = begin + bytes;
  pieces.push_back({key, begin, bytes});
  return begin;
}

void check_guards() {
  size_t from = 0;
  for (const Piece& piece : pieces) {
    for (size_t i = from; i < piece.begin; ++i)
      if (arena[i] != kGuarded) error = "a block wrote in front of an array in shared memory, or behind one";
    from = piece.begin + piece.bytes;
  }
  for (size_t i = from; i < from + kGuard; ++i)
    if (arena[i] != kGuarded) error = "a block wrote behind an array in shared memory";
}

void run_block(Kernel& kernel, const Shape& shape) {
  used = 0, pieces.clear(), votes = 0;
  dynamic_at = add_piece(nullptr, shape.dynamic, 16);
  for (int i = 0; i < count; ++i) threads[i].state = State::ready;
  do {
    const int warps = (count + 31) / 32;
    for (int w = 0; w < warps && error.empty(); ++w) run_warp(in_order(w, warps) * 32);
  } while (error.empty() && release_block());
  if (!error.empty()) return;
  check_guards();
  size_t fixed = 0;
  for (const Piece& piece : pieces)
    if (piece.key) fixed += piece.bytes;
  kernel.fixed = std::max(kernel.fixed, fixed);
  const size_t all = fixed + shape.dynamic, limit = kernel.opted_in ? kOptIn : kPlain;
  if (all > limit)
    error = std::to_string(fixed) + " + " + std::to_string(shape.dynamic) + " bytes of shared memory, of which " +
            std::to_string(limit) + " are allowed";
}

}  // namespace

void fail(Place place, const std::string& what) {
  error =
      at(place) + ": " + what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ")";
  _longjmp(scheduler, 1);
}

int meet_block(Place place, bool vote) {
  Thread& me = threads[current];
  votes += vote, me.state = State::at_block, me.place = place;
  give_up();
  return counted;
}

const uint64_t* meet_warp(Place place, uint32_t mask, uint64_t number) {
  Thread& me = threads[current];
  if (!(mask >> lane() & 1)) fail(place, "a lane that is not in its own mask");
  me.state = State::at_warp, me.place = place, me.mask = mask, me.given = number;
  const int first = current / 32 * 32;
  give_up();
  return exchange + first;
}

int lane() { return current % 32; }

void* shared_of(const void* key, size_t bytes, size_t alignment) {
  for (const Piece& piece : pieces)
    if (piece.key == key) return arena + piece.begin;
  const size_t begin = add_piece(key, bytes, alignment);
  if (begin == 0) fail(Place::here(), "more shared memory than there is");
  return arena + begin;
}

void* dynamic_shared() { return arena + dynamic_at; }

void run(const void* function, const Shape& shape, const std::function<void()>& thread) {
  std::lock_guard<std::mutex> lock(one_launch);
  Kernel& kernel = kernels[function];
  error.clear();
  if (shape.blocks < 1 || shape.threads < 1 || shape.threads > kMostThreads) {
    error = "a grid of " + std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) + " threads";
    return;
  }
  if (shape.dynamic > kernel.most_dynamic) {
    error = std::to_string(shape.dynamic) + " bytes of dynamic shared memory, of which " +
            std::to_string(kernel.most_dynamic) + " are allowed";
    return;
  }
  count = shape.threads, body = &thread;
  blockDim = {unsigned(shape.threads), 1, 1}, gridDim = {unsigned(shape.blocks), 1, 1};
  for (int64_t i = 0; i < shape.blocks && error.empty(); ++i) {
    blockIdx = {unsigned(reversed ? shape.blocks - 1 - i : i), 0, 0};
    run_block(kernel, shape);
  }
  if (!error.empty())
    for (Thread& one : threads) one.started = false;
}

cudaError_t set_attribute(const void* function, cudaFuncAttribute which, int value) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  Kernel& kernel = kernels[function];
  if (value < 0 || size_t(value) + kernel.fixed > kOptIn) return cudaErrorInvalidValue;
  kernel.most_dynamic = std::max(size_t(value), kPlain), kernel.opted_in = size_t(value) > kPlain;
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* found, const void* function) {
  std::lock_guard<std::mutex> lock(one_launch);
  const Kernel& kernel = kernels[function];
  *found = {kernel.fixed, int(kernel.most_dynamic), kMostThreads, 32};
  return cudaSuccess;
}

}  // namespace emulate

const char* cudaGetErrorString(cudaError_t error) {
  static std::string told;
  told = error == cudaErrorLaunchFailure ? emulate::error : error == cudaSuccess ? "no error" : "invalid value";
  return told.c_str();
}
cudaError_t cudaGetLastError() { return emulate::error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = emulate::kPlain; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulate::kOptIn; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

// -fsanitize=alignment,bounds calls these; what they are given begins with where it was.
namespace {
struct SanitizedPlace {
  const char* file;
  uint32_t line, column;
};
void sanitized(const SanitizedPlace* place, const char* what) {
  if (emulate::current >= 0) emulate::fail({place->file, int(place->line)}, what);
  fprintf(stderr, "%s:%u: %s\n", place->file, place->line, what);
  abort();
}
}  // namespace
extern "C" {
void __ubsan_handle_type_mismatch_v1(SanitizedPlace* place, uintptr_t) { sanitized(place, "a misaligned access"); }
void __ubsan_handle_out_of_bounds(SanitizedPlace* place, uintptr_t) { sanitized(place, "an index out of bounds"); }
__attribute__((visibility("default"))) void emulate_order(int reversed) { emulate::reversed = reversed != 0; }
}
