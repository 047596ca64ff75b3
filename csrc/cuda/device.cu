// Which GPUs the kernels were compiled for, and whether this machine has one.
#include <algorithm>

#include "launch.cuh"

namespace r2::cuda {

namespace {

constexpr int kCompiled[] = {__CUDA_ARCH_LIST__};  // 900 for compute capability 9.0

std::string capability(int arch) { return std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10); }

int arch_of(int device) {
  int major = 0, minor = 0;
  check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major * 100 + minor * 10;
}

constexpr int kWords = 480;  // as many as fit into the 4 KB of a kernel's arguments

struct Words {
  int64_t word[kWords];
};

__global__ void words_kernel(Words words, int64_t* out, int count) {
  if (int(threadIdx.x) < count) out[threadIdx.x] = words.word[threadIdx.x];
}

}  // namespace

void write_words(const int64_t* words, int64_t count, int64_t* out, int device, uintptr_t stream) {
  const Queue queue("write_words", device, stream);
  for (int64_t from = 0; from < count; from += kWords) {
    const int n = int(std::min<int64_t>(kWords, count - from));
    Words some;
    std::copy_n(words + from, n, some.word);
    words_kernel<<<1, kWords, 0, queue.stream>>>(some, out + from, n);
    check(queue.op, cudaGetLastError());
  }
}

std::string problem() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no usable GPU: ") + cudaGetErrorString(error);
  const int lowest = *std::min_element(std::begin(kCompiled), std::end(kCompiled));
  int best = 0;
  for (int device = 0; device < count; ++device) best = std::max(best, arch_of(device));
  return best >= lowest ? ""
                        : "no GPU of compute capability " + capability(lowest) + " or above; the best here has " +
                              capability(best);
}

std::string architectures() {
  std::string all;
  for (int arch : kCompiled) all += (all.empty() ? "" : ", ") + capability(arch);
  return all;
}

}  // namespace r2::cuda
