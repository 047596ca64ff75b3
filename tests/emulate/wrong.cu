// Kernels that are wrong, each in its own way, for test_emulated.py.
namespace {

constexpr int kThreads = 64;

__global__ void right(float* out) {
  __shared__ float all[kThreads];
  const int i = threadIdx.x;
  all[i] = float(i);
  __syncthreads();
  float sum = all[(i + 1) % kThreads];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  out[blockIdx.x * kThreads + i] = sum;
}

__global__ void without_barrier(float* out) {
  __shared__ float all[kThreads];
  const int i = threadIdx.x;
  all[i] = float(i);
  out[i] = all[(i + 1) % kThreads];
}

__global__ void order_of_blocks(float* out) { out[0] = float(blockIdx.x); }

__global__ void uninitialised(float* out) {
  __shared__ float all[kThreads];
  out[threadIdx.x] = all[threadIdx.x];
}

__global__ void ended(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[0] = 1;
}

__global__ void elsewhere(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
    out[1] = 1;
  }
}

__global__ void lanes_apart(float* out) {
  if (threadIdx.x % 2 == 0) out[0] = __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void outside_of_mask(float* out) {
  if (threadIdx.x < 16) out[0] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void misaligned(float* out) { *reinterpret_cast<uint4*>(out + 1) = __ldg(reinterpret_cast<uint4*>(out)); }

__global__ void badly_aligned_memory(float* out) {
  __shared__ float all[kThreads];
  out[0] = __uint_as_float(reinterpret_cast<uint4*>(all)->x);
}

__global__ void index_too_large(float* out) {
  __shared__ float all[kThreads];
  all[threadIdx.x + 1] = out[0];
}

__global__ void overrun(float*) {
  __shared__ float all[kThreads];
  float* end = all + kThreads;
  *end = 1;
}

__global__ void overrun_of_dynamic(float*) {
  extern __shared__ float4 room[];
  room[64].x = 1;
}

__global__ void large(float* out) {
  __shared__ double all[1024];
  all[threadIdx.x] = out[0];
}

struct Case {
  const char* name;
  void (*kernel)(float*);
  unsigned blocks;
  size_t dynamic;
  int opt_in;
};

constexpr Case kCases[] = {
    {"right", right, 3, 0, 0},
    {"without a barrier", without_barrier, 1, 0, 0},
    {"order of blocks", order_of_blocks, 3, 0, 0},
    {"uninitialised", uninitialised, 1, 0, 0},
    {"a thread has ended", ended, 1, 0, 0},
    {"barriers apart", elsewhere, 1, 0, 0},
    {"lanes apart", lanes_apart, 1, 0, 0},
    {"outside of the mask", outside_of_mask, 1, 0, 0},
    {"misaligned", misaligned, 1, 0, 0},
    {"misaligned in shared memory", badly_aligned_memory, 1, 0, 0},
    {"index", index_too_large, 1, 0, 0},
    {"overrun", overrun, 1, 0, 0},
    {"overrun of dynamic memory", overrun_of_dynamic, 1, 1024, 0},
    {"dynamic memory of 48 KB", right, 1, 48 * 1024, 0},
    {"dynamic memory beyond 48 KB", order_of_blocks, 1, 48 * 1024 + 16, 0},
    {"both beyond 48 KB", large, 1, 41 * 1024, 0},
    {"opted in", large, 1, 219 * 1024, 219 * 1024},
    {"beyond the machine", order_of_blocks, 1, 0, 228 * 1024},
    {"no blocks", right, 0, 0, 0},
};

}  // namespace

// What the launch of the case says.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, float* out) {
  for (const Case& one : kCases) {
    if (strcmp(one.name, name)) continue;
    if (one.opt_in) {
      const cudaError_t error =
          cudaFuncSetAttribute(one.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, one.opt_in);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    one.kernel<<<one.blocks, kThreads, one.dynamic, nullptr>>>(out);
    return cudaGetErrorString(cudaGetLastError());
  }
  return "no such case";
}
