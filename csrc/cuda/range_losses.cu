// The range losses on a GPU.
#include "launch.cuh"
#include "range_losses.cuh"

namespace r2::cuda {

template <class Op>
void soft_forward(const char* op, const List& list, const Forward& f, int device, uintptr_t stream) {
  Queue queue(op, device, stream);
  f.flag ? partials<SoftReader<true>>(queue, list, f) : partials<SoftReader<false>>(queue, list, f);
  merge<Op>(queue, list, f);
}

void l_inf_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  loss_forward<LInfReader, LInfOp>("l_inf_fwd", list, f, device, stream);
}
void l_inf_bwd(const List& list, const Backward& b, int device, uintptr_t stream) {
  loss_backward<LInfOp>("l_inf_bwd", list, b, device, stream);
}

void margin_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  loss_forward<MarginReader, MarginOp>("margin_fwd", list, f, device, stream);
}
void margin_bwd(const List& list, const Backward& b, int device, uintptr_t stream) {
  loss_backward<MarginOp>("margin_bwd", list, b, device, stream);
}

void soft_min_max_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  soft_forward<SoftOp<false>>("soft_min_max_fwd", list, f, device, stream);
}
void soft_min_max_bwd(const List& list, const Backward& b, int device, uintptr_t stream) {
  loss_backward<SoftOp<false>>("soft_min_max_bwd", list, b, device, stream);
}

void soft_extrema_fwd(const List& list, const Forward& f, int device, uintptr_t stream) {
  soft_forward<SoftOp<true>>("soft_extrema_fwd", list, f, device, stream);
}
void soft_extrema_bwd(const List& list, const Backward& b, int device, uintptr_t stream) {
  loss_backward<SoftOp<true>>("soft_extrema_bwd", list, b, device, stream);
}

}  // namespace r2::cuda
