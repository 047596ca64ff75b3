// The formulas of LSQ, EWGS, PACT and DoReFa (r2kernels/reference/quantizers.py), once for host and device. V is as in
// losses.h; rint_ rounds half to even.
#pragma once
#include <cstring>

#include "lists.h"

namespace r2 {
inline namespace R2_ISA {

// Rows [row, row + n) of column `column` of a tensor whose channels are columns.
struct ChannelChunk {
  int64_t tensor, row, n;
  int column;
};

R2_HD ChannelChunk channel_chunk_at(const List& list, int64_t i) {
  const int64_t t = owner_of(list, i);
  const uint32_t j = uint32_t(i - tensor_of(list, t).first_chunk), columns = uint32_t(tensor_of(list, t).columns);
  const int64_t row = j / columns * list.chunk, left = tensor_of(list, t).rows - row;
  return {t, row, left < list.chunk ? left : list.chunk, int(j % columns)};
}

// x / by as IEEE has it
template <class V>
struct Divisor {
  V by;
  R2_HD explicit Divisor(V by) : by(by) {}
  R2_HD V operator()(V x) const { return x / by; }
  R2_HD V whole(V x) const { return x / by; }
  R2_HD V near(V x) const { return x / by; }
};

#if defined(__CUDACC__)
// The same for |x / by| <= kMost, in six instructions without a branch; `by` lies in [2^-60, 2^60]. 1 / by is kept to
// 48 bits, so the first quotient is within an ulp and the last step rounds it correctly (Markstein's theorem).
// Quotients beyond stay beyond; one below 2^-20, where the remainder may be inexact, is right to an ulp.
struct FastDivisor {
  static constexpr float kMost = 1024, kLeast = 0x1p-60f, kGreatest = 0x1p60f;
  float by, inverse, rest;
  R2_HD explicit FastDivisor(float by) : by(by), inverse(1 / by), rest(fmaf(-by, inverse, 1.0f) * inverse) {}
  R2_HD float operator()(float x) const {
    float q = fminf(fmaxf(fmaf(x, inverse, x * rest), -kMost), kMost);
    return copysignf(fmaf(fmaf(-q, by, x), inverse, q), x);
  }
  // right for whole numbers up to 255 divided by such, all of which were tried
  R2_HD float whole(float x) const {
    float q = x * inverse;
    return fmaf(fmaf(-q, by, x), inverse, q);
  }
  R2_HD float near(float x) const { return x * inverse; }  // to an ulp
};

R2_HD float rint_(float x) { return rintf(x); }
R2_HD double rint_(double x) { return rint(x); }
#endif

template <class A>
R2_HD A positive(A p) {
  return p > 0 ? p : A(NAN);
}

template <class V>
R2_HD V clamp_(V x, V low, V high) {
  return x < low ? low : x > high ? high : x;
}

template <class V>
R2_HD V sign_of(V v) {
  return v < splat<V>(0) ? splat<V>(-1) : v >= splat<V>(0) ? splat<V>(1) : v;
}

template <class A>
R2_HD A parameter_at(const void* flat, int64_t i) {
  return static_cast<const A*>(flat)[i];
}
template <class A>
R2_HD void set_gradient(void* flat, int64_t i, double x) {
  static_cast<A*>(flat)[i] = A(x);
}

// An op has for each column `divisor`, what its formula divides by; the formula At<V, D>, with `forward` and
// `backward`, which adds to kSums sums; and `finish`, which makes parameters' gradients of the sums of `rows` numbers.

// The codes of LSQ: whole numbers, half-integers, or -1 and 1 alone.
enum class Code { whole, half, sign };

template <Code kCode>
struct Lsq {
  static constexpr int kSums = 1;

  template <class A>
  R2_HD static A divisor(const Quantizer& q, int64_t column) {
    return positive(parameter_at<A>(q.first, column));
  }

  template <class V, class D>
  struct At {
    using A = typename Scalar<V>::type;
    D step;
    V low, high;
    R2_HD At(const Quantizer& q, V s) : step(s), low(splat<V>(A(-q.low))), high(splat<V>(A(q.high))) {}
    R2_HD At(const Quantizer& q, int64_t column) : At(q, splat<V>(divisor<A>(q, column))) {}

    R2_HD V code(V v) const {
      if constexpr (kCode == Code::sign)
        return sign_of(v);
      else if constexpr (kCode == Code::half)
        return rint_(clamp_(v, low, high) - splat<V>(A(0.5))) + splat<V>(A(0.5));
      else
        return rint_(clamp_(v, low, high));
    }
    R2_HD V forward(V x) const { return step.by * code(step(x)); }
    R2_HD V backward(V x, V g, V* sums) const {
      V v = step(x);
      auto outside = (v < low) | (v > high);
      sums[0] += g * (code(v) - (outside ? splat<V>(0) : v));
      return outside ? splat<V>(0) : g;
    }
  };

  template <class A>
  R2_HD static void finish(const Quantizer& q, int64_t column, const double* sums, double rows) {
    set_gradient<A>(q.first_gradient, column, sums[0] / sqrt(rows * q.high));
  }
};

// Whether an op has parameters for each channel.
template <class Op>
constexpr bool kHasChannels = false;
template <Code kCode>
constexpr bool kHasChannels<Lsq<kCode>> = true;

// Calls run with the `Lsq` of these codes.
template <class Run>
void with_lsq(const Quantizer& q, Run run) {
  if (q.bits == 1 && q.low > 0) return run(Lsq<Code::sign>());
  if (q.high != floor(q.high)) return run(Lsq<Code::half>());
  run(Lsq<Code::whole>());
}

struct Ewgs {
  static constexpr int kSums = 2;

  template <class A>
  R2_HD static A divisor(const Quantizer& q, int64_t column) {
    return positive(parameter_at<A>(q.second, column) - parameter_at<A>(q.first, column));
  }

  template <class V, class D>
  struct At {
    using A = typename Scalar<V>::type;
    V lower, delta, n, factor, shift;
    D span, steps;
    R2_HD At(const Quantizer& q, int64_t column)
        : lower(splat<V>(parameter_at<A>(q.first, column))), delta(splat<V>(parameter_at<A>(q.third, column))),
          n(splat<V>(A((1 << q.bits) - 1))), factor(splat<V>(A(q.flag ? 2 : 1))), shift(q.flag ? n : splat<V>(0)),
          span(splat<V>(divisor<A>(q, column))), steps(n) {}

    R2_HD V forward(V x) const {
      V c = rint_(n * clamp_(span(x - lower), splat<V>(0), splat<V>(1)));
      return steps.whole(factor * c - shift);
    }
    R2_HD V backward(V x, V g, V* sums) const {
      V v = span(x - lower), clipped = clamp_(v, splat<V>(0), splat<V>(1));
      g = factor * g;
      V scaled = g + delta * abs_(g) * (clipped - steps.near(rint_(n * clipped)));
      scaled = (v < splat<V>(0)) | (v > splat<V>(1)) ? splat<V>(0) : scaled;
      sums[0] += scaled * (clipped - splat<V>(1)), sums[1] += scaled * clipped;
      return span.near(scaled);
    }
  };

  template <class A>
  R2_HD static void finish(const Quantizer& q, int64_t column, const double* sums, double) {
    const double span = double(divisor<A>(q, column));
    set_gradient<A>(q.first_gradient, column, sums[0] / span),
        set_gradient<A>(q.second_gradient, column, -sums[1] / span);
  }
};

template <bool kPlus>
struct Pact {
  static constexpr int kSums = 1;

  template <class A>
  R2_HD static A divisor(const Quantizer& q, int64_t column) {
    return positive(parameter_at<A>(q.first, column)) / A((1 << q.bits) - 1);
  }

  template <class V, class D>
  struct At {
    using A = typename Scalar<V>::type;
    V alpha;
    D step, steps;
    R2_HD At(const Quantizer& q, int64_t column)
        : alpha(splat<V>(positive(parameter_at<A>(q.first, column)))), step(splat<V>(divisor<A>(q, column))),
          steps(splat<V>(A((1 << q.bits) - 1))) {}

    R2_HD V forward(V x) const { return step.by * rint_(step(x >= alpha ? alpha : x < splat<V>(0) ? splat<V>(0) : x)); }
    R2_HD V backward(V x, V g, V* sums) const {
      auto above = x >= alpha, below = x < splat<V>(0);
      V inside = splat<V>(0);
      if constexpr (kPlus) {
        V z = step(x);
        inside = steps.near(rint_(z) - z);
      }
      sums[0] += g * (above ? splat<V>(1) : below ? splat<V>(0) : inside);
      return above | below ? splat<V>(0) : g;
    }
  };

  template <class A>
  R2_HD static void finish(const Quantizer& q, int64_t column, const double* sums, double) {
    set_gradient<A>(q.first_gradient, column, sums[0]);
  }
};

// Minimax polynomials of (2^f - 1) / f for |f| <= 1/2, highest power first: relative error 1.1e-8, 1.8e-17.
template <class V>
R2_HD V rise(V f) {
  if constexpr (sizeof(typename Scalar<V>::type) == 4) {
    constexpr float c[6] = {1.5403512e-4f, 1.3390735e-3f, 9.6182375e-3f, 5.5503574e-2f, 2.4022650e-1f, 6.9314719e-1f};
    V p = splat<V>(c[0]);
    for (int i = 1; i < 6; ++i) p = p * f + c[i];
    return p;
  } else {
    constexpr double c[11] = {4.445537228154442733e-10, 7.072561701930320513e-9, 1.017812129916570442e-7,
                              1.321544272423112757e-6,  1.525273370121465649e-5, 1.540353044148067992e-4,
                              1.333355814653163286e-3,  9.618129107607065669e-3, 5.550410866482123653e-2,
                              2.402265069591009789e-1,  6.931471805599453113e-1};
    V p = splat<V>(c[0]);
    for (int i = 1; i < 11; ++i) p = p * f + c[i];
    return p;
  }
}

#if defined(__CUDACC__)
// 2^k of a number to which 1.5 * 2^23 (1.5 * 2^52) was added
R2_HD float power_of_two(float shifted) {
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = int32_t((uint32_t(bits) << 23) + 0x3f800000u);
  memcpy(&shifted, &bits, 4);
  return shifted;
}
R2_HD double power_of_two(double shifted) {
  int64_t bits;
  memcpy(&bits, &shifted, 8);
  bits = int64_t((uint64_t(bits) << 52) + 0x3ff0000000000000u);
  memcpy(&shifted, &bits, 8);
  return shifted;
}
R2_HD float ratio(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
R2_HD double ratio(double a, double b) { return a / b; }
#else
template <class V>
R2_HD V power_of_two(V shifted) {
  return scaled(splat<V>(1), shifted);
}
template <class V>
R2_HD V ratio(V a, V b) {
  return a / b;
}
#endif

// e / (e + 2), e = 2^y - 1 with y = 2 |x| log2(e): right to about two ulp, however small x is
template <class V>
R2_HD V tanh_(V x) {
  using A = typename Scalar<V>::type;
  constexpr A most = sizeof(A) == 4 ? 10 : 20, round = sizeof(A) == 4 ? 12582912.0 : 6755399441055744.0,
              unit = 2.8853900817779268;
  V a = abs_(x);
  V y = (a > splat<V>(most) ? splat<V>(most) : a) * unit, shifted = y + round, f = y - (shifted - round);
  V power = power_of_two(shifted), e = power * (f * rise(f)) + (power - splat<V>(1));
  V t = ratio(e, e + splat<V>(2));
  return x < splat<V>(0) ? -t : t;
}

// first: (count, 2), max|w| and how many attain it; for one bit the mean of |w|. first_gradient: sum g t, for the
// correction at the maxima.
struct Dorefa {
  static constexpr int kSums = 2;

  template <class A>
  R2_HD static A divisor(const Quantizer& q, int64_t column) {
    A m = tanh_(parameter_at<A>(q.first, 2 * column));
    return m == 0 ? A(1) : m;
  }

  template <class V, class D>
  struct At {
    using A = typename Scalar<V>::type;
    V top, n, share;
    D m, steps;
    R2_HD At(const Quantizer& q, int64_t column)
        : top(splat<V>(parameter_at<A>(q.first, 2 * column))), n(splat<V>(A((1 << q.bits) - 1))), share(splat<V>(0)),
          m(splat<V>(divisor<A>(q, column))), steps(n) {}

    R2_HD V forward(V x) const {
      V c = rint_(n * (m.near(tanh_(x)) * A(0.5) + A(0.5)));
      return steps.whole(c + c - n);
    }
    // sums: g t, and how many attain the maximum
    R2_HD V backward(V x, V g, V* sums) const {
      V t = tanh_(x);
      sums[0] += g * t, sums[1] += abs_(x) == top ? splat<V>(1) : splat<V>(0);
      return m.near(g * ((splat<V>(1) - t) * (splat<V>(1) + t)));
    }
    R2_HD void share_out(const Quantizer& q, int64_t column) {
      A scale = m.by;
      share = parameter_at<A>(q.first_gradient, column) / scale / (scale * parameter_at<A>(q.first, 2 * column + 1));
    }
    // of one of the maxima
    R2_HD V corrected(V x, V g) const {
      V t = tanh_(x), slope = (1 - t) * (1 + t);
      return m.near(g * slope) - (t > 0 ? slope * share : t < 0 ? -slope * share : t);
    }
  };

  template <class A>
  R2_HD static void finish(const Quantizer& q, int64_t column, const double* sums, double) {
    set_gradient<A>(q.first_gradient, column, sums[0]);
  }
};

struct DorefaSign {
  template <class A>
  R2_HD static A divisor(const Quantizer&, int64_t) {
    return 1;
  }
  template <class V, class D>
  struct At {
    V size;
    R2_HD At(const Quantizer& q, int64_t column)
        : size(splat<V>(parameter_at<typename Scalar<V>::type>(q.first, 2 * column))) {}
    R2_HD V forward(V x) const { return sign_of(x) * size; }
  };
};

// For one bit the gradients themselves.
struct Copy {
  template <class A>
  R2_HD static A divisor(const Quantizer&, int64_t) {
    return 1;
  }
  template <class V, class D>
  struct At {
    R2_HD At(const Quantizer&, int64_t) {}
    R2_HD V forward(V x) const { return x; }
  };
};

}  // namespace R2_ISA
}  // namespace r2
