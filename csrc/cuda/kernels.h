// The GPU's half of the extension. Functions throw std::runtime_error with CUDA's message; they only launch, and never
// wait for the device.
#pragma once
#include <string>

#include "../contract.h"

namespace r2::cuda {

std::string problem();        // why no kernel can run on this machine; empty if one can
std::string architectures();  // that the kernels were compiled for
bool has_context(int device);

// Host words to `out` on the device, as arguments of kernels: a copy would not be part of a CUDA graph.
void write_words(const int64_t* words, int64_t count, int64_t* out, int device, uintptr_t stream);

template <class Arguments>
using Function = void(const List&, const Arguments&, int device, uintptr_t stream);
using PassFunction = void(const List&, const Clusters&, const Pass&, int device, uintptr_t stream);

Function<Forward> l_inf_fwd, margin_fwd, soft_min_max_fwd, soft_extrema_fwd;
Function<Backward> l_inf_bwd, margin_bwd, soft_min_max_bwd, soft_extrema_bwd;

Function<Forward> kure_fwd, weight_stats_fwd, sampled_std_fwd;
Function<Backward> kure_bwd;
Function<Terms<Forward>> terms_fwd;
Function<Terms<Backward>> terms_bwd;
Function<Rank> rank;
Function<Digits> digits_fwd;
int64_t rank_scratch(int64_t count);  // bytes of Rank.scratch for so many tensors

Function<Quantizer> lsq_fwd, lsq_bwd, ewgs_fwd, ewgs_bwd, pact_fwd, pact_bwd, dorefa_fwd, dorefa_bwd, rescale_fwd,
    rescale_bwd;

PassFunction dkm_update, dkm_output, dkm_upstream, dkm_recur, dkm_gradient, dkm_jacobian, dkm_assign;
// bytes of Pass.scratch for so many chunks of so many tensors, which count once for each of Pass.steps
int64_t dkm_scratch(int64_t chunks, int64_t tensors, int most, int d, Metric metric);

// scalars, in groups of at most 512 clusters
void fit_lines(const Lines& lines, int device, uintptr_t stream);
int64_t lines_scratch(int stride, int most, bool weighted);

}  // namespace r2::cuda
