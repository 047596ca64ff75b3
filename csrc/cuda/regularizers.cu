// kure and weight_stats on a GPU.
#include "launch.cuh"
#include "regularizers.cuh"

namespace r2::cuda {

void kure_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  loss_forward<MomentsReader, KureOp>("kure_fwd", list, f, device, stream);
}
void kure_bwd(const List& list, const Backward& b, int device, uintptr_t stream) {
  loss_backward<KureOp>("kure_bwd", list, b, device, stream);
}

void weight_stats_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  loss_forward<MomentsReader, WeightStatsOp>("weight_stats_fwd", list, f, device, stream);
}

}  // namespace r2::cuda
