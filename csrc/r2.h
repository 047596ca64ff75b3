// The native contract: raw pointers, lengths, a dtype code, a queue. No torch, no pybind11.
#pragma once
#include <cstdint>

namespace r2 {

enum class Dtype : int { f64, f32, bf16, f16 };

constexpr int kState = 8;  // numbers in a chunk's partial state

// One row of Plan.tensors (r2kernels/weights.py). Row k of column c of `columns`, d, is element (k / run) * d * run + c * run + k % run.
struct Tensor {
  int64_t rows, numel, run, first, offset, columns, at;  // at: the number of columns of all tensors before
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
  int bits = 0;  // of the codes of bin_reg and msqe
};

// grad is (count) with a stride, or (2, count, d). target: the address of the flat gradient, or of a table of addresses.
struct Backward {
  const void* grad;
  int64_t grad_stride;
  const void *first, *second, *saved;
  void* target;
  bool add;  // to what the table's addresses hold
  void* parameter_gradient;
  int bits = 0;
};

// Several regularizers from one read, in the order of TERMS in r2kernels/arguments.py. partial of bin_reg is (chunks, 2, 2^bits): counts and sums;
// `first` of partial_l2 is theta, as `rank` found it, which is its `saved`.
enum class Term : int { l_inf, margin, soft_min_max, kure, bin_reg, msqe, partial_l2 };
constexpr int kTerms = 7;

template <class Arguments>
struct Terms {
  int count;
  Term term[kTerms];
  Arguments of[kTerms];  // Forward or Backward; of the latter target and add are those of the first
};

// theta[t]: the rank[t]-th smallest |w| of tensor t, counted from 1, NaN last; NaN where the rank is below 1. `scratch` is for a GPU.
struct Rank {
  const int64_t* rank;
  void *theta, *scratch;
};

// The clusters of DKM. Centroid arrays are (count, most, d) of the accumulator's type, zeros behind the size[t] that tensor t has; sorted for d = 1.
struct Clusters {
  const int32_t* size;
  const void* tau;  // (count)
  int most;
  int metric;  // 0: Euclidean distance, 1: its square
};

// A pass over a list in chunks of whole rows (row_plan). What it means is told in r2kernels/reference/dkm.py.
struct Pass {
  const void *old, *fresh, *upstream, *moments;  // centroids before and after an iteration, dL/dfresh, moments; `gradient` takes `steps` of each, the last iteration first
  int steps;
  const int64_t* grads;  // addresses of dL/dW_hat, lying as the weights do, or null
  void* scratch;         // as many bytes for each chunk as dkm_scratch says
  void* kept;            // what `upstream` leaves for `recur`: (count, most + 1, 4) float64
  void *out, *out_moments;
  void* target;  // of `output` and `gradient`: the address of a flat tensor on a GPU, of a table of addresses on the CPU; of `assign`: a table of addresses
  const int64_t* counts;  // addresses of float32: how many weights have each value of the list; null: one
};

// A quantizer over a list of which every channel is a column (channel_plan). Parameters and their gradients are of the accumulator's type, one number for
// each column of all tensors. What they mean is told in csrc/quantizers.h.
struct Quantizer {
  const void *first, *second, *third;
  int bits;
  bool flag;              // signed (lsq, ewgs), plus (pact), detach_max (dorefa)
  const int64_t* grads;   // addresses of dL/dy, lying as the tensors do
  double* partial;        // on a GPU room for (chunks, 2)
  void* target;           // of what has the tensors' form: the address of a flat tensor on a GPU, of a table of addresses on the CPU
  void *first_gradient, *second_gradient;
};

}  // namespace r2
