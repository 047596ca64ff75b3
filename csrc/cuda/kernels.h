// The GPU's half of the extension. Functions throw std::runtime_error with CUDA's message; they only launch, and never wait for the device.
#pragma once
#include <string>

#include "../r2.h"

namespace r2::cuda {

std::string problem();       // why no kernel can run on this machine; empty if one can
std::string architectures();  // that the kernels were compiled for

using ForwardFunction = void(const List&, const Forward&, int device, uintptr_t stream);
using BackwardFunction = void(const List&, const Backward&, int device, uintptr_t stream);
using PassFunction = void(const List&, const Clusters&, const Pass&, int device, uintptr_t stream);
using QuantizerFunction = void(const List&, const Quantizer&, int device, uintptr_t stream);

ForwardFunction l_inf_fwd, margin_fwd, soft_min_max_fwd, soft_extrema_fwd, kure_fwd, weight_stats_fwd;
BackwardFunction l_inf_bwd, margin_bwd, soft_min_max_bwd, soft_extrema_bwd, kure_bwd;
PassFunction dkm_update, dkm_output, dkm_upstream, dkm_recur, dkm_gradient, dkm_jacobian, dkm_assign;
void terms_fwd(const List&, const Terms<Forward>&, int device, uintptr_t stream);
void terms_bwd(const List&, const Terms<Backward>&, int device, uintptr_t stream);
void rank(const List&, const Rank&, int device, uintptr_t stream);
int64_t rank_scratch(int64_t count);  // bytes of Rank.scratch for so many tensors
int64_t dkm_scratch(int most, int d, int metric);  // bytes of Pass.scratch for each chunk
QuantizerFunction lsq_fwd, lsq_bwd, ewgs_fwd, ewgs_bwd, pact_fwd, pact_bwd, dorefa_fwd, dorefa_bwd;

}  // namespace r2::cuda
