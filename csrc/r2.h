// The native contract: raw pointers, lengths, a dtype code, a queue. No torch, no pybind11.
#pragma once
#include <cstdint>

namespace r2 {

enum class Dtype : int { f64, f32, bf16, f16 };

constexpr int kState = 8;  // numbers in a chunk's partial state

// One row of Plan.tensors (r2kernels/weights.py). Row k of column c is element (k / run) * d * run + c * run + k % run.
struct Tensor {
  int64_t rows, numel, run, first, offset;
};

// Chunk i belongs to tensor t = owner[i]; with j = i - first of t it is rows [j / d * chunk, ...) of column j % d.
struct List {
  const int64_t* pointers;
  const Tensor* tensors;
  const int32_t* owner;
  int64_t count, chunks, chunk;
  int d;
  Dtype dtype;
};

// Parameters are (count, d), out (count) or (2, count, d), saved (count, d, numbers), partial (chunks, kState); all of the accumulator's type.
struct Forward {
  const void *first, *second;
  bool flag;  // soft extremes: the variances too
  void *partial, *out, *saved;
};

// grad is (count) with a stride, or (2, count, d). target: the address of the flat gradient, or of a table of addresses.
struct Backward {
  const void* grad;
  int64_t grad_stride;
  const void *first, *second, *saved;
  void* target;
  bool add;  // to what the table's addresses hold
  void* parameter_gradient;
};

}  // namespace r2
