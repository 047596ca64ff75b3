// DKM over scalars in the Euclidean metric, on a GPU: a constant time for each weight.
#include "dkm_passes.cuh"
#include "dkm_shared.cuh"

namespace r2::cuda {

namespace {

// The tables of a pass, behind so many bytes of Pass.scratch. `bytes`: of the kernel; outside: behind each table
template <class Op, class A>
Rooms make_tables(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass, int64_t sums,
                  size_t bytes, size_t outside = 0, bool is_outside = false) {
  const auto tables = int64_t(Tables<Op, A>::bytes(clusters.most));
  const Rooms rooms = {static_cast<char*>(pass.scratch) + (sums + 15) / 16 * 16, tables + int64_t(outside), tables};
  launch(queue, dkm_tables_kernel<Op, A>, list.count * pass.steps, kTableThreads, bytes, list, clusters, pass, rooms,
         is_outside);
  return rooms;
}

// kOutside: where shared memory is too small to work in, Pass.scratch has room for that
template <class Op, class MergeOp, bool kOutside = false>
void sum(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  const int most = clusters.most;
  const int64_t numbers = int64_t(most + 1) * Op::kSums;
  const size_t outside = kOutside ? outside_bytes(most) : 0;
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const SumPlan<Op, MergeOp, A> plan(most, shared_limit(queue), outside > 0);
    const Rooms rooms = make_tables<Op, A>(queue, list, clusters, pass, list.chunks * Scratch::bytes(numbers),
                                           plan.tables, outside, plan.tables_outside);
    auto kernel = plan.shape.own ? dkm_sums_kernel<Op, true, false, T> : dkm_sums_kernel<Op, false, false, T>;
    if constexpr (kOutside) kernel = plan.far ? dkm_sums_kernel<Op, false, true, T> : kernel;
    launch(queue, kernel, list.chunks, 32 * plan.shape.warps, plan.sums, list, clusters, pass, plan.shape, numbers,
           rooms);
    const int slices = slices_of(numbers);
    launch(queue, dkm_merge_kernel<MergeOp, A>, list.count * slices, kMergeThreads, plan.merge, list, clusters, pass,
           numbers, int(Op::kSums), slices, rooms, plan.merge_outside);
  });
}

}  // namespace

bool ScalarPasses::serves(const Queue& queue, const List& list, const Clusters& clusters) {
  if (list.d != 1 || clusters.metric != Metric::euclidean) return false;
  const size_t limit = shared_limit(queue);
  return list.dtype == Dtype::f64 ? fits<double>(clusters.most, limit) : fits<float>(clusters.most, limit);
}

int64_t ScalarPasses::scratch(int64_t chunks, int64_t tensors, int most) {
  return chunks * Scratch::bytes(int64_t(most + 1) * JacobianSums::kSums) + 16 + tensors * room_bytes(most);
}

void ScalarPasses::update(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<UpdateSums, UpdateMerge>(queue, list, clusters, pass);
}
void ScalarPasses::upstream(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<UpstreamSums, UpstreamMerge>(queue, list, clusters, pass);
}
void ScalarPasses::recur(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  pass.grads ? sum<RecurSums<true>, RecurMerge<true>>(queue, list, clusters, pass)
             : sum<RecurSums<false>, RecurMerge<false>>(queue, list, clusters, pass);
}
void ScalarPasses::jacobian(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  sum<JacobianSums, JacobianMerge, true>(queue, list, clusters, pass);
}

void ScalarPasses::output(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rooms rooms =
        make_tables<OutputMap, Acc<T>>(queue, list, clusters, pass, 0, tables_bytes<OutputMap, Acc<T>>(clusters.most));
    launch(queue, dkm_output_kernel<T>, list.chunks, kThreads, size_t(rooms.tables), list, clusters, pass, rooms);
  });
}

void ScalarPasses::gradient(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass) {
  with_type(list.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Rooms rooms =
        make_tables<GradientMap, A>(queue, list, clusters, pass, 0, tables_bytes<GradientMap, A>(clusters.most));
    const bool at_once = together<A>(clusters.most, pass.steps, shared_limit(queue));
    launch(queue, at_once ? dkm_gradient_kernel<true, T> : dkm_gradient_kernel<false, T>, list.chunks, kThreads,
           size_t(rooms.tables) * (at_once ? pass.steps : 1), list, clusters, pass, rooms);
  });
}

}  // namespace r2::cuda
