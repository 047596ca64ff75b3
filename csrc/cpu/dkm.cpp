// DKM on the CPU: which code serves which metric and width.
#include "dkm_passes.h"

namespace r2 {
inline namespace R2_ISA {

template <cpu::PassFunction Scalar, cpu::PassFunction Row>
void either(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  (clusters.metric == 0 && list.d == 1 ? Scalar : Row)(list, clusters, pass, threads);
}

int64_t scratch(int most, int d, int metric) { return metric == 0 && d == 1 ? ScalarPasses::scratch(most) : RowPasses::scratch(most, d); }

}  // namespace R2_ISA

namespace cpu::R2_ISA {
extern const DkmKernels dkm;
#define R2_EITHER(pass) either<&ScalarPasses::pass, &RowPasses::pass>
const DkmKernels dkm = {R2_EITHER(update), R2_EITHER(output), R2_EITHER(upstream), R2_EITHER(recur), R2_EITHER(gradient), ScalarPasses::jacobian,
                        RowPasses::assign, scratch, ValuePasses::collect, ValuePasses::sum, ValuePasses::look_up};
}  // namespace cpu::R2_ISA
}  // namespace r2
