// The CPU's half of the extension: one table of functions for each instruction set.
#pragma once
#include "../r2.h"

namespace r2::cpu {

using ForwardFunction = void (*)(const List&, const Forward&, int threads);
using BackwardFunction = void (*)(const List&, const Backward&, int threads);

struct Kernels {
  const char* name;
  ForwardFunction l_inf_fwd, margin_fwd, soft_min_max_fwd, soft_extrema_fwd, kure_fwd, weight_stats_fwd;
  BackwardFunction l_inf_bwd, margin_bwd, soft_min_max_bwd, soft_extrema_bwd, kure_bwd;
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace r2::cpu
