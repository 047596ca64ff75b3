// What DKM's passes on a GPU have in common: chunks of whole rows, the totals of what chunks give, launches.
#pragma once
#include <mutex>
#include <set>
#include <utility>

#include "launch.cuh"

namespace r2::cuda {

// The rows of one chunk, and the clusters of its tensor.
struct RowChunk {
  int64_t tensor, first, row;  // first: the tensor's first chunk
  int rows, clusters;

  __device__ RowChunk(const List& list, const Clusters& c)
      : tensor(owner_of(list, blockIdx.x)), first(tensor_of(list, tensor).first_chunk),
        row((blockIdx.x - first) * list.chunk), rows(int(min(list.chunk, tensor_of(list, tensor).rows - row))),
        clusters(c.size[tensor]) {}
};

// Pass.scratch: for each chunk `numbers` float64, of which those of a tensor's first chunk become the totals, and a
// counter.
struct Scratch {
  double* partial;
  unsigned* counters;
  int64_t numbers;

  R2_HD Scratch(const List& list, const Pass& pass, int64_t numbers)
      : partial(static_cast<double*>(pass.scratch)),
        counters(reinterpret_cast<unsigned*>(partial + list.chunks * numbers)), numbers(numbers) {}

  static R2_HD int64_t bytes(int64_t numbers) { return (numbers + 1) * int64_t(sizeof(double)); }

  // That of this block's chunk; the first chunk's block readies the counter for the kernel that adds up.
  __device__ double* of(const RowChunk& part) const {
    if (threadIdx.x == 0 && part.row == 0) counters[part.first] = 0;
    return partial + blockIdx.x * numbers;
  }
};

constexpr int kMergeThreads = 512, kMergeGroups = kMergeThreads / 32;

R2_HD int slices_of(int64_t numbers) { return int((numbers + 31) / 32); }

struct alignas(16) AddingUp {
  double sums[kMergeGroups][32];
  bool last;
};

// Totals of `used` numbers over a tensor's chunks, by a block for each 32 of them. A warp adds up every kMergeGroups-th
// chunk, the first warp the groups. The last block to end gets the totals, the others false.
__device__ inline bool add_up(const List& list, const Scratch& scratch, int64_t tensor, int slice, int64_t used,
                              const double** totals) {
  __shared__ AddingUp shared;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t first = tensor_of(list, tensor).first_chunk,
                chunks = (tensor + 1 < list.count ? tensor_of(list, tensor + 1).first_chunk : list.chunks) - first;
  const int64_t number = int64_t(slice) * 32 + lane;
  double* base = scratch.partial + first * scratch.numbers;
  double sum = 0;
  if (number < used) {
#pragma unroll 8
    for (int64_t c = group; c < chunks; c += kMergeGroups) sum += base[c * scratch.numbers + number];
  }
  shared.sums[group][lane] = sum;
  __syncthreads();
  if (group == 0 && number < used && chunks > 0) {
    for (int g = 1; g < kMergeGroups; ++g) sum += shared.sums[g][lane];
    base[number] = sum;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0)
    shared.last = chunks == 0 ? slice == 0 : atomicAdd(scratch.counters + first, 1u) + 1 == unsigned(slices_of(used));
  __syncthreads();
  __threadfence();
  *totals = chunks > 0 ? base : nullptr;
  return shared.last;
}

// A total that another block may have written.
__device__ __forceinline__ double total(const double* totals, int64_t i) { return totals ? __ldcg(totals + i) : 0; }

// Threads of a block take every blockDim-th of n.
template <class Run>
__device__ __forceinline__ void each(int n, Run run) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) run(i);
}

inline int attribute(const Queue& queue, cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(queue.op, cudaGetDevice(&device));
  check(queue.op, cudaDeviceGetAttribute(&value, which, device));
  return value;
}

constexpr int kReserved = 1024;  // bytes of shared memory that the system takes of each block

// Bytes of shared memory that a block may have, declared by the kernel or given to it at the launch; less kReserved,
// which cuobjdump counts among those that the kernel declares.
inline int shared_limit(const Queue& queue) {
  return attribute(queue, cudaDevAttrMaxSharedMemoryPerBlockOptin) - kReserved;
}

// Lets a kernel be launched with all the shared memory that it does not declare itself. Once on each device and always
// all of it, so that threads that need different sizes do not take it from each other.
inline void grant_shared(const Queue& queue, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> granted;
  int device = 0;
  check(queue.op, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (granted.count({kernel, device})) return;
  cudaFuncAttributes own;
  check(queue.op, cudaFuncGetAttributes(&own, kernel));
  const int rest = attribute(queue, cudaDevAttrMaxSharedMemoryPerBlockOptin) - int(own.sharedSizeBytes);
  check(queue.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, rest));
  granted.emplace(kernel, device);
}

template <class... Arguments>
void launch(const Queue& queue, void (*kernel)(List, Clusters, Pass, Arguments...), int64_t blocks, int threads,
            size_t shared, const List& list, const Clusters& clusters, const Pass& pass,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX || list.chunk > INT32_MAX)
    throw std::runtime_error(std::string(queue.op) + ": the plan is beyond the limits of a grid");
  if (shared > 0) grant_shared(queue, reinterpret_cast<const void*>(kernel));
  kernel<<<unsigned(blocks), threads, shared, queue.stream>>>(list, clusters, pass, arguments...);
  check(queue.op, cudaGetLastError());
}

}  // namespace r2::cuda
