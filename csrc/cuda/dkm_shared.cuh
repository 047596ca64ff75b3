// The shared memory of DKM's passes over scalars, counted on the host.
#pragma once
#include "dkm_maps.cuh"
#include "dkm_merges.cuh"

namespace r2::cuda {

constexpr size_t kMostBins = 34 * 1024;  // bytes of a warp's

// As many copies of the bins as fit, at the least 8, and then fewer bins. The blocks to a multiprocessor are a power of
// two, as the chunks of a list make whole waves of these (FEWEST_PROGRAMS of r2kernels/lists.py).
template <class Op, class A>
Shape choose(int most, size_t limit, bool far) {
  Shape shape = {most + 1, 5, 0, 1, 1};
  const size_t others = SumsRoom<Op, A>::bytes(most, 0, far), record = sizeof(Numbers<A, Op::kRecord>);
  auto fit = [&](int blocks, int warps) {
    const size_t bins = (size_t(shape.bins) << shape.copies) * record;
    return bins <= kMostBins && others + warps * bins <= (limit + kReserved) / blocks - kReserved;
  };
  while (shape.copies > 3 && !fit(1, 1)) --shape.copies;
  while (shape.bins > 32 && !fit(1, 1)) shape.bins = (shape.bins + 1) / 2;
  for (int blocks = 4; blocks > 0; blocks /= 2)
    for (int warps = kWarps; warps > 0; --warps)
      if (fit(blocks, warps) && blocks * warps > shape.blocks * shape.warps) shape.blocks = blocks, shape.warps = warps;
  const int copies = 1 << (5 - shape.copies), often = 128 > 8 * shape.bins ? 128 : 8 * shape.bins;
  shape.flush = often / copies / (sizeof(A) == 8 ? 4 : 8);
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
      : far(outside && SumsRoom<Op, A>::bytes(most, 32 << 3, false) > limit),
        tables_outside(outside && tables_bytes<Op, A>(most) > limit),
        merge_outside(outside && merge_bytes(most) > limit), shape(choose<Op, A>(most, limit, far)),
        tables(tables_outside ? 0 : tables_bytes<Op, A>(most)),
        sums(SumsRoom<Op, A>::bytes(most, shape.records(), far)),
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
