// How each range loss reads one chunk on the CPU.
#pragma once
#include "skeletons.h"

#include "../range_losses.h"

namespace r2 {
inline namespace R2_ISA {

struct LInfReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column, bool, A* state) {
    using V = Vec<A>;
    LInf::Lanes<V> lane[4] = {};
    LInf::Lanes<A> tail = {};
    int64_t i = 0, step = lanes<V>;
    for (; i + 4 * step <= n; i += 4 * step)
      for (int u = 0; u < 4; ++u) lane[u].add(load<V>(w + i + u * step));
    for (; i < n; ++i) tail.add(widen(w[i]));
    double total[2] = {double(tail.top), double(tail.ties)};
    for (auto& l : lane)
      for (int j = 0; j < step; ++j) {
        A one[2] = {l.top[j], l.ties[j]};
        LInf::merge(total, one);
      }
    state[0] = A(total[0]), state[1] = A(total[1]);
  }
};

struct MarginReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool, A* state) {
    using V = Vec<A>;
    Margin::Lanes<V> lane = {};
    Margin::Lanes<A> tail = {};
    A M = A(fabs(c.first));
    sweep(w, n, lane, tail, [M](auto& l, auto x) { l.add(x, splat<decltype(x)>(M)); });
    state[0] = A(sum(lane.excess) + tail.excess), state[1] = A(sum(lane.outside) + tail.outside);
  }
};

// How both sides of a vector or number are summed, and around which two shifts `at`. Any shift is right; one near the
// soft extreme loses nothing. Far: two exponentials, from shifts among the weights.
template <class A>
struct Far {
  Soft::Exponent<Vec<A>> wide;
  Soft::Exponent<A> narrow;
  A k, at[2];
  Far(double a, A top, A bottom) : wide(a), narrow(a), k(narrow.k), at{top, bottom} {}
  R2_HD Vec<A> exponent(Vec<A> difference) const { return wide(difference); }
  R2_HD A exponent(A difference) const { return narrow(difference); }
  template <bool kVariance, class V>
  R2_HD void add(Soft::Sums<V>* sums, V x) const {
    sums[0].template add<kVariance>(exponent(x - at[0]));
    sums[1].template add<kVariance>(exponent(at[1] - x));
  }
  R2_HD void settle(const double (*s)[3], A* state) const {
    Soft::settle(double(at[0]), s[0], double(k), state);
    Soft::settle(double(at[1]), s[1], -double(k), state + 4);
  }
  R2_HD void move(const double (*s)[3]) { at[0] += A(s[0][1] / s[0][0] / k), at[1] -= A(s[1][1] / s[1][0] / k); }
};
// Near: one pair of exponentials around the middle; the shifts are exponents, counted outwards from there.
template <class A>
struct Near {
  A k, middle, at[2];
  template <bool kVariance, class V>
  R2_HD void add(Soft::Sums<V>* sums, V x) const {
    V y = k * (x - middle);
    Exp2Pair<V> e(y);
    sums[0].template add<kVariance>(y - at[0], e.up);
    sums[1].template add<kVariance>(-y - at[1], e.down);
  }
  R2_HD void settle(const double (*s)[3], A* state) const {
    for (int i = 0; i < 2; ++i) {
      double r = exp2_(-double(at[i])), moved[3] = {r * s[i][0], r * s[i][1], r * s[i][2]},
             side = i ? -double(k) : double(k);
      Soft::settle(double(middle) + double(at[i]) / side, moved, side, state + 4 * i);
    }
  }
  R2_HD void move(const double (*s)[3]) { at[0] += A(s[0][1] / s[0][0]), at[1] += A(s[1][1] / s[1][0]); }
};

template <class V>
struct BothSums {
  Soft::Sums<V> side[2];
  R2_HD void operator+=(const BothSums& other) { side[0] += other.side[0], side[1] += other.side[1]; }
};

// Whether the variance of a side suffers from cancellation: its mean lies more than so many deviations from the shift.
// Four cost float32 sums, which are merged in float64, nothing; float64 has no wider type to merge in.
template <class A>
R2_HD bool is_off(const double* s) {
  constexpr double deviations = sizeof(A) == 8 ? 1 : 4;
  double mean = s[1] / s[0];
  return mean * mean > deviations * deviations * (s[2] / s[0] - mean * mean);
}

template <bool kVariance, class Sides, class T, class A>
R2_HD void soft_sums(const T* w, int64_t n, Sides sides, A* state) {
  double s[2][3];
  for (int attempt = 0; attempt < 2; ++attempt) {
    BothSums<Vec<A>> wide = {};
    BothSums<A> tail = {};
    sweep(w, n, wide, tail, [sides](auto& sums, auto x) { sides.template add<kVariance>(sums.side, x); });
    for (int i = 0; i < 2; ++i) {
      const auto& a = wide.side[i];
      const auto& b = tail.side[i];
      s[i][0] = sum(a.s0) + b.s0, s[i][1] = sum(a.s1) + b.s1, s[i][2] = sum(a.s2) + b.s2;
    }
    if (!kVariance || attempt == 1 || !(is_off<A>(s[0]) || is_off<A>(s[1]))) break;
    sides.move(s);
  }
  sides.settle(s, state);
}

// While the exponents span no more than this, the pair loses less than a rounding of its argument.
constexpr double kNear = 16;

template <bool kVariance, class T, class A>
R2_HD void soft_chunk(const T* w, int64_t n, double alpha, A* state) {
  auto [low, high] = extremes(w, n);
  if (!(high - low < A(INFINITY)) && !(high < low)) {
    for (int i = 0; i < kState; ++i) state[i] = A(NAN);
    return;
  }
  const double a = Soft::size(alpha, high - low);
  if constexpr (sizeof(A) == 4) {
    const A k = A(a * kLog2e), span = k * (high - low);
    if (span <= kNear) {
      // where the soft extremes of a normal distribution lie that spans 8 deviations
      const A out = A(kLn2) * (span / 8) * (span / 8);
      soft_sums<kVariance>(w, n, Near<A>{k, low + (high - low) / 2, {out, out}}, state);
      return;
    }
  }
  soft_sums<kVariance>(w, n, Far<A>(a, high, low), state);
}

struct SoftReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool variance, A* state) {
    variance ? soft_chunk<true>(w, n, c.first, state) : soft_chunk<false>(w, n, c.first, state);
  }
};

}  // namespace R2_ISA
}  // namespace r2
