// The standard deviation of a sample of each tensor, into `out`: a block for each.
#include "../sample.h"
#include "launch.cuh"

namespace r2::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(List list, Forward f) {
  const T* w = place<const T>(list, list.pointers, blockIdx.x);
  const Sample sample(tensor_of(list, blockIdx.x).numel);
  const double pivot = double(widen(w[0]));
  double sums[2] = {0, 0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < sample.size; i += kThreads) {
    const double x = double(widen(w[sample.run(i / Sample::kRun) + i % Sample::kRun])) - pivot;
    sums[0] += x, sums[1] += x * x;
  }
  block_reduce<Sum>(sums);
  if (threadIdx.x == 0) static_cast<Acc<T>*>(f.out)[blockIdx.x] = Acc<T>(sample.deviation(sums[0], sums[1]));
}

void sampled_std_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  Queue queue("sampled_std_fwd", device, stream);
  with_type(list.dtype, [&](auto tag) {
    queue.launch(sample_kernel<typename decltype(tag)::type>, list.count, kThreads, list, f);
  });
}

}  // namespace r2::cuda
