// DKM on a GPU: which kernels serve which metric and width.
#include "dkm_passes.cuh"

namespace r2::cuda {

#define R2_PASS(pass, scalar)                                                                                      \
  void dkm_##pass(const List& list, const Clusters& clusters, const Pass& arguments, int device, uintptr_t stream) { \
    const Queue queue("dkm_" #pass, device, stream);                                                               \
    scalar RowPasses::pass(queue, list, clusters, arguments);                                                      \
  }
#define R2_EITHER(pass) R2_PASS(pass, if (ScalarPasses::serves(queue, list, clusters)) ScalarPasses::pass(queue, list, clusters, arguments); else)

R2_EITHER(update)
R2_EITHER(output)
R2_EITHER(upstream)
R2_EITHER(recur)
R2_EITHER(gradient)
R2_PASS(assign, )

void dkm_jacobian(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  ScalarPasses::jacobian(Queue("dkm_jacobian", device, stream), list, clusters, pass);
}

int64_t dkm_scratch(int most, int d, int metric) {
  const int64_t rows = RowPasses::scratch(most, d), scalars = ScalarPasses::scratch(most);
  return d == 1 && metric == 0 && scalars > rows ? scalars : rows;
}

}  // namespace r2::cuda
