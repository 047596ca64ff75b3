// DKM over rows of d numbers on a GPU: which kernel serves which dtype and width.
#include "dkm_passes.cuh"
#include "dkm_row_maps.cuh"
#include "dkm_row_sums.cuh"

namespace r2::cuda {

namespace {

// run(A, D) for a list: numbers of a row in registers in float32, d up to 8
template <class Run>
void with_width(const List& list, Run run) {
  const auto any = std::integral_constant<int, 0>{};
  if (list.dtype == Dtype::f64) return run(Tag<double>{}, any);
  if (list.d == 1) return run(Tag<float>{}, std::integral_constant<int, 1>{});
  if (list.d == 2) return run(Tag<float>{}, std::integral_constant<int, 2>{});
  if (list.d <= 4) return run(Tag<float>{}, std::integral_constant<int, 4>{});
  if (list.d <= 8) return run(Tag<float>{}, std::integral_constant<int, 8>{});
  run(Tag<float>{}, any);
}

int64_t numbers_of(int most, int d) { return int64_t(most) * (d == 1 ? 4 : d + 1); }

template <RowSum kOp>
void sum(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  const int64_t numbers = numbers_of(clusters.most, list.d);
  const int slices = slices_of(numbers);
  with_width(list, [&](auto type, auto width) {
    using A = typename decltype(type)::type;
    launch(queue, dkm_row_sums_kernel<kOp, width, A>, list.chunks, kThreads, 0, list, clusters, pass, numbers);
  });
  auto kernel = list.dtype == Dtype::f64 ? dkm_row_merge_kernel<kOp, double> : dkm_row_merge_kernel<kOp, float>;
  launch(queue, kernel, list.count * slices, kMergeThreads, 0, list, clusters, pass, numbers, slices);
}

}  // namespace

#define R2_MAP(pass, kernel)                                                                                    \
  void RowPasses::pass(const Queue& queue, const List& list, const Clusters& clusters, const Pass& p) {         \
    with_width(list, [&](auto type, auto width) {                                                               \
      launch(queue, kernel<width, typename decltype(type)::type>, list.chunks, kThreads, 0, list, clusters, p); \
    });                                                                                                         \
  }
R2_MAP(output, dkm_row_output_kernel)
R2_MAP(gradient, dkm_row_gradient_kernel)
R2_MAP(assign, dkm_assign_kernel)

int64_t RowPasses::scratch(int64_t chunks, int most, int d) { return chunks * Scratch::bytes(numbers_of(most, d)); }
void RowPasses::update(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<RowSum::update>(queue, list, clusters, pass);
}
void RowPasses::upstream(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<RowSum::upstream>(queue, list, clusters, pass);
}
void RowPasses::recur(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  pass.grads ? sum<RowSum::recur_last>(queue, list, clusters, pass) : sum<RowSum::recur>(queue, list, clusters, pass);
}

}  // namespace r2::cuda
