// The formulas of kure, weight_stats, msqe, partial_l2 and bin_reg, and their gradients, once for host and device.
#pragma once
#include "levels.h"
#include "losses.h"

namespace r2 {
inline namespace R2_ISA {

// The power of two at |x| or below, within bounds where it and its inverse are normal numbers, also for 0 and NaN.
template <class A>
R2_HD A unit_at(A x) {
  constexpr int most = sizeof(A) == 4 ? 126 : 1022;
  const int exponent = ilogb(double(x));
  return A(ldexp(1.0, exponent < -most ? -most : exponent > most ? most : exponent));
}

// Central moments. State: n, mean, M2, M3, M4, min, max, unit; a NaN is minimum and maximum. Mean and moments are those
// of w / unit, so that fourth powers have room in float32 for weights of any size.
struct Moments {
  static constexpr int kSaved = saved_numbers::kure;

  template <class V>
  struct Lanes {
    V m1, m2, m3, m4;
    R2_HD void add(V z) {
      V square = z * z;
      m1 += z, m2 += square, m3 += square * z, m4 += square * square;
    }
    R2_HD void operator+=(const Lanes& o) { m1 += o.m1, m2 += o.m2, m3 += o.m3, m4 += o.m4; }
  };

  // all but min and max, from the sums of the powers of what n weights are above a pivot near their mean, in units
  template <class A>
  R2_HD static void centre(double n, A unit, double pivot, const A* sums, A* state) {
    double e = double(sums[0]) / n, s2 = sums[1], s3 = sums[2], s4 = sums[3];
    state[0] = A(n), state[1] = A(pivot + e), state[2] = A(s2 - n * e * e);
    state[3] = A(s3 - e * (3 * s2 - 2 * n * e * e)), state[4] = A(s4 - e * (4 * s3 - e * (6 * s2 - 3 * n * e * e)));
    state[7] = unit;
  }

  template <class S>
  R2_HD static void merge(double* into, const S* s) {
    const double unit = into[7] >= s[7] ? into[7] : double(s[7]), to_a = into[7] / unit, to_b = s[7] / unit;
    const double a2 = to_a * to_a, b2 = to_b * to_b, na = into[0], nb = s[0], n = na + nb;
    const double mean_a = into[1] * to_a, a_m2 = into[2] * a2, a_m3 = into[3] * (a2 * to_a), a_m4 = into[4] * (a2 * a2);
    const double mean_b = s[1] * to_b, b_m2 = s[2] * b2, b_m3 = s[3] * (b2 * to_b), b_m4 = s[4] * (b2 * b2);
    const double d = mean_b - mean_a, e = d / n, both = na * nb * d * e;
    into[4] = a_m4 + b_m4 + both * e * e * (na * na - na * nb + nb * nb) +
              6 * e * e * (na * na * b_m2 + nb * nb * a_m2) + 4 * e * (na * b_m3 - nb * a_m3);
    into[3] = a_m3 + b_m3 + both * e * (na - nb) + 3 * e * (na * b_m2 - nb * a_m2);
    into[2] = a_m2 + b_m2 + both;
    into[1] = (na * mean_a + nb * mean_b) / n;
    into[0] = n, into[7] = unit;
    into[5] = into[5] <= s[5] || into[5] != into[5] ? into[5] : s[5];
    into[6] = into[6] >= s[6] || into[6] != into[6] ? into[6] : s[6];
  }

  struct Shape {
    double mean, std, skew, kurtosis;
    R2_HD explicit Shape(const double* s) : mean(s[1] * s[7]), std(0), skew(0), kurtosis(0) {
      const double low = s[5], high = s[6];
      if (!(low - low == 0 && high - high == 0)) {
        mean = low + high, std = skew = kurtosis = NAN;
      } else if (low < high) {
        const double n = s[0], variance = s[2] / (n - 1), root = sqrt(variance);
        std = root * s[7], skew = s[3] / (n * variance * root), kurtosis = s[4] / (n * variance * variance);
      }
    }
  };
};

// (kurtosis - target)^2
struct Kure : Moments {
  template <class A>
  R2_HD static double finish(const double* state, Column c, A* saved) {
    Shape shape(state);
    saved[0] = A(shape.mean), saved[1] = A(shape.std == 0 ? 0 : 1 / shape.std), saved[2] = A(shape.skew),
    saved[3] = A(shape.kurtosis);
    return shape.std == 0 ? 0 : (shape.kurtosis - c.first) * (shape.kurtosis - c.first);
  }

  template <class V>
  struct Gradient {
    V mean, rstd, skew, linear, slope;
    template <class A>
    R2_HD Gradient(double grad, Column c, const A* saved)
        : mean(splat<V>(saved[0])), rstd(splat<V>(saved[1])), skew(splat<V>(saved[2])),
          linear(splat<V>(A((c.rows > 1 ? c.rows / (c.rows - 1) : 1) * saved[3]))),  // a shard of one number has it
          slope(splat<V>(A(grad * 8 * (saved[3] - c.first) / c.rows * saved[1]))) {}
    R2_HD V operator()(V w) const {
      V z = (w - mean) * rstd;
      return slope * (z * (z * z - linear) - skew);
    }
  };
};

struct WeightStats : Moments {
  template <class A>
  R2_HD static void finish(const double* state, A* row) {
    Shape shape(state);
    double low = state[5], high = state[6];
    row[0] = A(low), row[1] = A(high), row[2] = A(shape.mean), row[3] = A(shape.std), row[4] = A(shape.kurtosis);
    row[5] = A(!(fabs(low) < fabs(high)) ? fabs(low) : fabs(high)), row[6] = A(shape.skew);
  }
};

using KureOp = LossOp<Kure>;

struct WeightStatsOp : LossOp<Kure> {
  static constexpr bool kLoss = false;

  template <class A>
  R2_HD static double finish(const double* state, Column, const List&, int64_t at, A*, A* out) {
    WeightStats::finish(state, out + at * kStatistics);
    return 0;
  }
};

// What errors w - Q are divided by before their squares are summed: so far below the step, and so small, that no square
// vanishes that has a place in the result. A sum may overflow (in float32 where errors exceed 2^15 steps, or 2^37), and
// is then made anew in a wider unit.
template <class A>
struct ErrorUnit {
  static constexpr bool kSingle = sizeof(A) == 4;
  A unit, inverse;

  R2_HD explicit ErrorUnit(double step) {
    const double below = unit_at(step) * ldexp(1.0, kSingle ? -40 : -300), most = ldexp(1.0, kSingle ? -19 : -37);
    set(below < most ? below : most);
  }
  // whether a sum overflowed that another unit has room for; from then on it is that
  R2_HD bool widen(A sum) {
    if (!(sum == A(INFINITY)) || unit == unit_at(A(INFINITY))) return false;
    set(unit * ldexp(1.0, kSingle ? 100 : 800));
    return true;
  }

 private:
  R2_HD void set(double wanted) { unit = unit_at(A(wanted)), inverse = 1 / unit; }
};

// mean (w - Q)^2. State: sum of (w - Q)^2, of (w - Q) code, unit; the sums are of (w - Q) / unit.
struct Msqe {
  static constexpr int kSaved = saved_numbers::msqe;

  template <class V>
  struct Lanes {
    V squares, products;
    R2_HD void add(V w, const Coder<V>& coder, V inverse) {
      V code = coder(w), error = (w - coder.step * code) * inverse;
      squares += error * error, products += error * code;
    }
    R2_HD void operator+=(const Lanes& o) { squares += o.squares, products += o.products; }
  };

  template <class S>
  R2_HD static void merge(double* into, const S* state) {
    const double unit = into[2] >= state[2] ? into[2] : double(state[2]), a = into[2] / unit, b = state[2] / unit;
    into[0] = into[0] * (a * a) + state[0] * (b * b), into[1] = into[1] * a + state[1] * b, into[2] = unit;
  }

  template <class A>
  R2_HD static double finish(const double* state, Column c, A* saved) {
    saved[0] = A(state[1] / c.rows * state[2]);
    return state[0] / c.rows * state[2] * state[2];
  }

  template <class V>
  struct Gradient {
    Coder<V> coder;
    V slope;
    template <class A>
    R2_HD Gradient(double grad, Column c, const A*)
        : coder(c.first, c.bits, true), slope(splat<V>(A(2 * grad / c.rows))) {}
    R2_HD V operator()(V w) const { return slope * (w - coder.step * coder(w)); }
  };
};

struct MsqeOp : LossOp<Msqe> {
  template <class A>
  R2_HD static double parameter_gradient(const List&, const Backward& b, int64_t t, int64_t, Column, const A* saved) {
    return -2 * upstream<A>(b, t) * double(saved[0]);
  }
};

// 1/N sum w^2 [|w| <= theta]; first of the column is theta, which `saved` holds already. State: the sum, in units of
// the power of two at theta.
struct PartialL2 {
  static constexpr int kSaved = saved_numbers::partial_l2;

  template <class V>
  R2_HD static V kept(V w, V theta) {
    return abs_(w) > theta ? splat<V>(0) : w;
  }

  template <class S>
  R2_HD static void merge(double* into, const S* state) {
    into[0] += state[0];
  }

  R2_HD static double divisor(Column c) { return c.first == c.first ? c.rows : NAN; }

  template <class A>
  R2_HD static double finish(const double* state, Column c, A*) {
    const double unit = unit_at(A(c.first));
    return state[0] / divisor(c) * unit * unit;
  }

  template <class V>
  struct Gradient {
    V theta, slope;
    template <class A>
    R2_HD Gradient(double grad, Column c, const A*)
        : theta(splat<V>(A(c.first))), slope(splat<V>(A(2 * grad / divisor(c)))) {}
    R2_HD V operator()(V w) const { return slope * kept(w, theta); }
  };
};

using PartialL2Op = LossOp<PartialL2>;

// sum over bins of sum (w - q)^2 / count. A chunk has 2^bits counts, as many sums, and the unit of (w - q); saved are
// the counts, and the means that the loss sums.
struct BinReg {
  R2_HD static int64_t state_size(int bits) { return (2 << bits) + 1; }
  R2_HD static double mean(double error, double count) { return error / (count > 1 ? count : 1); }
};

}  // namespace R2_ISA
}  // namespace r2
