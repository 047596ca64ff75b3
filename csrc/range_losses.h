// The formulas of l_inf, margin, soft_min_max and soft_extrema, and their gradients, once for host and device.
#pragma once
#include "losses.h"

namespace r2 {
inline namespace R2_ISA {

// max|w|. State: the maximum, how many attain it. A NaN stays the maximum.
struct LInf {
  static constexpr int kSaved = saved_numbers::l_inf;

  template <class V>
  struct Lanes {
    V top, ties;
    R2_HD void add(V w) {
      V v = abs_(w);
      ties = v > top ? splat<V>(1) : v == top ? ties + splat<V>(1) : ties;
      top = top >= v ? top : (top == top ? v : top);
    }
  };

  template <class S>
  R2_HD static void merge(double* into, const S* state) {
    if (into[0] == state[0]) {
      into[1] += state[1];
    } else if (!(into[0] > state[0]) && into[0] == into[0]) {
      into[0] = state[0], into[1] = state[1];
    }
  }

  template <class A>
  R2_HD static double finish(const double* state, Column, A* saved) {
    saved[0] = A(state[0]), saved[1] = A(state[0] == state[0] ? state[1] : 0);
    return state[0];
  }

  template <class V>
  struct Gradient {
    V top, slope;
    template <class A>
    R2_HD Gradient(double grad, Column, const A* saved)
        : top(splat<V>(saved[0])), slope(splat<V>(A(grad / saved[1]))) {}
    R2_HD V operator()(V w) const { return (abs_(w) == top ? sign_(w) : splat<V>(0)) * slope; }
  };
};

// |M| + sum relu(|w| - |M|) / k. State: the excess, how many lie outside.
struct Margin {
  static constexpr int kSaved = saved_numbers::margin;

  template <class V>
  struct Lanes {
    V excess, outside;
    R2_HD void add(V w, V M) {
      V v = abs_(w) - M;
      excess += v <= splat<V>(0) ? splat<V>(0) : v;
      outside += v > splat<V>(0) ? splat<V>(1) : splat<V>(0);
    }
    R2_HD void operator+=(const Lanes& o) { excess += o.excess, outside += o.outside; }
  };

  template <class S>
  R2_HD static void merge(double* into, const S* state) {
    into[0] += state[0], into[1] += state[1];
  }

  // k, or k times the rows where it is a fraction; NaN where it is not positive
  R2_HD static double divisor(Column c) { return c.second > 0 ? (c.second < 1 ? c.second * c.rows : c.second) : NAN; }

  template <class A>
  R2_HD static double finish(const double* state, Column c, A* saved) {
    saved[0] = A(state[1]);
    return fabs(c.first) + state[0] / divisor(c);
  }

  template <class A>
  R2_HD static double parameter_gradient(double grad, Column c, const A* saved) {
    return grad * sign_(c.first) * (1 - double(saved[0]) / divisor(c));
  }

  template <class V>
  struct Gradient {
    V M, slope;
    template <class A>
    R2_HD Gradient(double grad, Column c, const A*)
        : M(splat<V>(A(fabs(c.first)))), slope(splat<V>(A(grad / divisor(c)))) {}
    R2_HD V operator()(V w) const { return (abs_(w) > M ? sign_(w) : splat<V>(0)) * slope; }
  };
};

// Soft extremes, with exponents delta = k (w - M) <= 0 for the maximum side, -k (w - m) for the minimum side, k =
// |alpha| log2(e). State, in the units of the weights: (M, S0, mean - M, deviation), of the weights that count 2^delta
// each and S0 in all, then the same around the minimum m. A deviation, as float32 has no room for the square of every
// weight.
struct Soft {
  static constexpr int kSaved = saved_numbers::soft_min_max;
  static_assert(kSaved == saved_numbers::soft_extrema);

  // What exponents span at least: its powers are numbers, and 2^it is 1.
  template <class A>
  static constexpr A kLeastSpan = sizeof(A) == 4 ? A(1e-9) : A(1e-30);

  // The |alpha| to sum with over weights of this range. One that is as good as 0 is taken as a larger one, for
  // exponents to have squares; a normal number, which beyond a range of 1e31 is no longer as good as 0.
  template <class A>
  R2_HD static double size(double alpha, A range) {
    constexpr A smallest = sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022);
    double least = double(kLeastSpan<A>) / double(range > smallest ? range : smallest);
    least = least > double(smallest) ? least : double(smallest);
    return fabs(alpha) < least ? least : fabs(alpha);
  }

  // Exponents from differences of weights. In double the rounding of alpha log2(e) is made good, or it would be the
  // largest error.
  template <class V>
  struct Exponent {
    using A = typename Scalar<V>::type;
    V k, rest;
    R2_HD explicit Exponent(double a)
        : k(splat<V>(A(a * kLog2e))), rest(splat<V>(A(fma(a, kLog2e, -(a * kLog2e)) + a * 2.0355273740931033e-17))) {}
    R2_HD V operator()(V difference) const {
#if !defined(__CUDACC__)  // there the two registers would make the kernel spill
      if constexpr (sizeof(A) == 8) return bounded_(k * difference + rest * difference);
#endif
      return bounded_(k * difference);
    }
  };

  template <class V>
  struct Sums {
    V s0, s1, s2;
    template <bool kVariance>
    R2_HD void add(V delta) {
      add<kVariance>(delta, exp2_(delta));
    }
    template <bool kVariance>
    R2_HD void add(V delta, V e) {
      V t = delta * e;
      s0 += e, s1 += t;
      if (kVariance) s2 += delta * t;
    }
    template <bool kVariance>
    R2_HD static Sums of(V delta) {
      V e = exp2_(delta), t = delta * e;
      return {e, t, kVariance ? delta * t : splat<V>(0)};
    }
    R2_HD Sums& operator+=(const Sums& o) {
      s0 += o.s0, s1 += o.s1, s2 += o.s2;
      return *this;
    }
  };

  // Sums relative to an extreme that lies d above the present one, in units of the exponent, seen from there.
  template <class A>
  R2_HD static void move(A* s, A d) {
    A r = exp2_(d);
    s[2] = r * (s[2] + d * (2 * s[1] + d * s[0]));
    s[1] = r * (s[1] + d * s[0]);
    s[0] = r * s[0];
  }

  // One side of a state, from sums of delta^n 2^delta relative to `shift`; `k` is negative for the minimum side. The
  // shift becomes the soft extreme, so that rounding what is left of that costs nothing.
  template <class A>
  R2_HD static void settle(double shift, const double* sums, double k, A* state) {
    double mean = sums[1] / sums[0], variance = sums[2] / sums[0] - mean * mean;
    state[0] = A(shift + mean / k);
    double moved = shift - double(state[0]);
    state[1] = A(sums[0] * exp2_(k * moved)), state[2] = A(moved + mean / k);
    state[3] = A(sqrt(variance < 0 ? 0 : variance) / fabs(k));
  }

  // One side, around the outer one of both shifts.
  template <class S>
  R2_HD static void merge_side(double* into, const S* state, double k) {
    double apart = double(state[0]) - into[0], d = k * apart, mine = into[1], other = double(state[1]),
           between = apart + (double(state[2]) - into[2]);
    (d > 0 ? mine : other) *= exp2_(d > 0 ? -d : d);
    into[1] = mine + other;
    double share = other / into[1], rest = mine / into[1], deviation = double(state[3]);
    // from the outer side, so that what is rounded has the inner one's share
    into[2] = d > 0 ? double(state[2]) - rest * between : into[2] + share * between;
    into[0] = d > 0 ? double(state[0]) : into[0];
    into[3] = sqrt(rest * into[3] * into[3] + share * deviation * deviation + share * rest * between * between);
  }

  template <class S>
  R2_HD static void merge(double* into, const S* state, double k) {
    merge_side(into, state, k);
    merge_side(into + 4, state + 4, -k);
  }

  // (shift, 1 / S0, soft extreme - shift, deviation)
  template <class A>
  R2_HD static void save(const double* side, A* saved) {
    saved[0] = A(side[0]), saved[1] = A(1 / side[1]), saved[2] = A(side[2]), saved[3] = A(side[3]);
  }

  // extremes: soft minimum, soft maximum. For alpha < 0 the softmax of alpha w is the side of the minimum.
  template <class A>
  R2_HD static double finish(const double* state, Column c, A* saved, double* extremes) {
    const bool swapped = c.first < 0;
    const double *high = state, *low = state + 4;
    save(high, saved + (swapped ? 4 : 0)), save(low, saved + (swapped ? 0 : 4));
    double top = high[0] + high[2], bottom = low[0] + low[2];
    extremes[0] = swapped ? top : bottom, extremes[1] = swapped ? bottom : top;
    double range = (high[0] - low[0]) + (high[2] - low[2]);
    return (swapped ? -range : range) + exp(-c.first);
  }

  // from deviations, each product a number whenever the result is
  template <class A>
  R2_HD static double parameter_gradient(double g_max, double g_min, const A* saved) {
    return g_max * saved[3] * saved[3] - g_min * saved[7] * saved[7];
  }

  // g_max p (1 + alpha (w - s_max)) + g_min q (1 - alpha (w - s_min)), each side as 2^delta (a + b delta)
  template <class V>
  struct Side {
    V shift, a, b;
    Exponent<V> exponent;
    template <class A>
    R2_HD Side(double g, double alpha, const A* saved)
        : shift(splat<V>(saved[0])), a(splat<V>(A(g * saved[1] * (1 - alpha * saved[2])))),
          b(splat<V>(A(g * saved[1] * kLn2))), exponent(alpha) {}
    R2_HD V operator()(V w) const {
      V delta = exponent(w - shift);
      return exp2_(delta) * (a + b * delta);
    }
  };

  template <class V>
  struct Gradient {
    Side<V> p, q;
    template <class A>
    R2_HD Gradient(double g_max, double g_min, Column c, const A* saved)
        : p(g_max, c.first, saved), q(g_min, -c.first, saved + 4) {}
    R2_HD V operator()(V w) const { return p(w) + q(w); }
  };
};

using LInfOp = LossOp<LInf>;

struct MarginOp : LossOp<Margin> {
  template <class A>
  R2_HD static double parameter_gradient(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return Margin::parameter_gradient(upstream<A>(b, t), c, saved);
  }
};

template <bool kExtrema>
struct SoftOp : Soft {
  static constexpr bool kLoss = !kExtrema;

  template <class S>
  R2_HD static void merge(double* into, const S* state, Column c, bool) {
    Soft::merge(into, state, fabs(c.first) * kLog2e);
  }
  template <class A>
  R2_HD static double finish(const double* state, Column c, const List& list, int64_t at, A* saved, A* out) {
    double extremes[2], loss = Soft::finish(state, c, saved + at * kSaved, extremes);
    if (kExtrema) out[at] = A(extremes[0]), out[list.count * list.d + at] = A(extremes[1]);
    return loss;
  }

  struct Upstream {
    double low, high;
  };
  template <class A>
  R2_HD static Upstream upstream(const List& list, const Backward& b, int64_t t, int64_t at) {
    const A* grad = static_cast<const A*>(b.grad);
    if (kExtrema) return {double(grad[at]), double(grad[list.count * list.d + at])};
    double g = double(grad[t * b.grad_stride]);
    return {-g, g};
  }
  template <class V, class A>
  R2_HD static auto gradient(const List& list, const Backward& b, int64_t t, int64_t at, Column c, const A* saved) {
    Upstream g = upstream<A>(list, b, t, at);
    return Gradient<V>(g.high, g.low, c, saved);
  }
  template <class A>
  R2_HD static double parameter_gradient(const List& list, const Backward& b, int64_t t, int64_t at, Column c,
                                         const A* saved) {
    Upstream g = upstream<A>(list, b, t, at);
    return Soft::parameter_gradient(g.high, g.low, saved) - (kExtrema ? 0 : g.high * exp(-c.first));
  }
};

}  // namespace R2_ISA
}  // namespace r2
