// From the contract to kernels: the device, the dtype, what went wrong.
#pragma once
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "skeletons.cuh"

namespace r2::cuda {

inline void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
}

// Makes a device the current one, and the one before it again at the end; not where the process has no context on that,
// for cudaSetDevice would make one (as torch's guards do).
class OnDevice {
 public:
  OnDevice(const char* op, int device) : device_(device) {
    check(op, cudaGetDevice(&before_));
    if (before_ != device_) check(op, cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (before_ != device_ && has_context(before_)) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int device_, before_;
};

struct Queue {
  const char* op;
  OnDevice device;
  cudaStream_t stream;

  Queue(const char* op, int index, uintptr_t stream)
      : op(op), device(op, index), stream(reinterpret_cast<cudaStream_t>(stream)) {}

  template <class Arguments>
  void launch(void (*kernel)(List, Arguments), int64_t blocks, int threads, const List& list,
              const Arguments& arguments, size_t shared = 0) const {
    if (blocks > INT32_MAX || list.chunk > INT32_MAX)
      throw std::runtime_error(std::string(op) + ": the plan is beyond the limits of a grid");
    kernel<<<unsigned(blocks), threads, shared, stream>>>(list, arguments);
    check(op, cudaGetLastError());
  }
};

template <class T>
struct Tag {
  using type = T;
};

template <class Run>
void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::f64: return run(Tag<double>{});
    case Dtype::f32: return run(Tag<float>{});
    case Dtype::bf16: return run(Tag<bf16>{});
    case Dtype::f16: return run(Tag<f16>{});
  }
}

template <class Reader>
void partials(const Queue& queue, const List& list, const Forward& f) {
  with_type(list.dtype, [&](auto tag) {
    queue.launch(partial_kernel<Reader, typename decltype(tag)::type>, list.chunks, kThreads, list, f);
  });
}

template <class Op>
void merge(const Queue& queue, const List& list, const Forward& f) {
  queue.launch(list.dtype == Dtype::f64 ? merge_kernel<Op, double> : merge_kernel<Op, float>, list.count, kMergers,
               list, f);
}

template <class Op>
void map(const Queue& queue, const List& list, const Backward& b) {
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    queue.launch(b.add ? map_kernel<Op, T, true> : map_kernel<Op, T, false>, list.chunks, kThreads, list, b);
  });
}

template <class Reader, class Op>
void loss_forward(const char* op, const List& list, const Forward& f, int device, uintptr_t stream) {
  Queue queue(op, device, stream);
  partials<Reader>(queue, list, f);
  merge<Op>(queue, list, f);
}

template <class Op>
void loss_backward(const char* op, const List& list, const Backward& b, int device, uintptr_t stream) {
  map<Op>(Queue(op, device, stream), list, b);
}

}  // namespace r2::cuda
