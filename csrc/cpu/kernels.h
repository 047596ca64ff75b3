// The CPU's half of the extension: one table of functions for each instruction set.
#pragma once
#include "../r2.h"

namespace r2::cpu {

using ForwardFunction = void (*)(const List&, const Forward&, int threads);
using BackwardFunction = void (*)(const List&, const Backward&, int threads);
using PassFunction = void (*)(const List&, const Clusters&, const Pass&, int threads);

struct Kernels {
  const char* name;
  ForwardFunction l_inf_fwd, margin_fwd, soft_min_max_fwd, soft_extrema_fwd, kure_fwd, weight_stats_fwd;
  BackwardFunction l_inf_bwd, margin_bwd, soft_min_max_bwd, soft_extrema_bwd, kure_bwd;
};

// 16-bit scalars by their values. Arrays have 65,536 places for each tensor of the list; those marked with a star are tables of addresses, one for each.
struct Values {
  uint16_t* slots;  // of a code: the place of its value among those that occur, which rise
  float *values, *counts;
  int64_t* sizes;  // how many values occur
  const int64_t* grads;  // *
  float* sums;  // of the gradients of all weights of a value
  const int64_t *shift, *factor, *targets;  // * target = factor g + shift of the value of each weight, or without `factor` the shift alone
};
using ValuesFunction = void (*)(const List&, const Values&, int threads);

struct DkmKernels {
  PassFunction update, output, upstream, recur, gradient, jacobian, assign;
  int64_t (*scratch)(int most, int d, int metric);
  ValuesFunction collect, sum_by_value, look_up;
};

using QuantizerFunction = void (*)(const List&, const Quantizer&, int threads);

struct QuantizerKernels {
  QuantizerFunction lsq_fwd, lsq_bwd, ewgs_fwd, ewgs_bwd, pact_fwd, pact_bwd, dorefa_fwd, dorefa_bwd;
};

struct TermKernels {
  void (*forward)(const List&, const Terms<Forward>&, int threads);
  void (*backward)(const List&, const Terms<Backward>&, int threads);
  void (*rank)(const List&, const Rank&, int threads);
};

namespace portable {
extern const Kernels kernels;
extern const DkmKernels dkm;
extern const QuantizerKernels quantizers;
extern const TermKernels terms;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
extern const DkmKernels dkm;
extern const QuantizerKernels quantizers;
extern const TermKernels terms;
}
namespace avx512 {
extern const Kernels kernels;
extern const DkmKernels dkm;
extern const QuantizerKernels quantizers;
extern const TermKernels terms;
}
#endif

}  // namespace r2::cpu
