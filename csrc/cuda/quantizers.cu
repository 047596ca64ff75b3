// LSQ, EWGS, PACT and DoReFa on a GPU.
#include "launch.cuh"
#include "quantizers.cuh"

namespace r2::cuda {

template <class Op>
void quantize(const Queue& queue, const List& list, const Quantizer& q) {
  with_type(list.dtype, [&](auto tag) {
    queue.launch(quantize_kernel<Op, typename decltype(tag)::type>, list.chunks, kThreads, list, q);
  });
}

template <class Op>
void quantize_gradient(const Queue& queue, const List& list, const Quantizer& q) {
  with_type(list.dtype, [&](auto tag) {
    queue.launch(gradient_kernel<Op, typename decltype(tag)::type>, list.chunks, kThreads, list, q);
  });
  queue.launch(list.dtype == Dtype::f64 ? sums_kernel<Op, double> : sums_kernel<Op, float>, list.count * kBeside,
               kSummers, list, q);
}

void lsq_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("lsq_fwd", device, stream);
  with_lsq(q, [&](auto op) { quantize<decltype(op)>(queue, list, q); });
}
void lsq_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("lsq_bwd", device, stream);
  with_lsq(q, [&](auto op) { quantize_gradient<decltype(op)>(queue, list, q); });
}
void ewgs_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  quantize<Ewgs>(Queue("ewgs_fwd", device, stream), list, q);
}
void ewgs_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  quantize_gradient<Ewgs>(Queue("ewgs_bwd", device, stream), list, q);
}
void pact_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  quantize<Pact<false>>(Queue("pact_fwd", device, stream), list, q);
}
void pact_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("pact_bwd", device, stream);
  q.flag ? quantize_gradient<Pact<true>>(queue, list, q) : quantize_gradient<Pact<false>>(queue, list, q);
}
void dorefa_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("dorefa_fwd", device, stream);
  q.bits == 1 ? quantize<DorefaSign>(queue, list, q) : quantize<Dorefa>(queue, list, q);
}
void dorefa_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  Queue queue("dorefa_bwd", device, stream);
  if (q.bits == 1) return quantize<Copy>(queue, list, q);
  quantize_gradient<Dorefa>(queue, list, q);
  if (!q.flag)
    with_type(list.dtype, [&](auto tag) {
      queue.launch(maxima_kernel<typename decltype(tag)::type>, list.chunks, kThreads, list, q);
    });
}
void rescale_fwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  quantize<Rescale>(Queue("rescale_fwd", device, stream), list, q);
}
void rescale_bwd(const List& list, const Quantizer& q, int device, uintptr_t stream) {
  quantize_gradient<Rescale>(Queue("rescale_bwd", device, stream), list, q);
}

}  // namespace r2::cuda
