// The passes of DKM that sum over rows: update, upstream, recur.
#pragma once
#include "dkm_rows.cuh"

namespace r2::cuda {

// What the second half of a sum needs of a row: D numbers and as many gradients, then what the first half found.
template <int D, class A, bool kGrads>
struct RowRecord {
  static constexpr int kNumbers = D * (1 + kGrads) + 4, kStride = (kNumbers + 3) / 4 * 4;
};

// The passes that sum over rows. First a thread for each row finds the nearest centroid and the sum of its
// exponentials; then a thread for each centroid and group of rows makes the attention anew and sums it in a fixed
// order, in runs of at most a block's rows, and these in float64.
enum class RowSum { update, upstream, recur, recur_last };

template <RowSum kOp, int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>)
    dkm_row_sums_kernel(List list, Clusters clusters, Pass pass, int64_t numbers) {
  constexpr bool kLast = kOp == RowSum::recur_last, kAll = kOp == RowSum::recur || kLast,
                 kGrads = kLast || kOp == RowSum::upstream, kUpdate = kOp == RowSum::update;
  constexpr int wide = kWide<D>, kSums = wide + (kUpdate ? 3 : 0), kArrays = kAll ? 3 : 1,
                stride = RowRecord<D, A, kGrads>::kStride;
  __shared__ Tile<D, A, kArrays> tile;
  alignas(16) __shared__ A rows[kThreads][stride];
  __shared__ A sums[kThreads][kSums];

  const RowChunk part(list, clusters);
  const Iterated<A> it(list, clusters, pass, part.tensor);
  const int K = it.K, d = it.d, me = threadIdx.x;
  const bool is_signed = kUpdate && it.stride == 3;
  const int per_centroid = kUpdate ? (is_signed ? 4 : d + 1) : d;
  const Memory<A> w(place(list, list.pointers, part.tensor), list.dtype),
      g(kGrads ? place(list, pass.grads, part.tensor) : 0, list.dtype);
  const RowPlaces places(tensor_of(list, part.tensor), part.row, d);
  double* out = Scratch(list, pass, numbers).of(part);
  Centroids<D, A, kArrays> centroids = {it, tile};
  int each_group = 1;  // threads of a group
  while (each_group < K && each_group < kThreads) each_group *= 2;
  const int groups = kThreads / each_group, group = me / each_group;

  for (int first = 0; first < part.rows; first += kThreads) {
    const int n = min(kThreads, part.rows - first);
    Point<D, A> x, y;
    const RowPlace where = places.of(first + min(me, n - 1));
    x.load(w, where, d, it.unit);
    if (kGrads) y.load(g, where, d);
    Nearest<A> nearest;
    nearest.find(centroids, x);
    A Z = 0, base = 0, mean = 0;
    if constexpr (kAll)
      centroids.at(nearest.index, [&](int, auto, auto fresh, auto v) { base = pull<kLast>(x, y, fresh, v, d); });
    centroids.sweep([&](int, auto c, auto fresh, auto v) {
      const A e = nearest.attention(it, square_distance(x, c, d));
      Z += e;
      if constexpr (kAll) mean = fma(e, pull<kLast>(x, y, fresh, v, d) - base, mean);
    });
    __syncthreads();
    A* record = rows[me];
    if constexpr (D > 0) {
#pragma unroll
      for (int c = 0; c < D; ++c) {
        record[c] = x.v[c];
        if (kGrads) record[D + c] = y.v[c];
      }
    }
    A* found = record + D * (1 + kGrads);
    found[0] = nearest.distance, found[1] = 1 / Z, found[2] = base, found[3] = mean / Z;
    __syncthreads();

    for (int from = 0; from < K; from += each_group) {
      const int j = from + me % each_group;
      const int64_t at = int64_t(min(j, K - 1)) * d;
      A c[wide], fresh[wide], v[wide];
#pragma unroll
      for (int i = 0; i < wide; ++i) {
        const bool in = D > 0 && i < d;
        c[i] = in ? it.old_at(at + i) : A(0);
        if (kAll) fresh[i] = in ? it.fresh_at(at + i) : A(0), v[i] = in ? it.v(min(j, K - 1), i) : A(0);
      }
      for (int block = 0; block < d; block += wide) {
        A sum[kSums] = {};
        for (int r = group; j < K && r < n; r += groups) {
          const A* from_row = rows[r] + D * (1 + kGrads);
          const Nearest<A> of = {from_row[0], 0};
          Point<D, A> p, q;
          if constexpr (D > 0) {
#pragma unroll
            for (int i = 0; i < D; ++i) {
              p.v[i] = rows[r][i];
              if (kGrads) q.v[i] = rows[r][D + i];
            }
          } else {
            const RowPlace that = places.of(first + r);
            p.load(w, that, d, it.unit);
            if (kGrads) q.load(g, that, d);
          }
          auto old_of = [&](int i) {
            if constexpr (D > 0)
              return c[i];
            else
              return it.old_at(at + i);
          };
          const A square = square_distance(p, old_of, d);
          A a = of.attention(it, square) * from_row[1];
          if constexpr (kAll) {
            const A P = pull<kLast>(
                p, q,
                [&](int i) {
                  if constexpr (D > 0)
                    return fresh[i];
                  else
                    return it.fresh_at(at + i);
                },
                [&](int i) {
                  if constexpr (D > 0)
                    return v[i];
                  else
                    return it.v(j, i);
                },
                d);
            a *= (P - from_row[2] - from_row[3]) * it.slope(square);
          }
#pragma unroll
          for (int i = 0; i < wide; ++i) {
            const int at_i = D > 0 ? i : block + i;
            const A what = D == 0 && at_i >= d       ? A(0)
                           : kOp == RowSum::upstream ? number(q, at_i)
                                                     : number(p, at_i) - old_of(at_i);
            sum[i] = fma(a, what, sum[i]);
          }
          if constexpr (kUpdate) {
            sum[wide] += a;
            if (is_signed) {
              const A difference = number(p, 0) - old_of(0), s = sign_(difference) * a;
              sum[wide + 1] += s, sum[wide + 2] = fma(s, difference, sum[wide + 2]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[me][i] = sum[i];
        __syncthreads();
        const int here = min(each_group, K - from), some = min(wide, d - block),
                  more = kUpdate && block == 0 ? per_centroid - d : 0;
        for (int i = me; i < here * (some + more); i += kThreads) {
          const int centroid = i % here, which = i / here;
          double total = 0;
          for (int other = 0; other < groups; ++other)
            total += double(sums[other * each_group + centroid][which < some ? which : wide + which - some]);
          double& to = out[int64_t(from + centroid) * per_centroid + (which < some ? block + which : d + which - some)];
          to = first == 0 ? total : to + total;
        }
        __syncthreads();
      }
    }
  }
}

// From the totals of a tensor to numbers of its centroids.
template <RowSum kOp, class A>
__global__ void __launch_bounds__(kMergeThreads, 1)
    dkm_row_merge_kernel(List list, Clusters clusters, Pass pass, int64_t numbers, int slices) {
  constexpr bool kUpdate = kOp == RowSum::update;
  const int64_t tensor = blockIdx.x / slices;
  const int slice = blockIdx.x % slices;
  const Iterated<A> it(list, clusters, pass, tensor);
  const int d = it.d, per_centroid = kUpdate ? (it.stride == 3 ? 4 : d + 1) : d;
  const int64_t used = int64_t(it.K) * per_centroid, most = clusters.most;
  const double* totals;
  if (slice >= slices_of(used) || !add_up(list, Scratch(list, pass, numbers), tensor, slice, used, &totals)) return;
  A* out = static_cast<A*>(pass.out) + tensor * most * d;
  each(int(most) * d, [&](int i) {
    const int j = i / d, c = i % d;
    const bool real = j < it.K;
    if constexpr (kUpdate) {
      const double S = real ? total(totals, j * per_centroid + d) : 0;
      const bool empty = A(S) == A(0);
      out[i] = !real   ? A(0)
               : empty ? it.old[i]
                       : A(double(it.old[i]) + total(totals, j * per_centroid + c) / S / double(it.unit));
      if (c > 0) return;
      A* moments = static_cast<A*>(pass.out_moments) + (tensor * most + j) * it.stride;
      moments[0] = A(S);
      if (it.stride == 1) return;
      const double n = empty ? 0 : total(totals, j * 4 + 2), x = empty ? 0 : total(totals, j * 4 + 3) / double(it.unit);
      moments[1] = A(n), moments[2] = A(empty ? 0 : x - (double(out[i]) - double(it.old[i])) * n);
    } else {
      const double sum = real ? total(totals, i) : 0;
      out[i] = kOp == RowSum::upstream ? A(sum) : real ? A(sum / double(it.tau)) : A(0);
    }
  });
}

}  // namespace r2::cuda
