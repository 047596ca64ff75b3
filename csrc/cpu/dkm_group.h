// DKM for any metric over rows of d numbers: four rows at a time and their attention to all K centroids, a vector of centroids side by side.
#pragma once
#include "dkm_passes.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kGroup = 8;  // rows

// An iteration of a tensor. Arrays are (d, stride): the centroids before and after, and v; `behind` is infinite where there is no centroid, else 0.
template <class A>
struct Centroids {
  const A *old, *fresh, *v, *behind;
  int64_t size, stride;
  A factor, rate;  // log2(e) / tau and 1 / tau, NaN where tau is of no use
  bool squared;
};

// What a group works in; the numbers of its rows are (kGroup, d).
template <class A>
struct Group {
  const A *x, *g, *count;  // count: how many weights there are of each row, 0 of those that fill up
  A *distance, *e, *pull;  // (kGroup, stride)
  A inverse[kGroup];       // e times this is attention, times Scale::up
  int64_t first, end;      // of the centroids that are near enough, multiples of a vector
};

#if defined(__AVX512F__)
R2_HD Vec<float> lower(Vec<float> a, Vec<float> b) { return bit_cast<Vec<float>>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b))); }
R2_HD Vec<float> root(Vec<float> x) { return bit_cast<Vec<float>>(_mm512_sqrt_ps(bit_cast<__m512>(x))); }
#elif defined(__AVX2__)
R2_HD Vec<float> lower(Vec<float> a, Vec<float> b) { return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b))); }
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

// Each of four vectors reduced to a number by f.
template <class A, class F>
R2_HD void fold_four(const Vec<A>* v, A* to, F f) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    Vec<float> t[4] = {v[0], v[1], v[2], v[3]};
    turn(t);
    const Vec<float> folded = f(f(t[0], t[1]), f(t[2], t[3]));
#if defined(__AVX512F__)
    const __m512 x = bit_cast<__m512>(folded);
    const auto half = f(folded, bit_cast<Vec<float>>(_mm512_shuffle_f32x4(x, x, 0x4e)));
    const __m512 y = bit_cast<__m512>(half);
    const auto all = f(half, bit_cast<Vec<float>>(_mm512_shuffle_f32x4(y, y, 0xb1)));
    _mm_storeu_ps(to, _mm512_castps512_ps128(bit_cast<__m512>(all)));
#else
    const __m256 x = bit_cast<__m256>(folded);
    const auto all = f(folded, bit_cast<Vec<float>>(_mm256_permute2f128_ps(x, x, 1)));
    _mm_storeu_ps(to, _mm256_castps256_ps128(bit_cast<__m256>(all)));
#endif
    return;
  }
#endif
  for (int r = 0; r < 4; ++r) {
    Vec<A> x = v[r];
    to[r] = fold<A>(x, [&](A a, A b) { return f(splat<Vec<A>>(a), splat<Vec<A>>(b))[0]; });
  }
}
// The vector of each row reduced to a number by f.
template <class A, class F>
R2_HD void fold_rows(const Vec<A>* v, A* to, F f) {
  for (int r = 0; r < kGroup; r += 4) fold_four<A>(v + r, to + r, f);
}
template <class A>
R2_HD void sum_rows_of(const Vec<A>* v, A* to) {
  fold_rows<A>(v, to, [](Vec<A> a, Vec<A> b) { return a + b; });
}

// The distances, and e with `inverse`.
template <int kD, class A>
R2_HD void attend(Group<A>& p, const Centroids<A>& c, int d) {
  using V = Vec<A>;
  d = kD ? kD : d;
  V near[kGroup], total[kGroup] = {};
  A nearest[kGroup], sum[kGroup];
  for (V& v : near) v = splat<V>(A(INFINITY));
  for (int64_t j = p.first; j < p.end; j += lanes<V>) {
    V D[kGroup];
    for (V& v : D) v = load<V>(c.behind + j);
    for (int m = 0; m < d; ++m) {
      const V centroid = load<V>(c.old + m * c.stride + j);
      for (int r = 0; r < kGroup; ++r) {
        const V difference = p.x[r * d + m] - centroid;
        D[r] += difference * difference;
      }
    }
    for (int r = 0; r < kGroup; ++r) {
      if (!c.squared) D[r] = root(D[r]);
      near[r] = lower(D[r], near[r]);
      store(p.distance + r * c.stride + j, D[r]);
    }
  }
  fold_rows<A>(near, nearest, [](V a, V b) { return lower(a, b); });
  for (int64_t j = p.first; j < p.end; j += lanes<V>)
    for (int r = 0; r < kGroup; ++r) {
      const V e = power((nearest[r] - load<V>(p.distance + r * c.stride + j)) * c.factor);
      total[r] += e;
      store(p.e + r * c.stride + j, e);
    }
  sum_rows_of<A>(total, sum);
  for (int r = 0; r < kGroup; ++r) p.inverse[r] = Scale<A>::up / (sum[r] + nearest[r] * (0 * c.rate));
}

// pull: a_ij (P_ij - sum_k a_ik P_ik) / tau times what of the slope does not depend on the direction, times Scale::up
template <int kD, class A>
R2_HD void find_pull(Group<A>& p, const Centroids<A>& c, int d) {
  using V = Vec<A>;
  d = kD ? kD : d;
  V total[kGroup] = {};
  A mean[kGroup];
  for (int64_t j = p.first; j < p.end; j += lanes<V>) {
    V P[kGroup] = {};
    for (int m = 0; m < d; ++m) {
      const V fresh = load<V>(c.fresh + m * c.stride + j), v = load<V>(c.v + m * c.stride + j);
      for (int r = 0; r < kGroup; ++r) P[r] += (p.x[r * d + m] - fresh) * (p.g ? p.count[r] * v - p.g[r * d + m] : p.count[r] * v);
    }
    for (int r = 0; r < kGroup; ++r) {
      total[r] += load<V>(p.e + r * c.stride + j) * P[r];
      store(p.pull + r * c.stride + j, P[r]);
    }
  }
  sum_rows_of<A>(total, mean);
  for (int r = 0; r < kGroup; ++r) mean[r] *= p.inverse[r] * Scale<A>::down;
  for (int64_t j = p.first; j < p.end; j += lanes<V>)
    for (int r = 0; r < kGroup; ++r) {
      A* at = p.pull + r * c.stride + j;
      V q = load<V>(p.e + r * c.stride + j) * (p.inverse[r] * c.rate) * (load<V>(at) - mean[r]);
      if (c.squared) {
        q += q;
      } else {
        const V D = load<V>(p.distance + r * c.stride + j);
        q = D == V{} ? V{} : q / D;
      }
      store(at, q);
    }
}

enum class Kind { update, upstream, recur };

// Adds the group's share to the sums (width, stride) of a pass: attention {1, x - c}, attention g, or pull (x - c), times Scale::up.
template <Kind kKind, int kD, class A>
R2_HD void add_to_sums(const Group<A>& p, const Centroids<A>& c, int d, A* sums) {
  using V = Vec<A>;
  d = kD ? kD : d;
  constexpr bool alone = kKind == Kind::update;
  for (int64_t j = p.first; j < p.end; j += lanes<V>) {
    V a[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      if (kKind == Kind::recur) a[r] = load<V>(p.pull + r * c.stride + j);
      else a[r] = load<V>(p.e + r * c.stride + j) * (alone ? p.inverse[r] * p.count[r] : p.inverse[r]);
    }
    if (alone) {
      V total = load<V>(sums + j);
      for (int r = 0; r < kGroup; ++r) total += a[r];
      store(sums + j, total);
    }
    for (int m = 0; m < d; ++m) {
      A* at = sums + (m + alone) * c.stride + j;
      V total = load<V>(at);
      const V centroid = load<V>(c.old + m * c.stride + j);
      for (int r = 0; r < kGroup; ++r) total += a[r] * (kKind == Kind::upstream ? splat<V>(p.g[r * d + m]) : p.x[r * d + m] - centroid);
      store(at, total);
    }
  }
}

// out (kGroup, d) += sum over the centroids of attention h, less pull (x - c)
template <bool kPull, int kD, class A>
R2_HD void add_means(const Group<A>& p, const Centroids<A>& c, const A* h, int d, A* out) {
  using V = Vec<A>;
  d = kD ? kD : d;
  for (int m = 0; m < d; ++m) {
    V total[kGroup] = {};
    A sum[kGroup];
    for (int64_t j = p.first; j < p.end; j += lanes<V>) {
      const V number = load<V>(h + m * c.stride + j), centroid = load<V>(c.old + m * c.stride + j);
      for (int r = 0; r < kGroup; ++r) {
        total[r] += load<V>(p.e + r * c.stride + j) * p.inverse[r] * number;
        if (kPull) total[r] -= load<V>(p.pull + r * c.stride + j) * (p.x[r * d + m] - centroid);
      }
    }
    sum_rows_of<A>(total, sum);
    for (int r = 0; r < kGroup; ++r) out[r * d + m] += sum[r] * Scale<A>::down;
  }
}

}  // namespace R2_ISA
}  // namespace r2
