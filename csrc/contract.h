// The native contract: raw pointers, lengths, a dtype, a queue. No torch, no pybind11. r2kernels/contract.py says of
// every op what is here said of what it saves and of the order of terms; csrc/bindings.cpp hands these numbers out, and
// tests/test_native_contract.py holds the two equal.
#pragma once
#include <cstdint>

namespace r2 {

enum class Dtype : int { f64, f32, bf16, f16 };

constexpr int kState = 8;             // numbers in a chunk's partial state
constexpr int kStatistics = 7;        // of weight_stats: min, max, mean, unbiased std, kurtosis, max|w|, skew
constexpr double kFloor = 1e-8;       // below sizes that a quantizer learns: contract.FLOOR
constexpr int kQuantizerSums = 2;     // numbers in a quantizer's partial state, on a GPU
constexpr int kHalfValues = 1 << 16;  // that 16 bits can have

// Numbers that a loss saves for each column; bin_reg saves 2 2^bits.
namespace saved_numbers {
constexpr int l_inf = 2, margin = 1, soft_min_max = 8, soft_extrema = 8, kure = 4, msqe = 1, partial_l2 = 1;
}

// One row of Plan.tensors (r2kernels/lists.py). Row k of column c of `columns`, d, is the element
// (k / run) * d * run + c * run + k % run.
struct Tensor {
  int64_t rows, numel, run, first_chunk;
  int64_t columns, first_column;  // how many columns the tensors before it have
};

// Chunk i belongs to tensor t = owner[i]; with j = i - first_chunk of t it is the rows [j / d * chunk, ...) of column
// j % d. A list of one tensor has no tables: it is `alone`, and on a GPU an op that would take a table of addresses
// takes the address itself (csrc/lists.h).
struct List {
  const int64_t* pointers;
  const Tensor* tensors;
  const int32_t* owner;
  int64_t count, chunks, chunk;
  int d;
  Dtype dtype;
  Tensor alone;

  List with(const int64_t* addresses) const {
    List list = *this;
    list.pointers = addresses;
    return list;
  }
};

// Parameters are (count, d), out (count) or (2, count, d), saved (count, d, numbers), partial (chunks, kState); all of
// the accumulator's type.
struct Forward {
  const void *first, *second;
  bool flag;  // soft extremes: the variances too
  void *partial, *out, *saved;
  int bits;  // of the codes of bin_reg and msqe, else 0
};

// grad is (count) with a stride, or (2, count, d). target: addresses of the gradients; 0 for one that nobody needs.
struct Backward {
  const void* grad;
  int64_t grad_stride;
  const void *first, *second, *saved;
  void* target;
  bool add;  // to what the gradients hold
  void* parameter_gradient;
  int bits;
};

// Several regularizers from one read, in the order of TERMS in r2kernels/contract.py. partial of bin_reg is
// (chunks, 2^bits + 2^bits + 1): counts, sums, their unit; `first` of partial_l2 is theta, as `rank` found it, which is
// its `saved`.
enum class Term : int { l_inf, margin, soft_min_max, kure, bin_reg, msqe, partial_l2 };
constexpr int kTerms = 7;

template <class Arguments>
struct Terms {
  int count;
  Term term[kTerms];
  Arguments of[kTerms];  // Forward or Backward; of the latter target and add are those of the first
};

// theta[t]: the rank[t]-th smallest |w| of tensor t, counted from 1, NaN last; NaN where the rank is below 1. `scratch`
// is for a GPU.
struct Rank {
  const int64_t* rank;
  void *theta, *scratch;
};

// To counts[t], kRadix numbers for each tensor: told at DIGITS in r2kernels/contract.py.
struct Digits {
  const int64_t* prefix;
  int place;
  int64_t* counts;
};
constexpr int kRadix = 256;

enum class Metric : int { euclidean, sqeuclidean };

// The clusters of DKM. Centroid arrays are (count, most, d) of the accumulator's type, zeros behind the size[t] that
// tensor t has; sorted for d = 1.
struct Clusters {
  const int32_t* size;
  const void* tau;  // (count)
  int most;
  Metric metric;
};

// A pass over a list in chunks of whole rows (row_plan). What it means is told in r2kernels/reference/dkm.py.
struct Pass {
  // centroids before and after an iteration, dL/dfresh, moments; `gradient` takes `steps` of each, the last first
  const void *old, *fresh, *upstream, *moments;
  int steps;
  const int64_t* grads;  // addresses of dL/dW_hat, lying as the weights do, or null
  void* scratch;         // as many bytes as dkm_scratch says
  void* kept;            // what `upstream` leaves for `recur`: (count, most + 1, 4) float64
  void *out, *out_moments;
  void* target;           // addresses of W_hat, of dL/dW or of codes
  const int64_t* counts;  // addresses of float32: how many weights have each value of the list; null: one
};

// 16-bit scalars by their values, on the CPU. Arrays have kHalfValues places for each tensor of the list; those marked
// with a star are tables of addresses, one for each.
struct Values {
  uint16_t* slots;  // of a code: the place of its value among those that occur, which rise
  float *values, *counts;
  int64_t* sizes;        // how many values occur
  const int64_t* grads;  // *
  float* sums;           // of the gradients of all weights of a value
  // * target = factor g + shift of the value of each weight, or without `factor` the shift alone
  const int64_t *shift, *factor, *targets;
};

// Hard k-means of single numbers, a group for each of `count` arrays of one dtype. `out`, and `weights` where there are
// any: addresses, of clusters[i] numbers of the accumulator's type and of sizes[i] float64 (0: each weighs 1).
struct LineGroups {
  const int64_t *sizes, *clusters, *weights, *out;
  int64_t count;
  Dtype dtype;
  int64_t max_iter;
  bool zero;  // one centroid is at 0, and numbers that are 0 are left out of all others
};

// k-means of rows, on the CPU: `count` groups, of each sizes[g] rows of d and clusters[g] centroids. Those marked with
// a star are tables of addresses, one for each group; 0 for what is not there.
struct RowGroups {
  const int64_t *rows, *weights;   // * (size, d); float64
  const int64_t *drawn, *uniform;  // * the seeds[g] rows that k-means++ chooses from, 0: all; its numbers in [0, 1)
  const int64_t* out;              // * (clusters, d) of the accumulator's type
  const int64_t *sizes, *clusters, *seeds;
  int64_t count;
  int d;
  Dtype dtype;
  int64_t max_iter;
};

// k-means of scalars, on a GPU: the values of `count` groups in rows of `stride`, of which the first sizes[g] count;
// they rise, and are of float32 or float64. Without a value the centroids are NaN.
struct Lines {
  const void* values;
  const double* weights;            // (count, stride) above 0, or null: all 1
  const int32_t *sizes, *clusters;  // (count)
  void* scratch;                    // lines_scratch bytes for each group
  double* out;                      // (count, most)
  int64_t count;
  int stride, most;
  Dtype dtype;
  int64_t max_iter;
};

// `groups` rows of n weights of one dtype, each with a table of at most 256 entries. `sums`: two for each row.
struct Tables {
  const void *weights, *tables;
  int64_t groups, n;
  int entries;
  Dtype dtype;
  uint8_t* codes;
  double* sums;
  int64_t* counts;  // added to
};

// A quantizer over a list of which every channel is a column (channel_plan). Parameters and their gradients are of the
// accumulator's type, one number for each column of all tensors. What they mean is told in csrc/quantizers.h.
struct Quantizer {
  const void *first, *second, *third;
  int bits;
  double low, high;      // the codes run from -low to high
  bool flag;             // signed (lsq, ewgs), plus (pact), detach_max (dorefa)
  bool sized;            // step, upper - lower, alpha and scale are used as |p| + kFloor
  const int64_t* grads;  // addresses of dL/dy, lying as the tensors do
  double* partial;       // on a GPU room for (chunks, kQuantizerSums)
  void* target;          // addresses of what has the tensors' form
  void *first_gradient, *second_gradient;
};

}  // namespace r2
