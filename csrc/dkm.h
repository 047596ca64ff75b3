// DKM's K-sized formulas for one tensor, in float64. Scalars in the Euclidean metric (r2kernels/reference/dkm.py says
// what is computed):
//
// Interval k of 0..K holds the weights w with k centroids <= w; its reference is the k-th centroid, or the first
// for k = 0; x = w - reference. Such a weight sees two groups of centroids, those on its left and those on its right.
// Within a group the attention does not depend on w; the groups' shares are
//   right = 1 / (1 + 2^-s), left = 1 / (1 + 2^s), s = slope x - bend_k, slope = 2 log2(e) / tau.
// So attention applied to any numbers of the centroids is left * (their mean over the left group) + right * (their mean
// over the right group), and sums of attention over the weights are sums of shares by interval, spread over the groups
// by two recurrences.
#pragma once
#include <cstring>

#include "arithmetic.h"

namespace r2 {
inline namespace R2_ISA {

// A power of two, which lengths are multiplied by for squares of them, and attention over tau, to be float32 whatever
// the scale of the weights; tau tells it. 1 for all usual ones.
template <class A>
R2_HD A unit_of(A tau, bool squared) {
  if constexpr (sizeof(A) == 4) {
    int32_t bits;
    memcpy(&bits, &tau, 4);
    const int e = (bits >> 23) - 126, scale = squared ? e >> 1 : e, least = squared ? -16 : -40;
    if (!(tau > 0) || e > 128) return 1;
    const int power = scale > 24 ? -scale : scale < least ? (least - scale < 58 ? least - scale : 58) : 0;
    bits = (power < -100 ? 27 : 127 + power) << 23;
    memcpy(&tau, &bits, 4);
    return tau;
  }
  return 1;
}

// Of a table's row, one for each interval; means are relative to the reference. o: c'_j, v: dL/dc'_j / S_j, e: v_j
// (c'_j - reference).
enum Number : int { kReference, kBend, kLeftO, kRightO, kLeftV, kRightV, kLeftE, kRightE, kNumbers };

// Of the sums of an interval: the shares {1, x} of either group; those of the left one over the weights that equal the
// reference alone
enum IntervalSum : int { kLeftN, kLeftX, kRightN, kRightX, kEqualN, kEqualX, kSums };

// One iteration of one tensor. `fresh`, `upstream` and `moments` may be null where they are not needed.
template <class A>
struct Iteration {
  const A *old, *fresh, *upstream, *moments;
  int size;
  double tau;  // NaN where it is not positive
  A unit = 1;  // what `in_units` has multiplied lengths by

  R2_HD Iteration(const Clusters& clusters, const Pass& pass, int64_t count, int64_t tensor, int step = 0)
      : size(clusters.size[tensor]) {
    const int64_t at = (step * count + tensor) * clusters.most;
    old = static_cast<const A*>(pass.old) + at;
    fresh = pass.fresh ? static_cast<const A*>(pass.fresh) + at : nullptr;
    upstream = pass.upstream ? static_cast<const A*>(pass.upstream) + at : nullptr;
    moments = pass.moments ? static_cast<const A*>(pass.moments) + 3 * at : nullptr;
    const A given = static_cast<const A*>(clusters.tau)[tensor];
    tau = given > A(0) ? double(given) : double(NAN);
  }

  // The same with the lengths times unit_of(tau); `room` holds 2 size numbers.
  R2_HD Iteration in_units(A* room) const {
    Iteration it = *this;
    it.unit = unit_of(A(tau), false);
    if (it.unit == A(1)) return it;
    for (int j = 0; j < size; ++j) {
      room[j] = old[j] * it.unit;
      if (fresh) room[size + j] = fresh[j] * it.unit;
    }
    it.old = room, it.fresh = fresh ? room + size : nullptr, it.tau = tau * double(it.unit);
    return it;
  }
  R2_HD double slope() const { return 2 * kLog2e / tau; }
  R2_HD double offset(int j) const { return fresh ? double(fresh[j]) - double(old[j]) : 0; }
  R2_HD double v(int j) const {
    return upstream && moments[3 * j] != A(0) ? double(upstream[j]) / double(moments[3 * j]) : 0;
  }
  // from centroid j to the next; not negative where rounding has swapped them
  R2_HD double gap(int j) const {
    const double g = double(old[j + 1]) - double(old[j]);
    return g < 0 ? 0 : g;
  }
};

// What the formulas share; K + 1 numbers each.
struct Spread {
  double* decay;         // e^(-gap_j / tau), j < K - 1
  double *left, *right;  // sum of e^(-|c_j - end| / tau) over the group, where end is its centroid next to the interval

  template <class A>
  R2_HD void fill(const Iteration<A>& it) const {
    const int K = it.size;
    left[0] = right[K] = 0;
    for (int j = 0; j + 1 < K; ++j) decay[j] = exp(-it.gap(j) / it.tau);
    for (int k = 1; k <= K; ++k) left[k] = 1 + (k > 1 ? left[k - 1] * decay[k - 2] : 0);
    for (int k = K - 1; k >= 0; --k) right[k] = 1 + (k < K - 1 ? right[k + 1] * decay[k] : 0);
  }
};

// Sums over a group, relative to its end: e^(-|c_j - end| / tau) {c'_j - end, v_j, v_j (c'_j - end)}
struct GroupSums {
  double o = 0, v = 0, e = 0;

  // the end moves by `by`; n is the sum of the exponentials before that
  R2_HD void move(double by, double n, double decay) { o = decay * (o - by * n), e = decay * (e - by * v), v *= decay; }
  R2_HD void add(double offset, double v_j) { o += offset, v += v_j, e += v_j * offset; }
};

// put(interval, Number, double) for the whole table; for `numbers` == 2 the reference and the bend alone, for 4 without
// v and e
template <class A, class Put>
R2_HD void tables(const Iteration<A>& it, const Spread& s, int numbers, Put put) {
  const int K = it.size;
  for (int k = 0; k <= K; ++k) {
    put(k, kReference, double(it.old[k ? k - 1 : 0]));
    put(k, kBend,
        k == 0   ? -double(INFINITY)
        : k == K ? double(INFINITY)
                 : it.gap(k - 1) * (it.slope() / 2) + log2(s.left[k] / s.right[k]));
  }
  if (numbers == 2) return;
  const bool all = numbers > 4;
  GroupSums g;
  for (int k = 0; k <= K; ++k) {
    if (k > 1) g.move(it.gap(k - 2), s.left[k - 1], s.decay[k - 2]);
    if (k > 0) g.add(it.offset(k - 1), all ? it.v(k - 1) : 0);
    const double scale = k > 0 ? 1 / s.left[k] : 0;
    put(k, kLeftO, g.o * scale);
    if (all) put(k, kLeftV, g.v * scale), put(k, kLeftE, g.e * scale);
  }
  g = GroupSums();
  for (int k = K; k >= 0; --k) {
    if (k < K - 1) g.move(-it.gap(k), s.right[k + 1], s.decay[k]);
    if (k < K) g.add(it.offset(k), all ? it.v(k) : 0);
    const double scale = k < K ? 1 / s.right[k] : 0, by = k < K && k > 0 ? it.gap(k - 1) : 0;
    put(k, kRightO, g.o * scale + by);
    if (all) put(k, kRightV, g.v * scale), put(k, kRightE, (g.e + by * g.v) * scale);
  }
}

// Sums of attention {1, x} to one centroid, x relative to it
struct AttentionSum {
  double n = 0, x = 0;
  R2_HD void move(double by, double decay) { x = decay * (x - by * n), n *= decay; }
};

// finish(j, plus, minus, equal): the sums over the weights >= c_j, over those < c_j, and over those == c_j, from `sums`
// (K + 1, kSums), which is overwritten
template <class A, class Finish>
R2_HD void to_centroids(const Iteration<A>& it, const Spread& s, double* sums, Finish finish) {
  const int K = it.size;
  AttentionSum plus, equal;
  for (int j = K - 1; j >= 0; --j) {
    double* row = sums + (j + 1) * kSums;
    const double scale = 1 / s.left[j + 1];
    if (j + 1 < K) plus.move(-it.gap(j), s.decay[j]);
    if (!(j + 1 < K && it.old[j] == it.old[j + 1])) equal.n = row[kEqualN] * scale, equal.x = row[kEqualX] * scale;
    plus.n += row[kLeftN] * scale, plus.x += row[kLeftX] * scale;
    row[kLeftN] = plus.n, row[kLeftX] = plus.x, row[kEqualN] = equal.n, row[kEqualX] = equal.x;
  }
  AttentionSum minus;
  for (int j = 0; j < K; ++j) {
    const double *row = sums + j * kSums, *own = row + kSums;
    const double scale = 1 / s.right[j], by = j > 0 ? it.gap(j - 1) : 0, n = row[kRightN] * scale;
    if (j > 0) minus.move(by, s.decay[j - 1]);
    minus.n += n, minus.x += row[kRightX] * scale - by * n;
    plus.n = own[kLeftN], plus.x = own[kLeftX], equal.n = own[kEqualN], equal.x = own[kEqualX];
    finish(j, plus, minus, equal);
  }
}

// `update`: from the sums of shares {1, x} by interval (of equal ones n alone)
template <class A>
R2_HD void finish_update(const Iteration<A>& it, const Spread& s, double* sums, A* fresh, A* moments) {
  to_centroids(it, s, sums, [&](int j, const AttentionSum& plus, const AttentionSum& minus, const AttentionSum& equal) {
    const double S = plus.n + minus.n, old = double(it.old[j]);
    const bool empty = A(S) == A(0);
    const A moved = empty ? it.old[j] : A(old + (plus.x + minus.x) / S);
    const double sign = plus.n - equal.n - minus.n;
    fresh[j] = moved / it.unit;
    moments[3 * j] = A(S);
    moments[3 * j + 1] = A(empty ? 0 : sign);
    moments[3 * j + 2] = A(empty ? 0 : (plus.x - minus.x - (double(moved) - old) * sign) / double(it.unit));
  });
}

// `upstream`: from the sums of share g, in the place of n
template <class A>
R2_HD void finish_upstream(const Iteration<A>& it, const Spread& s, double* sums, A* u) {
  to_centroids(it, s, sums, [&](int j, const AttentionSum& plus, const AttentionSum& minus, const AttentionSum&) {
    u[j] = A(plus.n + minus.n);
  });
}

// `recur`. With P_j = v_j (w - c'_j) + g (c'_j - reference) and its means PL, PR over the groups, for j on the left (on
// the right likewise, -D)
//   Q_j = a_j (P_j - left PL - right PR) = a_j (P_j - PL) + a_j / left D, D = left right (PL - PR)
// where nothing cancels but in the first term, whose sums over an interval are made of those of left {1, x, g} here in
// float64. sums: of shares {1, x}; more: of share g in the place of n (0 but in the last iteration), of D in that of
// kLeftX, and of D where equal in that of kEqualX.
template <class A>
R2_HD void finish_recur(const Iteration<A>& it, const Spread& s, double* sums, double* more, A* u) {
  for (int k = 0; k <= it.size; ++k) {
    double* row = more + k * kSums;
    row[kRightX] = row[kLeftX], row[kLeftX] = -row[kLeftX], row[kEqualX] = -row[kEqualX];
  }
  tables(it, s, kNumbers, [&](int k, int number, double mean) {
    const double* n = sums + k * kSums;
    double* m = more + k * kSums;
    if (number == kLeftV) m[kLeftX] += mean * n[kLeftX];
    if (number == kLeftE) m[kLeftX] -= mean * n[kLeftN], m[kEqualX] -= mean * n[kEqualN];
    if (number == kLeftO) m[kLeftX] += mean * m[kLeftN], m[kEqualX] += mean * m[kEqualN];
    if (number == kRightV) m[kRightX] += mean * n[kRightX];
    if (number == kRightE) m[kRightX] -= mean * n[kRightN];
    if (number == kRightO) m[kRightX] += mean * m[kRightN];
  });
  to_centroids(it, s, sums, [&](int j, const AttentionSum& plus, const AttentionSum& minus, const AttentionSum& equal) {
    sums[j * kSums + kRightX] = it.v(j) * (plus.x - equal.x - minus.x - it.offset(j) * (plus.n - equal.n - minus.n));
  });
  to_centroids(it, s, more, [&](int j, const AttentionSum& plus, const AttentionSum& minus, const AttentionSum& equal) {
    u[j] = A((sums[j * kSums + kRightX] + it.offset(j) * (plus.n - equal.n - minus.n) - (plus.x - equal.x - minus.x)) /
             it.tau);
  });
}

// Of the sums of an interval for the Jacobian: left^2, left right, right^2 {1, x}; left^2 and left right over the
// weights that equal the reference
enum JacobianSum : int { kLeft2, kLeftRight = 2, kRight2 = 4, kEqualLeft2 = 6, kEqualLeftRight, kJacobianSums };

// J (K, K), rows `stride` apart, from `sums` (K + 1, kJacobianSums), which is overwritten, as is `shares` (K + 1,
// kSums): J_jl = (delta_jl sum_i a_ij x_ij sign_ij - M_jl) / (S_j tau) with x_ij = w_i - c'_j, sign_ij = sign(w_i -
// c_j), M_jl = sum_i a_ij x_ij a_il sign_il. For j < l the weights are left of both, between them, or right of both.
template <class A>
R2_HD void finish_jacobian(const Iteration<A>& it, const Spread& s, double* sums, double* shares, double* J,
                           int64_t stride) {
  const int K = it.size;
  for (int k = 0; k <= K; ++k) {  // left = left^2 + left right
    const double* from = sums + k * kJacobianSums;
    double* to = shares + k * kSums;
    to[kLeftN] = from[kLeft2] + from[kLeftRight], to[kLeftX] = from[kLeft2 + 1] + from[kLeftRight + 1];
    to[kRightN] = from[kRight2] + from[kLeftRight], to[kRightX] = from[kRight2 + 1] + from[kLeftRight + 1];
    to[kEqualN] = from[kEqualLeft2] + from[kEqualLeftRight], to[kEqualX] = 0;
  }
  auto scaled = [&](int k, int which, double scale) {
    return AttentionSum{sums[k * kJacobianSums + which] * scale, sums[k * kJacobianSums + which + 1] * scale};
  };
  AttentionSum beyond;  // right of centroid l, relative to it
  for (int l = K - 1; l >= 0; --l) {
    const AttentionSum own = scaled(l + 1, kLeft2, 1 / (s.left[l + 1] * s.left[l + 1]));
    if (l + 1 < K) beyond.move(-it.gap(l), s.decay[l] * s.decay[l]);
    beyond.n += own.n, beyond.x += own.x;
    sums[(l + 1) * kJacobianSums + kLeft2] = beyond.n, sums[(l + 1) * kJacobianSums + kLeft2 + 1] = beyond.x;
  }
  AttentionSum before;  // left of centroid j, relative to it
  for (int j = 0; j < K; ++j) {
    AttentionSum own = scaled(j, kRight2, 1 / (s.right[j] * s.right[j]));
    if (j > 0) own.move(it.gap(j - 1), 1), before.move(it.gap(j - 1), s.decay[j - 1] * s.decay[j - 1]);
    before.n += own.n, before.x += own.x;
    AttentionSum between;  // centroids j and l, relative to j
    double D = 1, distance = 0;
    for (int l = j; l < K; ++l) {
      if (l > j) {
        AttentionSum next = scaled(l, kLeftRight, D / (s.left[l] * s.right[l]));
        between.n = between.n * s.decay[l - 1] + next.n,
        between.x = between.x * s.decay[l - 1] + next.x + distance * next.n;
        D *= s.decay[l - 1], distance += it.gap(l - 1);
      }
      const AttentionSum after = scaled(l + 1, kLeft2, 1);
      const double j_j = -it.offset(j), l_j = distance + j_j, l_l = -it.offset(l),
                   j_l = l_l - distance;  // l_j: c_l - c'_j
      J[j * stride + l] = D * (before.x + j_j * before.n - after.x - l_j * after.n) + (between.x + j_j * between.n);
      if (l > j)
        J[l * stride + j] = D * (before.x + j_l * before.n - after.x - l_l * after.n) - (between.x + j_l * between.n);
    }
  }
  to_centroids(it, s, shares,
               [&](int j, const AttentionSum& plus, const AttentionSum& minus, const AttentionSum& equal) {
                 J[j * stride + j] += plus.x - minus.x - it.offset(j) * (plus.n - equal.n - minus.n);
               });
  // weights that equal a centroid have no slope there
  for (int k = 1; k <= K; ++k) {
    const double *equal = sums + k * kJacobianSums, reference = double(it.old[k - 1]);
    if (equal[kEqualLeft2] == 0) continue;
    for (int l = k - 1; l >= 0 && it.old[l] == it.old[k - 1]; --l) {
      double a = equal[kEqualLeft2] / (s.left[k] * s.left[k]);
      for (int j = k - 1; j >= 0; --j) {
        J[j * stride + l] += a * (reference - double(it.fresh[j]));
        if (j > 0) a *= s.decay[j - 1];
      }
      if (k < K) a = equal[kEqualLeftRight] / (s.left[k] * s.right[k]);
      for (int j = k; j < K; ++j) {
        J[j * stride + l] += a * (reference - double(it.fresh[j]));
        if (j + 1 < K) a *= s.decay[j];
      }
    }
  }
  for (int j = 0; j < K; ++j) {
    const double S = double(it.moments[3 * j]);
    for (int l = 0; l < K; ++l) J[j * stride + l] = S == 0 ? 0 : J[j * stride + l] / (S * it.tau);
  }
}

}  // namespace R2_ISA
}  // namespace r2
