// What the passes of DKM over scalars sum for each weight on the CPU, and what they make of the sums of a tensor.
#pragma once
#include "dkm_records.h"

namespace r2 {
inline namespace R2_ISA {

// What the merges of one tensor work in.
struct MergeRoom {
  AlignedMemory memory;
  Spread spread;
  double *sums, *more;  // (K + 1, kSums), (K + 1, kJacobianSums)
  explicit MergeRoom(int most) : memory((most + 1) * (3 + kSums + kJacobianSums) * int64_t(sizeof(double))) {
    const int64_t n = most + 1;
    double* at = memory.as<double>();
    spread = {at, at + n, at + 2 * n}, sums = at + 3 * n, more = sums + n * kSums;
  }
};

// The passes that sum: a record of kRecord numbers for each weight. n: the numbers that were looked up, of which the
// pass needs the first kHowMany; count: how many weights have this value. finish() is given the sums of an interval,
// followed by those over the weights that equal its reference.
struct UpdateSums {
  static constexpr int kHowMany = 2, kRecord = 4;
  static constexpr bool kGrads = false;
  template <class V>
  R2_HD static void record(const Shares<V>& s, V x, V, V count, const V (*)[4], V* r) {
    r[0] = s.left * count, r[1] = r[0] * x, r[2] = s.right * count, r[3] = r[2] * x;
  }
  template <class A>
  static void finish(const Iteration<A>& it, const MergeRoom& s, const double* r, int64_t tensor,
                     const Clusters& clusters, const Pass& pass) {
    for (int k = 0; k <= it.size; ++k, r += 2 * kRecord)
      for (int m = 0; m < kSums; ++m) s.sums[k * kSums + m] = r[m];
    A *fresh = static_cast<A*>(pass.out) + tensor * clusters.most,
      *moments = static_cast<A*>(pass.out_moments) + 3 * tensor * clusters.most;
    finish_update(it, s.spread, s.sums, fresh, moments);
    for (int j = it.size; j < clusters.most; ++j)
      fresh[j] = moments[3 * j] = moments[3 * j + 1] = moments[3 * j + 2] = 0;
  }
};

R2_HD double* kept_of(const Clusters& clusters, const Pass& pass, int64_t tensor) {
  return static_cast<double*>(pass.kept) + 4 * tensor * (clusters.most + 1);
}

struct UpstreamSums {
  static constexpr int kHowMany = 2, kRecord = 2;
  static constexpr bool kGrads = true;
  template <class V>
  R2_HD static void record(const Shares<V>& s, V, V g, V, const V (*)[4], V* r) {
    r[0] = s.left * g, r[1] = s.right * g;
  }
  template <class A>
  static void finish(const Iteration<A>& it, const MergeRoom& s, const double* r, int64_t tensor,
                     const Clusters& clusters, const Pass& pass) {
    double* kept = kept_of(clusters, pass, tensor);
    for (int k = 0; k <= it.size; ++k, r += 2 * kRecord, kept += 4) {
      double* sum = s.sums + k * kSums;
      for (int m = 0; m < kSums; ++m) sum[m] = 0;
      kept[0] = sum[kLeftN] = r[0], kept[1] = sum[kRightN] = r[1], kept[2] = r[2], kept[3] = 0;
    }
    A* u = static_cast<A*>(pass.out) + tensor * clusters.most;
    finish_upstream(it, s.spread, s.sums, u);
    for (int j = it.size; j < clusters.most; ++j) u[j] = 0;
  }
};

template <bool kLast>
struct RecurSums {
  static constexpr int kHowMany = 8, kRecord = 5;
  static constexpr bool kGrads = kLast;
  template <class V>
  R2_HD static void record(const Shares<V>& s, V x, V g, V count, const V (*n)[4], V* r) {
    V apart = count * (x * (n[1][0] - n[1][1]) - (n[1][2] - n[1][3]));
    if (kLast) apart += g * (n[0][2] - n[0][3]);
    r[0] = s.left * count, r[1] = r[0] * x, r[2] = s.right * count, r[3] = r[2] * x, r[4] = s.both * apart;
  }
  template <class A>
  static void finish(const Iteration<A>& it, const MergeRoom& s, const double* r, int64_t tensor,
                     const Clusters& clusters, const Pass& pass) {
    const double none[4] = {0, 0, 0, 0}, *kept = kLast ? kept_of(clusters, pass, tensor) : none;
    for (int k = 0; k <= it.size; ++k, r += 2 * kRecord, kept += kLast ? 4 : 0) {
      double *sum = s.sums + k * kSums, *more = s.more + k * kSums;
      for (int m = 0; m < 4; ++m) sum[m] = r[m];
      sum[kEqualN] = r[kRecord], sum[kEqualX] = 0;
      more[kLeftN] = kept[0], more[kLeftX] = r[4], more[kRightN] = kept[1], more[kEqualN] = kept[2],
      more[kEqualX] = r[kRecord + 4];
    }
    A* u = static_cast<A*>(pass.out) + tensor * clusters.most;
    finish_recur(it, s.spread, s.sums, s.more, u);
    for (int j = it.size; j < clusters.most; ++j) u[j] = 0;
  }
};

struct JacobianSums {
  static constexpr int kHowMany = 2, kRecord = 8;
  static constexpr bool kGrads = false;
  template <class V>
  R2_HD static void record(const Shares<V>& s, V x, V, V count, const V (*)[4], V* r) {
    constexpr auto down = AttentionScale<typename Lane<V>::A>::down;
    r[0] = s.left * down * s.left * count, r[1] = r[0] * x, r[2] = s.both * count, r[3] = r[2] * x,
    r[4] = s.right * down * s.right * count, r[5] = r[4] * x;
    r[6] = r[7] = V{};
  }
  template <class A>
  static void finish(const Iteration<A>& it, const MergeRoom& s, const double* r, int64_t tensor,
                     const Clusters& clusters, const Pass& pass) {
    for (int k = 0; k <= it.size; ++k, r += 2 * kRecord) {
      double* sum = s.more + k * kJacobianSums;
      for (int m = 0; m < 6; ++m) sum[m] = r[m];
      sum[kEqualLeft2] = r[kRecord], sum[kEqualLeftRight] = r[kRecord + 2];
    }
    const int64_t most = clusters.most;
    double* J = static_cast<double*>(pass.out) + tensor * most * most;
    for (int64_t i = 0; i < most * most; ++i) J[i] = 0;
    finish_jacobian(it, s.spread, s.more, s.sums, J, most);
  }
};

}  // namespace R2_ISA
}  // namespace r2
