// Which GPUs the kernels were compiled for, and whether this machine has one.
#include <algorithm>
#include <cctype>
#include <sstream>
#include <vector>

#include "launch.cuh"

namespace r2::cuda {

namespace {

// Numbers as in "80/90a" where setup.py was told them; else nvcc's list, 900 for compute capability 9.0.
#if defined(R2_ARCHITECTURES)
constexpr const char* kGiven = R2_ARCHITECTURES;
constexpr int kListed[] = {0};
#else
constexpr const char* kGiven = "";
constexpr int kListed[] = {__CUDA_ARCH_LIST__};
#endif

struct Target {
  int number;  // 90 for compute capability 9.0
  char
      suffix;  // a: for that capability alone; f: for its family; 0: for all above too, as PTX of the last such is kept

  bool serves(int device, bool has_ptx) const {
    const bool same_major = device / 10 == number / 10;
    if (suffix == 'a') return device == number;
    return device >= number && (same_major || (has_ptx && !suffix));
  }
  std::string name() const {
    std::string name = std::to_string(number / 10) + "." + std::to_string(number % 10);
    return suffix ? name + suffix : name;
  }
};

std::vector<Target> targets() {
  std::vector<Target> all;
  std::istringstream words(kGiven);
  for (std::string word; std::getline(words, word, '/');)
    all.push_back({std::stoi(word), std::isalpha(word.back()) ? word.back() : '\0'});
  if (all.empty())
    for (int arch : kListed) all.push_back({arch / 10, '\0'});
  return all;
}

bool can_run(int device) {
  const std::vector<Target> all = targets();
  int newest = 0;
  for (const Target& target : all)
    if (!target.suffix) newest = std::max(newest, target.number);
  return std::any_of(all.begin(), all.end(),
                     [&](const Target& target) { return target.serves(device, target.number == newest); });
}

int capability(int device) {
  int major = 0, minor = 0;
  check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major * 10 + minor;
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
  std::string here;
  for (int device = 0; device < count; ++device) {
    const int number = capability(device);
    if (can_run(number)) return "";
    here += (here.empty() ? "" : ", ") + Target{number, '\0'}.name();
  }
  return "the kernels were compiled for GPUs of compute capability " + architectures() + "; here is " +
         (here.empty() ? "none" : here);
}

std::string architectures() {
  std::string all;
  for (const Target& target : targets()) all += (all.empty() ? "" : ", ") + target.name();
  return all;
}

bool has_context(int device) {
  using State = int(int device, unsigned* flags, int* active);
  static State* const state = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<State*>(found);
  }();
  unsigned flags = 0;
  int active = 0;
  return state && state(device, &flags, &active) == 0 && active;
}

}  // namespace r2::cuda
