// The range losses on a GPU.
#include "launch.cuh"
#include "readers.cuh"

namespace r2::cuda {

template <class Reader, class Op>
void forward(const char* op, const List& list, const Forward& f, int device, uintptr_t stream) {
  Queue queue(op, device, stream);
  partials<Reader>(queue, list, f);
  merge<Op>(queue, list, f);
}

template <class Op>
void backward(const char* op, const List& list, const Backward& b, int device, uintptr_t stream) {
  map<Op>(Queue(op, device, stream), list, b);
}

template <class Op>
void soft_forward(const char* op, const List& list, const Forward& f, int device, uintptr_t stream) {
  Queue queue(op, device, stream);
  f.flag ? partials<SoftReader<true>>(queue, list, f) : partials<SoftReader<false>>(queue, list, f);
  merge<Op>(queue, list, f);
}

#define R2_FORWARD(op, run) \
  void op(const List& list, const Forward& f, int device, uintptr_t stream) { run(#op, list, f, device, stream); }
#define R2_BACKWARD(op, Op) \
  void op(const List& list, const Backward& b, int device, uintptr_t stream) { backward<Op>(#op, list, b, device, stream); }

R2_FORWARD(l_inf_fwd, (forward<LInfReader, LInfOp>))
R2_FORWARD(margin_fwd, (forward<MarginReader, MarginOp>))
R2_FORWARD(soft_min_max_fwd, soft_forward<SoftOp<false>>)
R2_FORWARD(soft_extrema_fwd, soft_forward<SoftOp<true>>)
R2_FORWARD(kure_fwd, (forward<MomentsReader, KureOp>))
R2_FORWARD(weight_stats_fwd, (forward<MomentsReader, WeightStatsOp>))

R2_BACKWARD(l_inf_bwd, LInfOp)
R2_BACKWARD(margin_bwd, MarginOp)
R2_BACKWARD(soft_min_max_bwd, SoftOp<false>)
R2_BACKWARD(soft_extrema_bwd, SoftOp<true>)
R2_BACKWARD(kure_bwd, KureOp)

}  // namespace r2::cuda
