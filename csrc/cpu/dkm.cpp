// DKM on the CPU: which code serves which metric and width.
#include "dkm_passes.h"
#include "kernels.h"

namespace r2 {
inline namespace R2_ISA {

template <cpu::PassFunction Scalar, cpu::PassFunction Row>
void scalar_or_row(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  (clusters.metric == Metric::euclidean && list.d == 1 ? Scalar : Row)(list, clusters, pass, threads);
}

int64_t scratch(int most, int d, Metric metric) {
  return metric == Metric::euclidean && d == 1 ? ScalarPasses::scratch(most) : RowPasses::scratch(most, d);
}

}  // namespace R2_ISA

namespace cpu::R2_ISA {
const Dkm dkm = {
    .update = scalar_or_row<&ScalarPasses::update, &RowPasses::update>,
    .output = scalar_or_row<&ScalarPasses::output, &RowPasses::output>,
    .upstream = scalar_or_row<&ScalarPasses::upstream, &RowPasses::upstream>,
    .recur = scalar_or_row<&ScalarPasses::recur, &RowPasses::recur>,
    .gradient = scalar_or_row<&ScalarPasses::gradient, &RowPasses::gradient>,
    .jacobian = ScalarPasses::jacobian,
    .assign = RowPasses::assign,
    .scratch = r2::R2_ISA::scratch,
    .collect = ValuePasses::collect,
    .sum_by_value = ValuePasses::sum,
    .look_up = ValuePasses::look_up,
};
}  // namespace cpu::R2_ISA
}  // namespace r2
