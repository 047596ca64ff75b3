// The range losses on the CPU. Compiled once for each instruction set (R2_ISA).
#include "kernels.h"
#include "readers.h"

namespace r2 {
namespace cpu::R2_ISA {
extern const Kernels kernels;
#define R2_STRING_(x) #x
#define R2_STRING(x) R2_STRING_(x)
const Kernels kernels = {R2_STRING(R2_ISA),
                         forward<LInfReader, LInfOp>, forward<MarginReader, MarginOp>, forward<SoftReader, SoftOp<false>>, forward<SoftReader, SoftOp<true>>,
                         forward<MomentsReader, KureOp>, forward<MomentsReader, WeightStatsOp>,
                         backward<LInfOp>, backward<MarginOp>, backward<SoftOp<false>>, backward<SoftOp<true>>, backward<KureOp>};
}  // namespace cpu::R2_ISA
}  // namespace r2
