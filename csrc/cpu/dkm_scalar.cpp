// DKM's passes over scalars in the Euclidean metric: a constant time for each weight. Sums are kept by interval, in
// float64.
#include "dkm_sums.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

// The tables of all tensors and iterations of a pass.
template <class A>
class Tables {
 public:
  Tables(const List& list, const Clusters& clusters, const Pass& pass, int how_many, int threads)
      : keys_(IntervalTable<A>::keys_size(clusters.most)), each_(keys_ + IntervalTable<A>::numbers_size(clusters.most)),
        count_(list.count), tables_(pass.steps * list.count * int64_t(sizeof(IntervalTable<A>))),
        iterations_(pass.steps * list.count * int64_t(sizeof(Iteration<A>))),
        memory_(pass.steps * list.count * (each_ + 2 * clusters.most) * int64_t(sizeof(A))) {
    const int64_t total = pass.steps * list.count;
#pragma omp parallel num_threads(threads) if (threads > 1 && total * clusters.most > 1024)
    {
      const MergeRoom s(clusters.most);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < total; ++i) {
        IntervalTable<A>& table = tables_.template as<IntervalTable<A>>()[i];
        table.keys = memory_.template as<A>() + i * (each_ + 2 * clusters.most), table.numbers = table.keys + keys_;
        const Iteration<A> it =
            Iteration<A>(clusters, pass, list.count, i % list.count, int(i / list.count)).in_units(table.keys + each_);
        iterations_.template as<Iteration<A>>()[i] = it;
        s.spread.fill(it);
        table.fill(it, s.spread, how_many);
      }
    }
  }
  const IntervalTable<A>& of(int64_t tensor, int step = 0) const {
    return tables_.template as<IntervalTable<A>>()[step * count_ + tensor];
  }
  // in the units of the table
  const Iteration<A>& iteration(int64_t tensor, int step = 0) const {
    return iterations_.template as<Iteration<A>>()[step * count_ + tensor];
  }

 private:
  int64_t keys_, each_, count_;
  AlignedMemory tables_, iterations_, memory_;
};

// Calls f(mode) with the mode of the table as a constant.
template <class A, class F>
R2_HD auto with_mode(const IntervalTable<A>& t, F f) {
  if (t.levels <= t.kFew) return f(std::integral_constant<int, IntervalTable<A>::kFew>());
  if (t.levels <= t.kMost) return f(std::integral_constant<int, IntervalTable<A>::kMost>());
  return f(std::integral_constant<int, -1>());
}

// The records of a block of n weights, filled up to a multiple of kPad. Those that fill it up go to the interval behind
// the last.
template <class Sums, int kMode, class A>
bool make_records(const IntervalTable<A>& t, const A* w, const A* g, const A* count, int n, Room<A>& room) {
  using V = Vec<A>;
  constexpr int L = lanes<V>;
  Indices<A> equal = {};
  const int padded = (n + kPad - 1) / kPad * kPad;
  for (int i = 0; i < padded; i += L) {
    V numbers[2][4], r[Sums::kRecord];
    t.template look_up<kMode>(0, room.k + i, numbers[0]);
    if (Sums::kHowMany > 4) t.template look_up<kMode>(4, room.k + i, numbers[1]);
    const V x = load<V>(w + i) - numbers[0][kReference];
    equal |= x == V{};
    const Shares<V> shares(t, x, numbers[0][kBend]);
    Sums::record(shares, x, Sums::kGrads ? load<V>(g + i) : V{}, count ? load<V>(count + i) : splat<V>(1), numbers, r);
    for (int j = i + L > n ? n > i ? n : i : i + L; j < i + L; ++j) room.k[j] = t.size + 1;
    put_records<Sums::kRecord, A>(r, i, room);
  }
  bool any = false;
  for (int i = 0; i < L; ++i) any |= equal[i] != 0;
  return any;
}

// The sums of each interval of a chunk, and those over the weights that equal its reference.
template <int kTurns, class T, class Sums>
void sum_chunk(const IntervalTable<Acc<T>>& t, const T* w, const T* g, const float* count, int64_t n,
               Room<Acc<T>>& room, double* sums, double* out) {
  using A = Acc<T>;
  constexpr int R = Sums::kRecord;
  const int64_t intervals = t.size + 2;
  for (int64_t i = 0; i < intervals * R * kTurns; ++i) sums[i] = 0;
  for (int64_t i = 0; i < (t.size + 1) * 2 * R; ++i) out[i] = 0;
  for (int64_t row = 0; row < n; row += kBlock) {
    const int m = n - row < kBlock ? int(n - row) : kBlock, padded = (m + kPad - 1) / kPad * kPad;
    const A *ws = in_units(widened(w + row, m, room.w), padded, t.unit, room.w),
            *gs = Sums::kGrads ? widened(g + row, m, room.g) : nullptr, *counts = nullptr;
    if constexpr (sizeof(A) == 4) counts = count ? widened(count + row, m, room.count) : nullptr;
    t.locate(ws, padded, room.k);
    const bool any = with_mode(t, [&](auto mode) { return make_records<Sums, mode>(t, ws, gs, counts, m, room); });
    add_records<R, kTurns>(room, padded, sums, intervals);
    if (!any) continue;
    for (int i = 0; i < m; ++i)
      if (ws[i] == t.numbers[t.at(int(room.k[i]), kReference)]) {
        constexpr int L = lanes<Vec<A>>;
        const int at = i / L * L + place<R, A>(i % L);
        for (int p = 0; p < R; ++p) {
          const int first = p / 4 * 4;
          out[(room.k[i] * 2 + 1) * R + p] +=
              double(AttentionScale<A>::down) *
              double(room.records[first * kBlock + at * part_width(R, first) + p - first]);
        }
      }
  }
  for (int k = 0; k <= t.size; ++k)
    for (int p = 0; p < R; ++p) {
      const int first = p / 4 * 4;
      for (int turn = 0; turn < kTurns; ++turn)
        out[2 * k * R + p] +=
            sums[(first * intervals + k * part_width(R, first)) * kTurns + turn * part_width(R, first) + p - first];
      out[2 * k * R + p] *= double(AttentionScale<A>::down);
    }
}

constexpr int kMany = 8, kFewTurns = 2;
R2_HD bool many_turns(int size, int record) {
  return size * record < 256;
}  // while the copies fill no more than a third of the first cache

template <class T, class Sums>
void sum_by_interval(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  constexpr int R = Sums::kRecord;
  const int64_t each = (clusters.most + 1) * 2 * R;
  double* partial = static_cast<double*>(pass.scratch);
  threads = threads_for(list, threads);
  const Tables<A> tables(list, clusters, pass, Sums::kHowMany, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const AlignedMemory room(sizeof(Room<A>)),
        sums((clusters.most + 2 + 256 / R) * R * kMany * int64_t(sizeof(double)));
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < list.chunks; ++i) {
      const RowChunk c(list, i);
      const IntervalTable<A>& table = tables.of(c.tensor);
      const T *w = address<const T>(list.pointers, c.tensor) + c.row,
              *g = Sums::kGrads ? address<const T>(pass.grads, c.tensor) + c.row : nullptr;
      const float* counts = address<const float>(pass.counts, c.tensor);
      (many_turns(table.size, R) ? sum_chunk<kMany, T, Sums>
                                 : sum_chunk<kFewTurns, T, Sums>)(table, w, g, counts ? counts + c.row : nullptr, c.n,
                                                                  *room.template as<Room<A>>(),
                                                                  sums.template as<double>(), partial + i * each);
    }
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < list.count; ++t) {
      const Iteration<A>& it = tables.iteration(t);
      const int64_t first = tensor_of(list, t).first_chunk,
                    parts = (tensor_of(list, t).rows + list.chunk - 1) / list.chunk, numbers = (it.size + 1) * 2 * R;
      double* total = partial + first * each;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t j = 0; j < numbers; ++j) total[j] += partial[(first + part) * each + j];
      const MergeRoom s(clusters.most);
      s.spread.fill(it);
      Sums::finish(it, s, total, t, clusters, pass);
    }
  }
}

// What one weight lacks that equals centroids: its slope to them is 0, not that of a greater weight.
template <class A>
A equal_gradient(const Iteration<A>& it, const Spread& s, const IntervalTable<A>& t, int k, A g) {
  const double left = 1 / (1 + exp2(-double(t.numbers[t.at(k, kBend)]))), a = left / s.left[k];
  const auto number = [&](int which) { return double(t.numbers[t.at(k, which)]); };
  const double P = left * (g * number(kLeftO) - number(kLeftE)) + (1 - left) * (g * number(kRightO) - number(kRightE));
  double extra = 0;
  for (int j = k - 1; j >= 0 && it.old[j] == it.old[k - 1]; --j) extra += it.offset(j) * (g - it.v(j)) - P;
  return A(extra * a / it.tau);
}

template <bool kLast, int kMode, class A>
bool add_gradient(const IntervalTable<A>& t, const A* w, const A* g, int n, A twice, const Index<A>* k, A* out) {
  using V = Vec<A>;
  Indices<A> equal = {};
  for (int i = 0; i < n; i += lanes<V>) {
    V o[4], v[4];
    t.template look_up<kMode>(0, k + i, o);
    t.template look_up<kMode>(4, k + i, v);
    const V x = load<V>(w + i) - o[kReference];
    equal |= x == V{};
    const Shares<V> s(t, x, o[kBend]);
    V pull = x * (v[1] - v[0]) - (v[3] - v[2]);
    if (kLast) pull += load<V>(g + i) * (o[kRightO] - o[kLeftO]);
    store(out + i,
          load<V>(out + i) + AttentionScale<A>::down * (s.left * v[0] + s.right * v[1] + twice * s.both * pull));
  }
  bool any = false;
  for (int i = 0; i < lanes<V>; ++i) any |= equal[i] != 0;
  return any;
}

template <int kMode, class A>
void make_output(const IntervalTable<A>& t, const A* w, int n, const Index<A>* k, A* out) {
  using V = Vec<A>;
  for (int i = 0; i < n; i += lanes<V>) {
    V o[4];
    t.template look_up<kMode>(0, k + i, o);
    const Shares<V> s(t, load<V>(w + i) - o[kReference], o[kBend]);
    store(out + i, AttentionScale<A>::down * (s.left * o[kLeftO] + s.right * o[kRightO]));
  }
}

// make(tensor, w, g, n, room) fills room.out for a block of n weights, filled up; it is written where the weights lie.
template <class T, class Make>
void map_blocks(const List& list, const Pass& pass, const Tables<Acc<T>>& tables, int threads, Make make) {
  using A = Acc<T>;
  const int64_t* targets = static_cast<const int64_t*>(pass.target);
  for (int64_t t = 0; t < list.count; ++t)
    ask_for_huge_pages(reinterpret_cast<void*>(targets[t]), tensor_of(list, t).numel * sizeof(T));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const AlignedMemory memory(sizeof(Room<A>));
    Room<A>& room = *memory.template as<Room<A>>();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < list.chunks; ++i) {
      const RowChunk c(list, i);
      const T *w = address<const T>(list.pointers, c.tensor) + c.row,
              *g = pass.grads ? address<const T>(pass.grads, c.tensor) + c.row : nullptr;
      T* out = address<T>(targets, c.tensor) + c.row;
      for (int64_t row = 0; row < c.n; row += kBlock) {
        const int n = c.n - row < kBlock ? int(c.n - row) : kBlock, padded = (n + kPad - 1) / kPad * kPad;
        const A* ws = in_units(widened(w + row, n, room.w), padded, tables.of(c.tensor).unit, room.w);
        make(c.tensor, ws, g ? widened(g + row, n, room.g) : nullptr, padded, room);
        narrowed(room.out, n, out + row);
      }
    }
  }
}

template <class T>
void output_of(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  threads = threads_for(list, threads);
  const Tables<A> tables(list, clusters, pass, 4, threads);
  map_blocks<T>(list, pass, tables, threads, [&](int64_t tensor, const A* w, const A*, int n, Room<A>& room) {
    const IntervalTable<A>& t = tables.of(tensor);
    t.locate(w, n, room.k);
    with_mode(t, [&](auto mode) { make_output<mode>(t, w, n, room.k, room.out); });
    in_units(room.out, n, A(1) / t.unit, room.out);
  });
}

template <class T>
void gradient_of(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  threads = threads_for(list, threads);
  const Tables<A> tables(list, clusters, pass, 8, threads);
  map_blocks<T>(list, pass, tables, threads, [&](int64_t tensor, const A* w, const A* g, int n, Room<A>& room) {
    for (int i = 0; i < n; ++i) room.out[i] = 0;
    for (int step = 0; step < pass.steps; ++step) {
      const IntervalTable<A>& t = tables.of(tensor, step);
      t.locate(w, n, room.k);
      const bool any = with_mode(t, [&](auto mode) {
        return g && step == 0 ? add_gradient<true, mode>(t, w, g, n, t.slope * A(kLn2), room.k, room.out)
                              : add_gradient<false, mode>(t, w, g, n, t.slope * A(kLn2), room.k, room.out);
      });
      if (!any) continue;
      const Iteration<A>& it = tables.iteration(tensor, step);
      const AlignedMemory memory(3 * (clusters.most + 1) * int64_t(sizeof(double)));
      double* at = memory.as<double>();
      const Spread s = {at, at + clusters.most + 1, at + 2 * (clusters.most + 1)};
      s.fill(it);
      for (int i = 0; i < n; ++i)
        if (w[i] == t.numbers[t.at(int(room.k[i]), kReference)])
          room.out[i] += equal_gradient(it, s, t, int(room.k[i]), g && step == 0 ? g[i] : A(0));
    }
  });
}

void ScalarPasses::update(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { sum_by_interval<decltype(like), UpdateSums>(list, clusters, pass, threads); });
}
void ScalarPasses::upstream(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype,
            [&](auto like) { sum_by_interval<decltype(like), UpstreamSums>(list, clusters, pass, threads); });
}
void ScalarPasses::recur(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) {
    using T = decltype(like);
    pass.grads ? sum_by_interval<T, RecurSums<true>>(list, clusters, pass, threads)
               : sum_by_interval<T, RecurSums<false>>(list, clusters, pass, threads);
  });
}
void ScalarPasses::jacobian(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype,
            [&](auto like) { sum_by_interval<decltype(like), JacobianSums>(list, clusters, pass, threads); });
}
void ScalarPasses::output(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { output_of<decltype(like)>(list, clusters, pass, threads); });
}
void ScalarPasses::gradient(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { gradient_of<decltype(like)>(list, clusters, pass, threads); });
}
int64_t ScalarPasses::scratch(int most) { return (most + 1) * 2 * kMostRecord * int64_t(sizeof(double)); }

}  // namespace R2_ISA
}  // namespace r2
