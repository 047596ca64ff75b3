// DKM on a GPU: which kernels serve which metric and width.
#include "dkm_passes.cuh"

namespace r2::cuda {

using QueuedPass = void(const Queue&, const List&, const Clusters&, const Pass&);

template <QueuedPass* scalar, QueuedPass* row>
void scalar_or_row(const char* op, const List& list, const Clusters& clusters, const Pass& pass, int device,
                   uintptr_t stream) {
  const Queue queue(op, device, stream);
  (ScalarPasses::serves(queue, list, clusters) ? scalar : row)(queue, list, clusters, pass);
}

void dkm_update(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  scalar_or_row<ScalarPasses::update, RowPasses::update>("dkm_update", list, clusters, pass, device, stream);
}

void dkm_output(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  scalar_or_row<ScalarPasses::output, RowPasses::output>("dkm_output", list, clusters, pass, device, stream);
}

void dkm_upstream(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  scalar_or_row<ScalarPasses::upstream, RowPasses::upstream>("dkm_upstream", list, clusters, pass, device, stream);
}

void dkm_recur(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  scalar_or_row<ScalarPasses::recur, RowPasses::recur>("dkm_recur", list, clusters, pass, device, stream);
}

void dkm_gradient(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  scalar_or_row<ScalarPasses::gradient, RowPasses::gradient>("dkm_gradient", list, clusters, pass, device, stream);
}

void dkm_assign(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  RowPasses::assign(Queue("dkm_assign", device, stream), list, clusters, pass);
}

void dkm_jacobian(const List& list, const Clusters& clusters, const Pass& pass, int device, uintptr_t stream) {
  ScalarPasses::jacobian(Queue("dkm_jacobian", device, stream), list, clusters, pass);
}

int64_t dkm_scratch(int64_t chunks, int64_t tensors, int most, int d, Metric metric) {
  const int64_t rows = RowPasses::scratch(chunks, most, d), scalars = ScalarPasses::scratch(chunks, tensors, most);
  return d == 1 && metric == Metric::euclidean && scalars > rows ? scalars : rows;
}

}  // namespace r2::cuda
