// The range losses on the CPU. Compiled once for each instruction set (R2_ISA).
#include "range_losses.h"

#include "kernels.h"

namespace r2 {
namespace cpu::R2_ISA {
const RangeLosses range_losses = {
    .l_inf_fwd = loss_forward<LInfReader, LInfOp>,
    .margin_fwd = loss_forward<MarginReader, MarginOp>,
    .soft_min_max_fwd = loss_forward<SoftReader, SoftOp<false>>,
    .soft_extrema_fwd = loss_forward<SoftReader, SoftOp<true>>,
    .l_inf_bwd = loss_backward<LInfOp>,
    .margin_bwd = loss_backward<MarginOp>,
    .soft_min_max_bwd = loss_backward<SoftOp<false>>,
    .soft_extrema_bwd = loss_backward<SoftOp<true>>,
};
}  // namespace cpu::R2_ISA
}  // namespace r2
