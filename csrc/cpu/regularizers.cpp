// The regularizers on the CPU. Compiled once for each instruction set (R2_ISA). bin_reg, msqe and partial_l2 are sets
// of one term.
#include "regularizers.h"

#include "kernels.h"
#include "regularizers_terms.h"

namespace r2 {
namespace cpu::R2_ISA {
const Regularizers regularizers = {
    .kure_fwd = loss_forward<MomentsReader, KureOp>,
    .weight_stats_fwd = loss_forward<MomentsReader, WeightStatsOp>,
    .sampled_std_fwd = sampled_std,
    .kure_bwd = loss_backward<KureOp>,
    .terms_fwd = terms_forward,
    .terms_bwd = terms_backward,
    .rank = r2::R2_ISA::rank,
    .digits_fwd = digits,
};
}  // namespace cpu::R2_ISA
}  // namespace r2
