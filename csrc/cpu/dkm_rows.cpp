// DKM's passes for any metric over rows of d numbers, and the assignment.
#include "nearest.h"
#include "skeletons.h"

#include "../dkm.h"

namespace r2 {
inline namespace R2_ISA {

// rows whose sums stay in lanes of the accumulator's type before they go to float64: 64 to a lane of float32
constexpr int64_t kFold = 64 * lanes<Vec<float>>;

// The centroids of all tensors and iterations of a pass, as groups read them.
template <class A>
class AllCentroids {
 public:
  AllCentroids(const List& list, const Clusters& clusters, const Pass& pass)
      : count_(list.count), each_(int64_t(clusters.most) * list.d),
        memory_(pass.steps * list.count * 3 * each_ * int64_t(sizeof(A))),
        centroids_(pass.steps * list.count * int64_t(sizeof(Centroids<A>))) {
    const int d = list.d;
    const bool squared = clusters.metric == Metric::sqeuclidean;
    for (int64_t i = 0; i < pass.steps * list.count; ++i) {
      const int64_t tensor = i % list.count, size = clusters.size[tensor];
      const A given = static_cast<const A*>(clusters.tau)[tensor], unit = unit_of(given, squared);
      const double tau = given > A(0) ? double(given) * unit * (squared ? unit : A(1)) : double(NAN);
      A* room = memory_.template as<A>() + 3 * i * each_;
      const auto lengths = [&](const void* all, A* to) {
        const A* from = all ? static_cast<const A*>(all) + i * each_ : nullptr;
        return from ? in_units(from, int(size * d), unit, to) : nullptr;
      };
      A* v = room + 2 * each_;
      if (pass.upstream)
        for (int64_t j = 0; j < size; ++j) {
          const A S = static_cast<const A*>(pass.moments)[i * clusters.most + j];
          for (int m = 0; m < d; ++m)
            v[j * d + m] = S == A(0) ? A(0) : static_cast<const A*>(pass.upstream)[i * each_ + j * d + m] / S;
        }
      centroids_.template as<Centroids<A>>()[i] = {lengths(pass.old, room),
                                                   lengths(pass.fresh, room + each_),
                                                   v,
                                                   size,
                                                   A(kLog2e / tau),
                                                   A(1 / tau),
                                                   squared,
                                                   unit};
    }
  }
  const Centroids<A>& of(int64_t tensor, int step = 0) const {
    return centroids_.template as<Centroids<A>>()[step * count_ + tensor];
  }

 private:
  int64_t count_, each_;
  AlignedMemory memory_, centroids_;
};

// What one thread works in: blocks (d, kRows), and vectors for every centroid.
template <class A>
struct Room {
  AlignedMemory blocks, vectors;
  A *x, *g, *out, *count;
  Vec<A>* sums;
  RowGroup<A> group;
  Room(int d, int64_t most, int width)
      : blocks((3 * d + 1) * kRows * int64_t(sizeof(A))),
        vectors((3 * kVectors + width) * most * int64_t(sizeof(Vec<A>))) {
    x = blocks.template as<A>(), g = x + d * kRows, out = g + d * kRows, count = out + d * kRows;
    group.distance = vectors.template as<Vec<A>>(), group.e = group.distance + kVectors * most;
    group.pull = group.e + kVectors * most, sums = group.pull + kVectors * most;
  }
};

// visit(column, row of the block, first element in memory, length) for n rows from `row` on, in runs of consecutive
// memory
template <class Visit>
R2_HD void each_run_of(const Tensor& tensor, int d, int64_t row, int n, Visit visit) {
  const int64_t run = tensor.run;
  for (int i = 0; i < n;) {
    const int64_t within = (row + i) % run, base = (row + i) / run * d * run + within, left = run - within;
    const int length = left < n - i ? int(left) : n - i;
    for (int m = 0; m < d; ++m) visit(m, i, base + m * run, length);
    i += length;
  }
}

// Number m of each of n rows at to + m * kRows, 0 behind the last.
template <int kD, class A, class T>
R2_HD void take_rows(const Tensor& tensor, const T* from, int d, int64_t row, int n, A* to) {
  d = kD ? kD : d;
  if (tensor.run == 1) {
    const T* at = from + row * d;
    for (int m = 0; m < d; ++m)
      for (int i = 0; i < n; ++i) to[m * kRows + i] = widen(at[i * d + m]);
  } else {
    each_run_of(tensor, d, row, n, [&](int m, int first, int64_t at, int length) {
      for (int i = 0; i < length; ++i) to[m * kRows + first + i] = widen(from[at + i]);
    });
  }
  if (n < kRows)
    for (int m = 0; m < d; ++m)
      for (int i = n; i < kRows; ++i) to[m * kRows + i] = 0;
}

template <int kD, class A, class T>
R2_HD void put_rows(const Tensor& tensor, const A* from, int d, int64_t row, int n, T* to) {
  d = kD ? kD : d;
  if (tensor.run == 1) {
    T* at = to + row * d;
    for (int i = 0; i < n; ++i)
      for (int m = 0; m < d; ++m) at[i * d + m] = narrow<T>(from[m * kRows + i]);
    return;
  }
  each_run_of(tensor, d, row, n, [&](int m, int first, int64_t at, int length) {
    for (int i = 0; i < length; ++i) to[at + i] = narrow<T>(from[m * kRows + first + i]);
  });
}

// The group of row i of a block; `g` where the pass has gradients.
template <class A>
R2_HD RowGroup<A>& group_at(Room<A>& room, int i, bool g) {
  RowGroup<A>& p = room.group;
  p.x = room.x + i, p.g = g ? room.g + i : nullptr, p.count = room.count + i;
  return p;
}

template <RowSum kSum, int kD, class A>
void sum_block(Room<A>& room, const Centroids<A>& c, int d, int n, bool g) {
  for (int i = 0; i < n; i += RowGroup<A>::rows) {
    RowGroup<A>& p = group_at(room, i, g);
    attend<kD>(p, c, d);
    if (kSum == RowSum::recur) find_pull<kD>(p, c, d);
    add_to_sums<kSum, kD>(p, c, d, room.sums);
  }
}

template <bool kGradient, int kD, class A>
void map_block(Room<A>& room, const Centroids<A>& c, int d, int n, bool g) {
  for (int i = 0; i < n; i += RowGroup<A>::rows) {
    RowGroup<A>& p = group_at(room, i, g);
    attend<kD>(p, c, d);
    if (kGradient) find_pull<kD>(p, c, d);
    add_means<kGradient, kD>(p, c, kGradient ? c.v : c.fresh, d, room.out + i);
  }
}

template <class T, RowSum kSum>
void sum_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  constexpr bool alone = kSum == RowSum::update;
  const int d = list.d, width = d + alone;
  threads = threads_for(list, threads);
  const AllCentroids<A> all(list, clusters, pass);
  const int64_t each = int64_t(clusters.most) * width;
  double* partial = static_cast<double*>(pass.scratch);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room<A> room(d, clusters.most, width);
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < list.chunks; ++chunk) {
      const RowChunk c(list, chunk);
      const Tensor& tensor = tensor_of(list, c.tensor);
      const Centroids<A>& centroids = all.of(c.tensor);
      const int64_t size = centroids.size;
      const T *w = address<const T>(list.pointers, c.tensor),
              *g = kSum == RowSum::update ? nullptr : address<const T>(pass.grads, c.tensor);
      const float* counts = address<const float>(pass.counts, c.tensor);
      double* sums = partial + chunk * each;
      for (int64_t i = 0; i < each; ++i) sums[i] = 0;
      for (int64_t i = 0; i < width * size; ++i) room.sums[i] = Vec<A>{};
      for (int64_t row = c.row; row < c.row + c.n; row += kRows) {
        const int n = c.row + c.n - row < kRows ? int(c.row + c.n - row) : kRows;
        if (counts)
          for (int i = 0; i < n; ++i) room.count[i] = A(counts[row + i]);
        else if (row == c.row)
          for (int i = 0; i < kRows; ++i) room.count[i] = 1;
        for (int i = n; i < kRows; ++i) room.count[i] = 0;
        with_width<A>(d, [&](auto kD) {
          take_rows<kD>(tensor, w, d, row, n, room.x);
          in_units(room.x, kRows * d, centroids.unit, room.x);
          if (g) take_rows<kD>(tensor, g, d, row, n, room.g);
          sum_block<kSum, kD>(room, centroids, d, n, g != nullptr);
        });
        if ((row - c.row + kRows) % kFold != 0 && row + kRows < c.row + c.n) continue;
        for (int m = 0; m < width; ++m)
          for (int64_t j = 0; j < size; ++j) {
            Vec<A>& lane = room.sums[m * size + j];
            sums[j * width + m] += double(AttentionScale<A>::down) * sum(lane), lane = Vec<A>{};
          }
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < list.count; ++t) {
      const int64_t first = tensor_of(list, t).first_chunk,
                    parts = (tensor_of(list, t).rows + list.chunk - 1) / list.chunk, at = t * clusters.most;
      double* total = partial + first * each;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t j = 0; j < each; ++j) total[j] += partial[(first + part) * each + j];
      const A* old = static_cast<const A*>(pass.old) + at * d;
      A* out = static_cast<A*>(pass.out) + at * d;
      for (int64_t j = 0; j < clusters.most; ++j) {
        const double *sums = total + j * width, S = sums[0];
        const bool real = j < clusters.size[t], empty = alone && A(S) == 0;
        if (alone) static_cast<A*>(pass.out_moments)[at + j] = real ? A(S) : A(0);
        for (int m = 0; m < d; ++m)
          out[j * d + m] = !real   ? A(0)
                           : empty ? old[j * d + m]
                           : alone ? A(double(old[j * d + m]) + sums[1 + m] / S / double(all.of(t).unit))
                                   : A(sums[m]);
      }
    }
  }
}

template <class T, bool kGradient>
void map_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  const int d = list.d;
  threads = threads_for(list, threads);
  const AllCentroids<A> all(list, clusters, pass);
  const int64_t* targets = static_cast<const int64_t*>(pass.target);
  for (int64_t t = 0; t < list.count; ++t)
    ask_for_huge_pages(reinterpret_cast<void*>(targets[t]), tensor_of(list, t).numel * sizeof(T));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room<A> room(d, clusters.most, 0);
    for (int i = 0; i < kRows; ++i) room.count[i] = 1;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < list.chunks; ++chunk) {
      const RowChunk c(list, chunk);
      const Tensor& tensor = tensor_of(list, c.tensor);
      const A unit = all.of(c.tensor).unit;
      const T *w = address<const T>(list.pointers, c.tensor), *g = address<const T>(pass.grads, c.tensor);
      T* out = address<T>(targets, c.tensor);
      for (int64_t row = c.row; row < c.row + c.n; row += kRows) {
        const int n = c.row + c.n - row < kRows ? int(c.row + c.n - row) : kRows;
        for (int i = 0; i < kRows * d; ++i) room.out[i] = 0;
        with_width<A>(d, [&](auto kD) {
          take_rows<kD>(tensor, w, d, row, n, room.x);
          in_units(room.x, kRows * d, unit, room.x);
          if (g) take_rows<kD>(tensor, g, d, row, n, room.g);
          for (int step = 0; step < pass.steps; ++step)
            map_block<kGradient, kD>(room, all.of(c.tensor, step), d, n, g && step == 0);
          if (!kGradient) in_units(room.out, kRows * d, A(1) / unit, room.out);
          put_rows<kD>(tensor, room.out, d, row, n, out);
        });
      }
      if (c.row == 0)
        for (int64_t j = tensor.rows * d; j < tensor.numel; ++j) out[j] = kGradient ? g[j] : w[j];
    }
  }
}

template <class T>
void assign_rows(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  using A = Acc<T>;
  const int d = list.d;
  threads = threads_for(list, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const AlignedMemory memory(d * (kRows + int64_t(clusters.most)) * int64_t(sizeof(A)));
    A *x = memory.template as<A>(), *scaled = x + d * kRows;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < list.chunks; ++chunk) {
      const RowChunk c(list, chunk);
      const T* w = address<const T>(list.pointers, c.tensor);
      const int K = clusters.size[c.tensor];
      const A unit = unit_of(static_cast<const A*>(clusters.tau)[c.tensor], false);
      const A* centroids =
          in_units(static_cast<const A*>(pass.old) + c.tensor * clusters.most * d, K * d, unit, scaled);
      void* codes = address<void>(static_cast<const int64_t*>(pass.target), c.tensor);
      for (int64_t row = c.row; row < c.row + c.n; row += kRows) {
        const int n = c.row + c.n - row < kRows ? int(c.row + c.n - row) : kRows;
        with_width<A>(d, [&](auto kD) {
          take_rows<kD>(tensor_of(list, c.tensor), w, d, row, n, x);
          in_units(x, kRows * d, unit, x);
          Index<A> found[kRows];
          nearest_rows<kD>(x, centroids, K, d, n, found);
          const auto put = [&](auto* to) {
            for (int i = 0; i < n; ++i) to[row + i] = std::remove_reference_t<decltype(*to)>(found[i]);
          };
          K <= 256 ? put(static_cast<uint8_t*>(codes)) : put(static_cast<int32_t*>(codes));
        });
      }
    }
  }
}

void RowPasses::update(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { sum_rows<decltype(like), RowSum::update>(list, clusters, pass, threads); });
}
void RowPasses::output(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { map_rows<decltype(like), false>(list, clusters, pass, threads); });
}
void RowPasses::upstream(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { sum_rows<decltype(like), RowSum::upstream>(list, clusters, pass, threads); });
}
void RowPasses::recur(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { sum_rows<decltype(like), RowSum::recur>(list, clusters, pass, threads); });
}
void RowPasses::gradient(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { map_rows<decltype(like), true>(list, clusters, pass, threads); });
}
void RowPasses::assign(const List& list, const Clusters& clusters, const Pass& pass, int threads) {
  with_type(list.dtype, [&](auto like) { assign_rows<decltype(like)>(list, clusters, pass, threads); });
}
int64_t RowPasses::scratch(int most, int d) { return int64_t(most) * (d + 1) * int64_t(sizeof(double)); }

}  // namespace R2_ISA
}  // namespace r2
