// What every native backend does with an op, apart from how it reads a chunk: where chunks lie, how states merge, what a result and a gradient are made of.
#pragma once
#include "math.h"

namespace r2 {
inline namespace R2_ISA {

// Rows [row, row + n) of one column.
struct Chunk {
  int64_t tensor, row, n;
  int column;
};

R2_HD Chunk chunk_at(const List& list, int64_t i) {
  const int64_t t = list.owner[i];
  const uint32_t j = uint32_t(i - list.tensors[t].first), d = uint32_t(list.d);
  const int64_t row = j / d * list.chunk, left = list.tensors[t].rows - row;
  return {t, row, left < list.chunk ? left : list.chunk, int(j % d)};
}

template <class A>
R2_HD Column column_at(const List& list, const void* first, const void* second, int64_t tensor, int column, int bits = 0) {
  int64_t at = tensor * list.d + column;
  return {first ? double(static_cast<const A*>(first)[at]) : 0, second ? double(static_cast<const A*>(second)[at]) : 0, double(list.tensors[tensor].rows),
          bits};
}

template <class Formula>
struct Plain : Formula {
  static constexpr bool kLoss = true;

  template <class S>
  R2_HD static void merge(double* into, const S* state, Column, bool) {
    Formula::merge(into, state);
  }
  template <class A>
  R2_HD static double finish(const double* state, Column c, const List&, int64_t at, A* saved, A*) {
    return Formula::finish(state, c, saved + at * Formula::kSaved);
  }
  template <class A>
  R2_HD static double upstream(const Backward& b, int64_t t) {
    return double(static_cast<const A*>(b.grad)[t * b.grad_stride]);
  }
  template <class V, class A>
  R2_HD static auto gradient(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return typename Formula::template Gradient<V>(upstream<A>(b, t), c, saved);
  }
  template <class A>
  R2_HD static double parameter_gradient(const List&, const Backward&, int64_t, int64_t, Column, const A*) {
    return 0;
  }
};

using LInfOp = Plain<LInf>;
using KureOp = Plain<Kure>;

struct MarginOp : Plain<Margin> {
  template <class A>
  R2_HD static double parameter_gradient(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return Margin::parameter_gradient(upstream<A>(b, t), c, saved);
  }
};

template <bool kExtrema>
struct SoftOp : Soft {
  static constexpr bool kLoss = !kExtrema;

  // k as the chunks had it, rounded to their type
  R2_HD static double scale_of(Column c, bool single) { return single ? double(float(scale(c.first, true))) : scale(c.first, false); }

  template <class S>
  R2_HD static void merge(double* into, const S* state, Column c, bool single) {
    Soft::merge(into, state, scale_of(c, single));
  }
  template <class A>
  R2_HD static double finish(const double* state, Column c, const List& list, int64_t at, A* saved, A* out) {
    double extremes[2], loss = Soft::finish(state, c, sizeof(A) == 4 ? 1 / scale_of(c, true) : kLn2 / size(c.first, false), saved + at * kSaved, extremes);
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
  R2_HD static double parameter_gradient(const List& list, const Backward& b, int64_t t, int64_t at, Column c, const A* saved) {
    Upstream g = upstream<A>(list, b, t, at);
    return Soft::parameter_gradient(g.high, g.low, saved) - (kExtrema ? 0 : g.high * exp(-c.first));
  }
};

struct WeightStatsOp : Plain<Kure> {
  static constexpr bool kLoss = false;

  template <class A>
  R2_HD static double finish(const double* state, Column, const List&, int64_t at, A*, A* out) {
    WeightStats::finish(state, out + at * 6);
    return 0;
  }
};

}  // namespace R2_ISA
}  // namespace r2
