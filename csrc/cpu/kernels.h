// The CPU's half of the extension: for each family a table of functions, made once for every instruction set.
#pragma once
#include "../contract.h"

namespace r2::cpu {

template <class Arguments>
using Function = void (*)(const List&, const Arguments&, int threads);
using PassFunction = void (*)(const List&, const Clusters&, const Pass&, int threads);

struct RangeLosses {
  Function<Forward> l_inf_fwd, margin_fwd, soft_min_max_fwd, soft_extrema_fwd;
  Function<Backward> l_inf_bwd, margin_bwd, soft_min_max_bwd, soft_extrema_bwd;
};

struct Regularizers {
  Function<Forward> kure_fwd, weight_stats_fwd, sampled_std_fwd;
  Function<Backward> kure_bwd;
  Function<Terms<Forward>> terms_fwd;
  Function<Terms<Backward>> terms_bwd;
  Function<Rank> rank;
  Function<Digits> digits_fwd;
};

struct Quantizers {
  Function<Quantizer> lsq_fwd, lsq_bwd, ewgs_fwd, ewgs_bwd, pact_fwd, pact_bwd, dorefa_fwd, dorefa_bwd, rescale_fwd,
      rescale_bwd;
};

struct Dkm {
  PassFunction update, output, upstream, recur, gradient, jacobian, assign;
  int64_t (*scratch)(int most, int d, Metric metric);  // bytes of Pass.scratch for each chunk
  Function<Values> collect, sum_by_value, look_up;
};

struct KMeans {
  void (*fit_lines)(const int64_t* pointers, const LineGroups& lines, int threads);
  void (*partition)(const double* prefix, int64_t cells, int64_t clusters, int64_t* starts);
  void (*fit_rows)(const RowGroups&, int threads);
};

struct TablePasses {
  void (*nearest)(const Tables&, int threads);  // codes, of tables in the accumulator's type
  void (*errors)(const Tables&, int threads);   // sums and counts, of tables in the weights' type
};

#define R2_KERNELS(isa)                   \
  namespace isa {                         \
  extern const RangeLosses range_losses;  \
  extern const Regularizers regularizers; \
  extern const Quantizers quantizers;     \
  extern const Dkm dkm;                   \
  extern const KMeans kmeans;             \
  extern const TablePasses tables;        \
  }
R2_KERNELS(portable)
#if defined(__x86_64__)
R2_KERNELS(avx2)
R2_KERNELS(avx512)
#endif
#undef R2_KERNELS

}  // namespace r2::cpu
