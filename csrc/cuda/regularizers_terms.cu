// bin_reg, msqe, partial_l2, and several regularizers from one launch, on a GPU.
#include "launch.cuh"
#include "regularizers_terms.cuh"

namespace r2::cuda {

void terms_fwd(const List& list, const Terms<Forward>& terms, int device, uintptr_t stream) {
  Queue queue("terms_fwd", device, stream);
  const Forward& f = terms.of[0];
  if (terms.count == 1 && terms.term[0] == Term::msqe) {
    partials<MsqeReader>(queue, list, f);
  } else if (terms.count == 1 && terms.term[0] == Term::partial_l2) {
    partials<PartialL2Reader>(queue, list, f);
  } else if (terms.count == 1 && terms.term[0] == Term::bin_reg) {
    with_type(list.dtype, [&](auto tag) {
      queue.launch(bins_kernel<typename decltype(tag)::type>, list.chunks, kThreads, list, f, kBinRoom);
    });
  } else {
    with_type(list.dtype, [&](auto tag) {
      queue.launch(terms_kernel<typename decltype(tag)::type>, list.chunks, kThreads, list, terms, kBinRoomOfTerms);
    });
  }
  queue.launch(list.dtype == Dtype::f64 ? merge_terms_kernel<double> : merge_terms_kernel<float>,
               list.count * terms.count, kMergers, list, terms);
}

void terms_bwd(const List& list, const Terms<Backward>& terms, int device, uintptr_t stream) {
  Queue queue("terms_bwd", device, stream);
  const Backward& b = terms.of[0];
  if (terms.count == 1 && terms.term[0] == Term::msqe) return map<MsqeOp>(queue, list, b);
  if (terms.count == 1 && terms.term[0] == Term::partial_l2) return map<PartialL2Op>(queue, list, b);
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (terms.count == 1 && terms.term[0] == Term::bin_reg) {
      queue.launch(b.add ? bins_map_kernel<T, true> : bins_map_kernel<T, false>, list.chunks, kThreads, list, b);
    } else {
      queue.launch(b.add ? terms_map_kernel<T, true> : terms_map_kernel<T, false>, list.chunks, kThreads, list, terms);
    }
  });
}

}  // namespace r2::cuda
