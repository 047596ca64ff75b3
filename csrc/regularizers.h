// bin_reg, msqe and partial_l2: formulas as those of math.h, ops as those of ops.h.
#pragma once
#include "codes.h"
#include "ops.h"

namespace r2 {
inline namespace R2_ISA {

// mean (w - Q)^2. State: sum of (w - Q)^2, of (w - Q) code.
struct Msqe {
  static constexpr int kSaved = 1;

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
    R2_HD Gradient(double grad, Column c, const A*) : coder(c.first, c.bits, true), slope(splat<V>(A(2 * grad / c.rows))) {}
    R2_HD V operator()(V w) const { return slope * (w - coder.step * coder(w)); }
  };
};

struct MsqeOp : Plain<Msqe> {
  template <class A>
  R2_HD static double parameter_gradient(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return -2 * upstream<A>(b, t) / c.rows * double(saved[0]);
  }
};

// 1/N sum w^2 [|w| <= theta]; first of the column is theta, which `saved` holds already. State: the sum.
struct PartialL2 {
  static constexpr int kSaved = 1;

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
    R2_HD Gradient(double grad, Column c, const A*) : theta(splat<V>(A(c.first))), slope(splat<V>(A(2 * grad / divisor(c)))) {}
    R2_HD V operator()(V w) const { return slope * kept(w, theta); }
  };
};

using PartialL2Op = Plain<PartialL2>;

// sum over bins of sum (w - q)^2 / count. A chunk has 2^bits counts, then as many sums.
struct BinReg {
  R2_HD static double mean(double error, double count) { return error / (count > 1 ? count : 1); }
};

}  // namespace R2_ISA
}  // namespace r2
