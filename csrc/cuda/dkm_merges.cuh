// From the sums by interval of a tensor to numbers of its centroids, by the threads of one block (the formulas are
// those of csrc/dkm.h, where one thread does it).
#pragma once
#include "dkm_tables.cuh"

namespace r2::cuda {

// Sums of attention {n, x} to one centroid: over the weights on its right, on its left, and those that equal it (which
// count as right). x is relative to it.
struct ToCentroid {
  double n, x, sign_n, sign_x;
};

// What an op's merge works in: two recurrences over the centroids.
template <int n>
struct Merge {
  Groups<n> groups;
  double *plus, *minus, *spare;  // (K, 2), (K, 2), (K)

  R2_HD Merge(Space& space, int K)
      : groups(space, K), plus(space.take<double>(2 * K)), minus(space.take<double>(2 * K)),
        spare(space.take<double>(K)) {}
  static size_t bytes(int K) {
    Space space = {};
    Merge merge(space, K);
    return space.used;
  }

  // left(k), right(k): the sums of shares {n, x} of interval k; x is relative to the reference, or with kEnds that of
  // the right share to the right end
  template <bool kEnds = false, class A, class Left, class Right>
  __device__ void fill(const Iteration<A>& it, Left left, Right right) const {
    groups.fill(it);
    for (int side = threadIdx.x / 32; side < 2; side += blockDim.x / 32)
      spread<2>(
          it.size, groups.gap, groups.fall, side == 0,
          [&](int j, double (&s)[2]) {
            const Numbers<double, 2> sum = side == 0 ? left(j + 1) : right(j);
            const double scale = inverse((side == 0 ? groups.left : groups.right)[j * n]),
                         by = !kEnds && side == 1 && j > 0 ? groups.gap[j - 1] : 0;
            s[0] += sum.v[0] * scale, s[1] += (sum.v[1] - by * sum.v[0]) * scale;
          },
          side == 0 ? plus : minus);
    __syncthreads();
  }

  // equal(k, row): the sums over the weights that equal the reference of interval k, of the whole left group
  template <class A, class Equal>
  __device__ ToCentroid at(const Iteration<A>& it, int j, Equal equal) const {
    int k = j + 1;
    while (k < it.size && it.old[k] == it.old[j]) ++k;
    const Numbers<double, 2> e = equal(k);
    const double scale = inverse(groups.left[(k - 1) * n]), *p = plus + 2 * j, *m = minus + 2 * j;
    return {p[0] + m[0], p[1] + m[1], p[0] - e.v[0] * scale - m[0], p[1] - e.v[1] * scale - m[1]};
  }
};

using Pair = Numbers<double, 2>;

template <class A>
__device__ A* of_tensor(void* base, const Clusters& clusters, int64_t tensor, int64_t width = 1) {
  return static_cast<A*>(base) + tensor * clusters.most * width;
}

struct UpdateMerge {
  static constexpr int kGroups = 1;

  template <class A>
  static __device__ void run(const Iteration<A>& it, const double* sums, int64_t tensor, const Clusters& clusters,
                             const Pass& pass, char* memory) {
    Space space = {memory};
    const Merge<1> merge(space, it.size);
    merge.fill(
        it, [&](int k) { return Pair{total(sums, 5 * k), total(sums, 5 * k + 1)}; },
        [&](int k) { return Pair{total(sums, 5 * k + 2), total(sums, 5 * k + 3)}; });
    A *fresh = of_tensor<A>(pass.out, clusters, tensor), *moments = of_tensor<A>(pass.out_moments, clusters, tensor, 3);
    each(clusters.most, [&](int j) {
      if (j >= it.size) return void(fresh[j] = moments[3 * j] = moments[3 * j + 1] = moments[3 * j + 2] = 0);
      const ToCentroid to = merge.at(it, j, [&](int k) {
        const double count = total(sums, 5 * k + 4);
        return Pair{count == 0 ? 0 : count * Row<1>(it.size, merge.groups, it.slope(), k).left_of_equal(), 0};
      });
      const bool empty = A(to.n) == A(0);
      const double old = double(it.old[j]);
      fresh[j] = empty ? it.old[j] : A(old + to.x / to.n);
      moments[3 * j] = A(to.n);
      moments[3 * j + 1] = A(empty ? 0 : to.sign_n);
      moments[3 * j + 2] = A(empty ? 0 : to.sign_x - (double(fresh[j]) - old) * to.sign_n);
    });
  }
};

// Keeps the sums of share g, and of g and 1 over the weights that equal the reference.
struct UpstreamMerge {
  static constexpr int kGroups = 1;

  template <class A>
  static __device__ void run(const Iteration<A>& it, const double* sums, int64_t tensor, const Clusters& clusters,
                             const Pass& pass, char* memory) {
    Space space = {memory};
    const Merge<1> merge(space, it.size);
    merge.fill(
        it, [&](int k) { return Pair{total(sums, 4 * k), 0}; }, [&](int k) { return Pair{total(sums, 4 * k + 1), 0}; });
    double* kept = static_cast<double*>(pass.kept) + tensor * (clusters.most + 1) * 4;
    each(4 * (it.size + 1), [&](int i) { kept[i] = total(sums, i); });
    A* u = of_tensor<A>(pass.out, clusters, tensor);
    each(clusters.most, [&](int j) { u[j] = j < it.size ? A(merge.plus[2 * j] + merge.minus[2 * j]) : A(0); });
  }
};

template <bool kLast>
struct RecurMerge {
  static constexpr int kGroups = 4;

  template <class A>
  static __device__ void run(const Iteration<A>& it, const double* sums, int64_t tensor, const Clusters& clusters,
                             const Pass& pass, char* memory) {
    constexpr int kNumbers = kLast ? 2 : 3;
    Space space = {memory};
    const Merge<4> merge(space, it.size);
    const double* kept = kLast ? static_cast<const double*>(pass.kept) + tensor * (clusters.most + 1) * 4 : nullptr;
    merge.fill<true>(
        it, [&](int k) { return Pair{kLast ? kept[4 * k] : 0, total(sums, kNumbers * k)}; },
        [&](int k) { return Pair{kLast ? kept[4 * k + 1] : 0, total(sums, kNumbers * k + 1)}; });
    A* u = of_tensor<A>(pass.out, clusters, tensor);
    each(clusters.most, [&](int j) {
      if (j >= it.size) return void(u[j] = 0);
      const ToCentroid to = merge.at(it, j, [&](int k) {
        const double count = kLast ? kept[4 * k + 3] : total(sums, kNumbers * k + 2), g = kLast ? kept[4 * k + 2] : 0;
        if (count == 0) return Pair{0, 0};
        const Row<4> row(it.size, merge.groups, it.slope(), k);
        const double left = row.left_of_equal(), right = row.right_of_equal();
        return Pair{left * g, left * (g * (left * row.left[0] + right * row.right[0]) -
                                      count * (left * row.left[2] + right * row.right[2]))};
      });
      u[j] = A((merge.groups.v[j] * double(it.moments[3 * j + 2]) + merge.groups.offset[j] * to.sign_n - to.sign_x) *
               inverse(it.tau));
    });
  }
};

// J_jl = (delta_jl sum_i a_ij x_ij sign_ij - M_jl) / (S_j tau) with x_ij = w_i - c'_j, sign_ij = sign(w_i - c_j), M_jl
// = sum_i a_ij x_ij a_il sign_il. For j < l the weights are left of both (before), between them, or right of both
// (after). Thread j goes from l = j to the end.
struct JacobianMerge {
  static constexpr int kGroups = 1;

  template <class A>
  static __device__ void run(const Iteration<A>& it, const double* sums, int64_t tensor, const Clusters& clusters,
                             const Pass& pass, char* memory) {
    constexpr int kNumbers = 7;
    const int K = it.size;
    Space space = {memory};
    const Merge<1> merge(space, K);
    const double *gap = merge.groups.gap, *fall = merge.groups.fall, *left = merge.groups.left,
                 *right = merge.groups.right;
    auto scaled = [&](int k, int which, double scale) {
      return Pair{total(sums, k * kNumbers + which) * scale, total(sums, k * kNumbers + which + 1) * scale};
    };
    merge.groups.fill(it);
    each(K, [&](int j) { merge.spare[j] = fall[j] * fall[j]; });
    __syncthreads();
    for (int side = threadIdx.x / 32; side < 2; side += blockDim.x / 32)
      spread<2>(
          K, gap, merge.spare, side == 0,
          [&](int j, double (&s)[2]) {
            const Pair sum =
                side == 0 ? scaled(j + 1, 0, 1 / (left[j] * left[j])) : scaled(j, 4, 1 / (right[j] * right[j]));
            const double by = side == 1 && j > 0 ? gap[j - 1] : 0;
            s[0] += sum.v[0], s[1] += sum.v[1] - by * sum.v[0];
          },
          side == 0 ? merge.plus : merge.minus);
    __syncthreads();

    double* J = static_cast<double*>(pass.out) + tensor * clusters.most * clusters.most;
    const int64_t stride = clusters.most;
    each(K, [&](int j) {
      const double *before = merge.minus + 2 * j, j_j = -it.offset(j);
      double n = 0, x = 0, all = 1, distance = 0;  // between, relative to j
      for (int l = j; l < K; ++l) {
        if (l > j) {
          const double f = fall[l - 1];
          const Pair next = scaled(l, 2, all * inverse(left[l - 1] * right[l]));
          n = n * f + next.v[0], x = x * f + next.v[1] + distance * next.v[0];
          all *= f, distance += gap[l - 1];
        }
        const double *after = merge.plus + 2 * l, l_j = distance + j_j, l_l = -it.offset(l),
                     j_l = l_l - distance;  // l_j: c_l - c'_j
        J[j * stride + l] = all * (before[1] + j_j * before[0] - after[1] - l_j * after[0]) + (x + j_j * n);
        if (l > j) J[l * stride + j] = all * (before[1] + j_l * before[0] - after[1] - l_l * after[0]) - (x + j_l * n);
      }
      J[j * stride + j] += double(it.moments[3 * j + 2]);
    });
    __syncthreads();

    each(clusters.most, [&](int j) {
      double* row = J + j * stride;
      const double S = j < K ? double(it.moments[3 * j]) : 0;
      // weights that equal a centroid have no slope there
      for (int k = 1; k <= K && S != 0; ++k) {
        const double count = total(sums, k * kNumbers + 6);
        if (count == 0) continue;
        const Row<1> own(K, merge.groups, it.slope(), k);
        const double w = double(it.old[k - 1]), a = own.left_of_equal() / left[k - 1];
        const double a_j =
            j < k ? a * exp(-(w - double(it.old[j])) / it.tau)
                  : own.right_of_equal() / right[k] * exp(-(double(it.old[j]) - double(it.old[k])) / it.tau);
        for (int l = k - 1; l >= 0 && it.old[l] == it.old[k - 1]; --l)
          row[l] += count * a * a_j * (w - double(it.fresh[j]));
      }
      for (int l = 0; l < clusters.most; ++l) row[l] = S != 0 && l < K ? row[l] / (S * it.tau) : 0;
    });
  }
};

// Adds up what the blocks of dkm_sums_kernel left, and merges it; outside: where the tensor has room for that.
template <class Op, class A>
__global__ void __launch_bounds__(kMergeThreads, 1)
    dkm_merge_kernel(List list, Clusters clusters, Pass pass, int64_t numbers, int per_interval, int slices,
                     Rooms rooms, bool outside) {
  const int64_t tensor = blockIdx.x / slices, used = int64_t(clusters.size[tensor] + 1) * per_interval;
  const int slice = blockIdx.x % slices;
  const double* totals;
  if (slice >= slices_of(used) || !add_up(list, Scratch(list, pass, numbers), tensor, slice, used, &totals)) return;
  Op::template run<A>(Iteration<A>(clusters, pass, list.count, tensor), totals, tensor, clusters, pass,
                      outside ? rooms.work(tensor) : shared_memory());
}

}  // namespace r2::cuda
