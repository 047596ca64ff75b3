// DKM for any metric over rows of d numbers: a few vectors of rows side by side, and their attention to one centroid
// after the other.
#pragma once
#include "dkm_passes.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kRows = 64;    // of a block
constexpr int kVectors = 4;  // of rows in a group: centroids are loaded once for all of them

// An iteration of a tensor. Arrays are (size, d): the centroids before and after, and v.
template <class A>
struct Centroids {
  const A *old, *fresh, *v;
  int64_t size;
  A factor, rate;  // log2(e) / tau and 1 / tau, NaN where tau is of no use
  bool squared;
  A unit;  // of all lengths here: rows are multiplied by it first
};

// What a group works in. Number m of its rows lies kRows further on than number m - 1.
template <class A>
struct RowGroup {
  using V = Vec<A>;
  const A *x, *g, *count;  // count: how many weights there are of each row, 0 of those that fill up
  V *distance, *e, *pull;  // (size, kVectors)
  V inverse[kVectors];     // e times this is attention, times AttentionScale::up
  static constexpr int lanes_ = lanes<V>, rows = kVectors * lanes_;

  R2_HD static V at(const A* numbers, int m, int u) { return load<V>(numbers + m * kRows + u * lanes_); }
};

#if defined(__AVX512F__)
R2_HD Vec<float> lower(Vec<float> a, Vec<float> b) {
  return bit_cast<Vec<float>>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
R2_HD Vec<float> root(Vec<float> x) { return bit_cast<Vec<float>>(_mm512_sqrt_ps(bit_cast<__m512>(x))); }
#elif defined(__AVX2__)
R2_HD Vec<float> lower(Vec<float> a, Vec<float> b) {
  return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
R2_HD Vec<float> root(Vec<float> x) { return bit_cast<Vec<float>>(_mm256_sqrt_ps(bit_cast<__m256>(x))); }
#else
R2_HD Vec<float> lower(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
R2_HD Vec<float> root(Vec<float> x) {
  for (int i = 0; i < lanes<Vec<float>>; ++i) x[i] = sqrtf(x[i]);
  return x;
}
#endif
R2_HD Vec<double> lower(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
R2_HD Vec<double> root(Vec<double> x) {
  for (int i = 0; i < lanes<Vec<double>>; ++i) x[i] = sqrt(x[i]);
  return x;
}

// The distances, and e with `inverse`.
template <int kD, class A>
R2_HD void attend(RowGroup<A>& p, const Centroids<A>& c, int d) {
  using V = Vec<A>;
  d = kD ? kD : d;
  V x[kD ? kD : 1][kVectors], near[kVectors], total[kVectors] = {};
  for (int m = 0; m < kD; ++m)
    for (int u = 0; u < kVectors; ++u) x[m][u] = p.at(p.x, m, u);
  for (V& v : near) v = splat<V>(A(INFINITY));
  for (int64_t j = 0; j < c.size; ++j) {
    V D[kVectors] = {};
    for (int m = 0; m < d; ++m) {
      const V centroid = splat<V>(c.old[j * d + m]);
      for (int u = 0; u < kVectors; ++u) {
        const V difference = (kD ? x[kD ? m : 0][u] : p.at(p.x, m, u)) - centroid;
        D[u] += difference * difference;
      }
    }
    for (int u = 0; u < kVectors; ++u) {
      if (!c.squared) D[u] = root(D[u]);
      near[u] = lower(D[u], near[u]);
      p.distance[j * kVectors + u] = D[u];
    }
  }
  for (int64_t j = 0; j < c.size; ++j)
    for (int u = 0; u < kVectors; ++u) {
      const V e = power((near[u] - p.distance[j * kVectors + u]) * c.factor);
      total[u] += e;
      p.e[j * kVectors + u] = e;
    }
  for (int u = 0; u < kVectors; ++u) p.inverse[u] = AttentionScale<A>::up / (total[u] + near[u] * (0 * c.rate));
}

// pull: a_ij (P_ij - sum_k a_ik P_ik) / tau times what of the slope does not depend on the direction, times
// AttentionScale::up
template <int kD, class A>
R2_HD void find_pull(RowGroup<A>& p, const Centroids<A>& c, int d) {
  using V = Vec<A>;
  d = kD ? kD : d;
  V total[kVectors] = {};
  for (int64_t j = 0; j < c.size; ++j) {
    V P[kVectors] = {};
    for (int m = 0; m < d; ++m) {
      const V fresh = splat<V>(c.fresh[j * d + m]), v = splat<V>(c.v[j * d + m]);
      for (int u = 0; u < kVectors; ++u) {
        const V weight = p.at(p.count, 0, u) * v;
        P[u] += (p.at(p.x, m, u) - fresh) * (p.g ? weight - p.at(p.g, m, u) : weight);
      }
    }
    for (int u = 0; u < kVectors; ++u) {
      total[u] += p.e[j * kVectors + u] * P[u];
      p.pull[j * kVectors + u] = P[u];
    }
  }
  V mean[kVectors], scale[kVectors];
  for (int u = 0; u < kVectors; ++u)
    mean[u] = total[u] * (p.inverse[u] * AttentionScale<A>::down), scale[u] = p.inverse[u] * c.rate;
  for (int64_t j = 0; j < c.size; ++j)
    for (int u = 0; u < kVectors; ++u) {
      V q = p.e[j * kVectors + u] * scale[u] * (p.pull[j * kVectors + u] - mean[u]);
      if (c.squared) {
        q += q;
      } else {
        const V D = p.distance[j * kVectors + u];
        q = D == V{} ? V{} : q / D;
      }
      p.pull[j * kVectors + u] = q;
    }
}

enum class RowSum { update, upstream, recur };

// Adds the group's share to the sums (width, size) of a pass, a lane for each row: attention {1, x - c}, attention g,
// or pull (x - c), times AttentionScale::up.
template <RowSum kSum, int kD, class A>
R2_HD void add_to_sums(const RowGroup<A>& p, const Centroids<A>& c, int d, Vec<A>* sums) {
  using V = Vec<A>;
  d = kD ? kD : d;
  constexpr bool alone = kSum == RowSum::update;
  V scale[kVectors];
  for (int u = 0; u < kVectors; ++u) scale[u] = alone ? p.inverse[u] * p.at(p.count, 0, u) : p.inverse[u];
  for (int64_t j = 0; j < c.size; ++j) {
    V a[kVectors];
    for (int u = 0; u < kVectors; ++u)
      a[u] = kSum == RowSum::recur ? p.pull[j * kVectors + u] : p.e[j * kVectors + u] * scale[u];
    if (alone)
      for (int u = 0; u < kVectors; ++u) sums[j] += a[u];
    for (int m = 0; m < d; ++m) {
      V& total = sums[(m + alone) * c.size + j];
      const V centroid = splat<V>(c.old[j * d + m]);
      for (int u = 0; u < kVectors; ++u)
        total += a[u] * (kSum == RowSum::upstream ? p.at(p.g, m, u) : p.at(p.x, m, u) - centroid);
    }
  }
}

// out += sum over the centroids of attention h (size, d), less pull (x - c)
template <bool kPull, int kD, class A>
R2_HD void add_means(const RowGroup<A>& p, const Centroids<A>& c, const A* h, int d, A* out) {
  using V = Vec<A>;
  d = kD ? kD : d;
  for (int m = 0; m < d; ++m) {
    V total[kVectors] = {};
    for (int64_t j = 0; j < c.size; ++j) {
      const V number = splat<V>(h[j * d + m]), centroid = splat<V>(c.old[j * d + m]);
      for (int u = 0; u < kVectors; ++u) {
        total[u] += p.e[j * kVectors + u] * p.inverse[u] * number;
        if (kPull) total[u] -= p.pull[j * kVectors + u] * (p.at(p.x, m, u) - centroid);
      }
    }
    for (int u = 0; u < kVectors; ++u)
      store(out + m * kRows + u * p.lanes_, p.at(out, m, u) + total[u] * AttentionScale<A>::down);
  }
}

}  // namespace R2_ISA
}  // namespace r2
