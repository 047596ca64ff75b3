// The shared memory of DKM's passes over scalars, counted on the host.
#pragma once
#include "dkm_maps.cuh"
#include "dkm_merges.cuh"

namespace r2::cuda {

constexpr size_t kMostBins = 34 * 1024;  // bytes for each warp

// Own bins for each lane where they fit, else a copy for four lanes of two warps, and then fewer bins. The blocks to a
// multiprocessor are a power of two, as the chunks of a list make whole waves of these (FEWEST_PROGRAMS of
// r2kernels/lists.py).
template <class Op, class A>
Shape choose(int most, size_t limit, bool far) {
  Shape shape = {most + 1, true, 0, 0, 0};
  const size_t others = SumsRoom<Op, A>::bytes(most, 0, far), record = sizeof(Numbers<A, Op::kRecord>);
  auto fit = [&](int blocks, int warps) {
    const size_t bins = records_of(shape.bins, shape.own, warps) * record;
    return bins <= warps * kMostBins && others + bins <= (limit + kReserved) / blocks - kReserved;
  };
  shape.own = fit(1, 1);
  const int least = shape.own ? 1 : 2;
  while (shape.bins > 32 && !fit(1, least)) shape.bins = (shape.bins + 1) / 2;
  for (int blocks = 4; blocks > 0; blocks /= 2)
    for (int warps = shape.own ? kMostWarps<true> : kMostWarps<false>; warps > 0; warps -= least)
      if (fit(blocks, warps) && blocks * warps > shape.blocks * shape.warps && blocks * warps <= 16)
        shape.blocks = blocks, shape.warps = warps;
  if (shape.blocks == 0) shape.blocks = 1, shape.warps = least;
  const int sharing = shape.own ? 1 : 8, often = 128 > 8 * shape.bins ? 128 : 8 * shape.bins;
  shape.flush = often / sharing / (sizeof(A) == 8 ? 4 : 8);
  return shape;
}

// Of dkm_tables_kernel: the tables, and what they are worked out in.
template <class Op, class A>
size_t tables_bytes(int most) {
  Space space = {};
  const Tables<Op, A> tables(space, most);
  Groups<Op::kGroups>(space, most);
  return space.used;
}

// A pass that sums, and what its kernels are given. Where Pass.scratch has room for that, what does not fit in shared
// memory lies there: the tables while the sums are made (far), and what the tables and the merge are worked out in.
template <class Op, class MergeOp, class A>
struct SumPlan {
  bool far, tables_outside, merge_outside;
  Shape shape;
  size_t tables, sums, merge;

  // limit: bytes of a block, with those that kernels declare
  SumPlan(int most, size_t limit, bool outside)
      : far(outside && SumsRoom<Op, A>::bytes(most, records_of(32, false, 2), false) > limit),
        tables_outside(outside && tables_bytes<Op, A>(most) > limit),
        merge_outside(outside && merge_bytes(most) > limit), shape(choose<Op, A>(most, limit, far)),
        tables(tables_outside ? 0 : tables_bytes<Op, A>(most)),
        sums(SumsRoom<Op, A>::bytes(most, records_of(shape.bins, shape.own, shape.warps), far)),
        merge(merge_outside ? 0 : merge_bytes(most) - sizeof(AddingUp)) {}
  static size_t merge_bytes(int most) { return Merge<MergeOp::kGroups>::bytes(most) + sizeof(AddingUp); }
  bool fits(size_t limit) const { return tables <= limit && sums <= limit && merge + sizeof(AddingUp) <= limit; }
};

// Whether all passes of training find room.
template <class A>
bool fits(int most, size_t limit) {
  return SumPlan<UpdateSums, UpdateMerge, A>(most, limit, false).fits(limit) &&
         SumPlan<UpstreamSums, UpstreamMerge, A>(most, limit, false).fits(limit) &&
         SumPlan<RecurSums<true>, RecurMerge<true>, A>(most, limit, false).fits(limit) &&
         tables_bytes<GradientMap, A>(most) <= limit;
}

// What the tables and the merge of JacobianSums are worked out in, where they may not find room in shared memory.
inline size_t outside_bytes(int most) { return most > 512 ? Merge<JacobianMerge::kGroups>::bytes(most) : 0; }

// Whether a block has room for the tables of all steps, to keep the gradient in registers over them.
template <class A>
bool together(int most, int steps, size_t limit) {
  return Tables<GradientMap, A>::bytes(most) * steps <= limit;
}

// of Rooms, for any pass and dtype
inline int64_t room_bytes(int most) {
  return int64_t(Tables<RecurSums<true>, double>::bytes(most) + outside_bytes(most));
}

}  // namespace r2::cuda
