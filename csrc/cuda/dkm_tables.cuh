// The tables of a pass, made once for each tensor and iteration and copied by every block that reads its weights.
#pragma once
#include "dkm_common.cuh"
#include "dkm_intervals.cuh"

namespace r2::cuda {

// Where the tables lie, behind the chunks' sums in Pass.scratch; and behind each one, where a block's shared memory
// may be too small for it, room to work them out in, and to merge.
struct Rooms {
  char* base;
  int64_t stride;
  int64_t tables;  // bytes of them

  __device__ char* of(int64_t tensor) const { return base + tensor * stride; }
  __device__ char* work(int64_t tensor) const { return of(tensor) + tables; }
};

// Numbers of 128 bits, by all threads of a block.
__device__ inline void copy(void* to, const void* from, size_t bytes) {
  for (unsigned i = threadIdx.x; i < bytes / sizeof(uint4); i += blockDim.x)
    static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
}

constexpr int kTableThreads = 256;

// A block for each tensor of each iteration. outside: where the tables will lie, as shared memory is too small
template <class Op, class A>
__global__ void __launch_bounds__(kTableThreads)
    dkm_tables_kernel(List list, Clusters clusters, Pass pass, Rooms rooms, bool outside) {
  char* place = rooms.of(blockIdx.x);
  Space space = {outside ? place : shared_memory()};
  const Tables<Op, A> tables(space, clusters.most);
  tables.fill(Iteration<A>(clusters, pass, list.count, blockIdx.x % list.count, int(blockIdx.x / list.count)),
              space.take<char>(0));
  if (!outside) copy(place, tables.grid, rooms.tables);
}

}  // namespace r2::cuda
