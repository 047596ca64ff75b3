// What the losses of csrc/range_losses.h and csrc/regularizers.h have in common, apart from how a backend reads a
// chunk: where chunks lie, and what a formula has to say of its states, its results and its gradients. V is the
// accumulator A (float, double), or on the CPU a vector of them (cpu/simd.h, to be included first); vectors and scalars
// share the operators, `c ? a : b`, and the functions splat, exp2_ and abs_.
#pragma once
#include "lists.h"

namespace r2 {
inline namespace R2_ISA {

// sign(x), and x itself where that is 0 or NaN
template <class V>
R2_HD V sign_(V x) {
  return x > splat<V>(0) ? splat<V>(1) : x < splat<V>(0) ? splat<V>(-1) : x;
}

// Rows [row, row + n) of one column.
struct Chunk {
  int64_t tensor, row, n;
  int column;
};

R2_HD Chunk chunk_at(const List& list, int64_t i) {
  const int64_t t = owner_of(list, i);
  const uint32_t j = uint32_t(i - tensor_of(list, t).first_chunk), d = uint32_t(list.d);
  const int64_t row = j / d * list.chunk, left = tensor_of(list, t).rows - row;
  return {t, row, left < list.chunk ? left : list.chunk, int(j % d)};
}

// What a column is given: its parameters as the op takes them, and its number of rows.
struct Column {
  double first, second, rows;
  int bits = 0;
};

template <class A>
R2_HD Column column_at(const List& list, const void* first, const void* second, int64_t tensor, int column,
                       int bits = 0) {
  int64_t at = tensor * list.d + column;
  return {first ? double(static_cast<const A*>(first)[at]) : 0, second ? double(static_cast<const A*>(second)[at]) : 0,
          double(tensor_of(list, tensor).rows), bits};
}

// The op of a formula whose results are its own and whose gradient has one upstream number for each tensor.
template <class Formula>
struct LossOp : Formula {
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

}  // namespace R2_ISA
}  // namespace r2
