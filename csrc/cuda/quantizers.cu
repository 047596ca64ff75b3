// LSQ, EWGS, PACT and DoReFa on a GPU.
#include "launch.cuh"
#include "quantizers.cuh"

namespace r2::cuda {

template <class Op>
void forward(const Queue& queue, const List& list, const Quantizer& q) {
  with_type(list.dtype, [&](auto tag) { queue.launch(quantize_kernel<Op, typename decltype(tag)::type>, list.chunks, kThreads, list, q); });
}

template <class Op>
void backward(const Queue& queue, const List& list, const Quantizer& q) {
  with_type(list.dtype, [&](auto tag) { queue.launch(gradient_kernel<Op, typename decltype(tag)::type>, list.chunks, kThreads, list, q); });
  queue.launch(list.dtype == Dtype::f64 ? sums_kernel<Op, double> : sums_kernel<Op, float>, list.count * kBeside, kSummers, list, q);
}

void lsq_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("lsq_fwd", device, stream);
  q.bits == 1 && q.flag ? forward<Lsq<true>>(queue, list, q) : forward<Lsq<false>>(queue, list, q);
}
void lsq_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("lsq_bwd", device, stream);
  q.bits == 1 && q.flag ? backward<Lsq<true>>(queue, list, q) : backward<Lsq<false>>(queue, list, q);
}
void ewgs_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) { forward<Ewgs>(Queue("ewgs_fwd", device, stream), list, q); }
void ewgs_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) { backward<Ewgs>(Queue("ewgs_bwd", device, stream), list, q); }
void pact_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) { forward<Pact<false>>(Queue("pact_fwd", device, stream), list, q); }
void pact_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("pact_bwd", device, stream);
  q.flag ? backward<Pact<true>>(queue, list, q) : backward<Pact<false>>(queue, list, q);
}
void dorefa_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("dorefa_fwd", device, stream);
  q.bits == 1 ? forward<DorefaSign>(queue, list, q) : forward<Dorefa>(queue, list, q);
}
void dorefa_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("dorefa_bwd", device, stream);
  if (q.bits == 1) return forward<Copy>(queue, list, q);
  backward<Dorefa>(queue, list, q);
  if (!q.flag) with_type(list.dtype, [&](auto tag) { queue.launch(maxima_kernel<typename decltype(tag)::type>, list.chunks, kThreads, list, q); });
}

}  // namespace r2::cuda
