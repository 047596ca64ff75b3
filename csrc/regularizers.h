// The formulas of kure, weight_stats, msqe, partial_l2 and bin_reg, and their gradients, once for host and device.
#pragma once
#include "levels.h"
#include "losses.h"

namespace r2 {
inline namespace R2_ISA {

// Central moments. State: n, mean, M2, M3, M4, min, max; a NaN is minimum and maximum.
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

  // n, mean, M2, M3, M4 from the sums of the powers of what n weights are above a pivot near their mean
  template <class A>
  R2_HD static void centre(double n, double pivot, const A* sums, A* state) {
    double e = double(sums[0]) / n, s2 = sums[1], s3 = sums[2], s4 = sums[3];
    state[0] = A(n), state[1] = A(pivot + e), state[2] = A(s2 - n * e * e);
    state[3] = A(s3 - e * (3 * s2 - 2 * n * e * e)), state[4] = A(s4 - e * (4 * s3 - e * (6 * s2 - 3 * n * e * e)));
  }

  template <class S>
  R2_HD static void merge(double* into, const S* s) {
    double na = into[0], nb = s[0], n = na + nb, d = s[1] - into[1], e = d / n, both = na * nb * d * e;
    double m2 = into[2], m3 = into[3];
    into[4] += s[4] + both * e * e * (na * na - na * nb + nb * nb) + 6 * e * e * (na * na * s[2] + nb * nb * m2) +
               4 * e * (na * s[3] - nb * m3);
    into[3] += s[3] + both * e * (na - nb) + 3 * e * (na * s[2] - nb * m2);
    into[2] += s[2] + both;
    into[1] = (na * into[1] + nb * s[1]) / n;
    into[0] = n;
    into[5] = into[5] <= s[5] || into[5] != into[5] ? into[5] : s[5];
    into[6] = into[6] >= s[6] || into[6] != into[6] ? into[6] : s[6];
  }

  struct Shape {
    double mean, std, skew, kurtosis;
    R2_HD explicit Shape(const double* s) : mean(s[1]), std(0), skew(0), kurtosis(0) {
      if (s[5] == s[6]) return;
      double n = s[0], variance = s[2] / (n - 1);
      std = sqrt(variance);
      skew = s[3] / (n * variance * std), kurtosis = s[4] / (n * variance * variance);
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
          linear(splat<V>(A(c.rows > 1 ? c.rows / (c.rows - 1) * saved[3] : 0))),
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
    row[5] = A(!(fabs(low) < fabs(high)) ? fabs(low) : fabs(high));
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

// mean (w - Q)^2. State: sum of (w - Q)^2, of (w - Q) code.
struct Msqe {
  static constexpr int kSaved = saved_numbers::msqe;

  template <class V>
  struct Lanes {
    V squares, products;
    R2_HD void add(V w, const Coder<V>& coder) {
      V code = coder(w), error = w - coder.step * code;
      squares += error * error, products += error * code;
    }
    R2_HD void operator+=(const Lanes& o) { squares += o.squares, products += o.products; }
  };

  template <class S>
  R2_HD static void merge(double* into, const S* state) {
    into[0] += state[0], into[1] += state[1];
  }

  template <class A>
  R2_HD static double finish(const double* state, Column c, A* saved) {
    saved[0] = A(state[1]);
    return state[0] / c.rows;
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
  R2_HD static double parameter_gradient(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return -2 * upstream<A>(b, t) / c.rows * double(saved[0]);
  }
};

// 1/N sum w^2 [|w| <= theta]; first of the column is theta, which `saved` holds already. State: the sum.
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
    return state[0] / divisor(c);
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

// sum over bins of sum (w - q)^2 / count. A chunk has 2^bits counts, then as many sums.
struct BinReg {
  R2_HD static double mean(double error, double count) { return error / (count > 1 ? count : 1); }
};

}  // namespace R2_ISA
}  // namespace r2
