// LSQ, EWGS, PACT and DoReFa on the CPU: a map of a list, and a map that sums as it goes. Compiled once for each
// instruction set (R2_ISA).
#include <vector>

#include "kernels.h"
#include "rounding.h"
#include "skeletons.h"

#include "../quantizers.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kSumRun = 12;           // vectors in a run and runs in a block, as in cpu/skeletons.h
constexpr int64_t kShortRun = 32;     // below, the columns of a tensor go abreast
constexpr int64_t kAbreast = 65536;   // numbers for a unit of columns abreast
constexpr int64_t kTogether = 16384;  // and of columns one behind the other

// Each column in chunks of the plan; columns that a chunk holds, and that lie one behind the other, some at a time; or
// columns in short runs abreast.
enum class Way { chunks, columns, abreast };

// What one thread does at a time: a chunk; columns [begin, end); or of columns abreast some of the `outer` repetitions
// of columns * run numbers.
struct Unit {
  int64_t tensor;
  Way way;
  int64_t chunk, begin, end;
  double* sums;
};

// The units of a list; their sums lie in `room`: for a chunk kSums numbers, for columns abreast kSums for each column.
template <int kSums>
struct Units {
  std::vector<Unit> all;
  std::vector<double> room;
  std::vector<int64_t> first;  // unit of each tensor; one more at the end

  explicit Units(const List& list) {
    all.reserve(list.chunks);
    std::vector<int64_t> offsets;
    int64_t size = 0;
    auto add = [&](Unit unit, int64_t columns) {
      all.push_back(unit), offsets.push_back(size);
      size += kSums * columns;
    };
    for (int64_t t = 0; t < list.count; ++t) {
      const Tensor& tensor = tensor_of(list, t);
      first.push_back(all.size());
      const Way way = way_of(list, tensor);
      if (way == Way::columns) {
        const int64_t step = kTogether / tensor.rows > 1 ? kTogether / tensor.rows : 1;
        for (int64_t c = 0; c < tensor.columns; c += step)
          add({t, way, -1, c, c + step < tensor.columns ? c + step : tensor.columns, nullptr}, 0);
      } else if (way == Way::abreast) {
        const int64_t outer = tensor.rows / tensor.run, period = tensor.columns * tensor.run,
                      step = kAbreast / period > 64 ? kAbreast / period : 64;
        for (int64_t o = 0; o < outer; o += step)
          add({t, way, -1, o, o + step < outer ? o + step : outer, nullptr}, tensor.columns);
      } else {
        const int64_t end = t + 1 < list.count ? tensor_of(list, t + 1).first_chunk : list.chunks;
        for (int64_t i = tensor.first_chunk; i < end; ++i) add({t, way, i, 0, 0, nullptr}, 1);
      }
    }
    first.push_back(all.size());
    room.resize(size);
    for (size_t i = 0; i < all.size(); ++i) all[i].sums = room.data() + offsets[i];
  }

  static Way way_of(const List& list, const Tensor& tensor) {
    if (tensor.columns == 1) return Way::chunks;
    if (tensor.run == tensor.rows && tensor.rows <= list.chunk) return Way::columns;
    return tensor.run < kShortRun ? Way::abreast : Way::chunks;
  }

  // Of one column, in the order of the units.
  void total(const Tensor& tensor, int64_t t, int64_t column, double* sums) const {
    const bool beside = all[first[t]].way == Way::abreast;
    for (int s = 0; s < kSums; ++s) sums[s] = 0;
    for (int64_t i = first[t] + (beside ? 0 : column); i < first[t + 1]; i += beside ? 1 : tensor.columns)
      for (int s = 0; s < kSums; ++s) sums[s] += all[i].sums[(beside ? column * kSums : 0) + s];
  }
};

// Calls visit(memory index, length) for each run of consecutive memory of a chunk.
template <class Visit>
inline void each_stretch(const Tensor& tensor, const ChannelChunk& part, Visit visit) {
  if (tensor.columns == 1) return visit(part.row, part.n);
  each_run(tensor, int(tensor.columns), {part.tensor, part.row, part.n, part.column},
           [&](int64_t at, int64_t, int64_t length) { visit(at, length); });
}

template <class T>
struct Arrays {
  const T *x, *g;
  T* out;
  Arrays(const List& list, const Quantizer& q, int64_t t)
      : x(reinterpret_cast<const T*>(list.pointers[t])), g(q.grads ? reinterpret_cast<const T*>(q.grads[t]) : nullptr),
        out(reinterpret_cast<T*>(static_cast<const int64_t*>(q.target)[t])) {}
};

template <class V, int kSums>
struct Sums {
  V s[kSums];
  R2_HD void operator+=(const Sums& other) {
    for (int i = 0; i < kSums; ++i) s[i] += other.s[i];
  }
};

template <int kSums, class T, class Wide, class Tail>
R2_HD void map_and_sum(const T* x, const T* g, T* out, int64_t n, const Wide& wide, const Tail& tail,
                       Sums<Vec<Acc<T>>, kSums>& sums, Sums<Acc<T>, kSums>& rest) {
  using V = Vec<Acc<T>>;
  int64_t i = 0;
  while (i + lanes<V> <= n) {
    Sums<V, kSums> block = {};
    for (int runs = 0; runs < kSumRun && i + lanes<V> <= n; ++runs) {
      const int64_t end = i + kSumRun * lanes<V> < n ? i + kSumRun * lanes<V> : n;
      Sums<V, kSums> run = {};
      for (; i + lanes<V> <= end; i += lanes<V>) {
        __builtin_prefetch(x + n + i), __builtin_prefetch(g + n + i);
        store(out + i, wide.backward(load<V>(x + i), load<V>(g + i), run.s));
      }
      block += run;
    }
    sums += block;
  }
  for (; i < n; ++i) out[i] = narrow<T>(tail.backward(Acc<T>(widen(x[i])), Acc<T>(widen(g[i])), rest.s));
}

// The formula of a column, of vectors and of the numbers left over.
template <class Op, class T>
struct Formula {
  using A = Acc<T>;
  using V = Vec<A>;
  typename Op::template At<V, Divisor<V>> wide;
  typename Op::template At<A, Divisor<A>> tail;

  R2_HD Formula(const Quantizer& q, int64_t column) : wide(q, column), tail(q, column) {}
  R2_HD void forward(const Arrays<T>& at, int64_t j, int64_t n) const {
    map_run<false>(at.x + j, at.out + j, n, [&](V x) { return wide.forward(x); }, [&](A x) { return tail.forward(x); });
  }
};

// The same with sums of what it has seen.
template <class Op, class T>
struct Gradient : Formula<Op, T> {
  static constexpr int kSums = Op::kSums;
  Sums<Vec<Acc<T>>, kSums> sums = {};
  Sums<Acc<T>, kSums> rest = {};

  using Formula<Op, T>::Formula;
  R2_HD void backward(const Arrays<T>& at, int64_t j, int64_t n) {
    map_and_sum<kSums>(at.x + j, at.g + j, at.out + j, n, this->wide, this->tail, sums, rest);
  }
  R2_HD void total(double* to) const {
    for (int s = 0; s < kSums; ++s) to[s] = sum(sums.s[s]) + double(rest.s[s]);
  }
};

// The step of each number of a period, for columns abreast.
template <class Op, class A>
std::vector<A> steps_of(const Tensor& tensor, const Quantizer& q) {
  std::vector<A> steps(tensor.columns * tensor.run);
  for (size_t i = 0; i < steps.size(); ++i) steps[i] = Op::template divisor<A>(q, tensor.first_column + i / tensor.run);
  return steps;
}

template <class Op, class T>
void forward_abreast(const Tensor& tensor, const Quantizer& q, const Unit& unit, const Arrays<T>& at) {
  using A = Acc<T>;
  using V = Vec<A>;
  const std::vector<A> steps = steps_of<Op, A>(tensor, q);
  const int64_t period = steps.size();
  for (int64_t o = unit.begin; o < unit.end; ++o) {
    const T* x = at.x + o * period;
    T* y = at.out + o * period;
    int64_t i = 0;
    for (; i + lanes<V> <= period; i += lanes<V>)
      store(y + i, typename Op::template At<V, Divisor<V>>(q, load<V>(steps.data() + i)).forward(load<V>(x + i)));
    for (; i < period; ++i)
      y[i] = narrow<T>(typename Op::template At<A, Divisor<A>>(q, steps[i]).forward(A(widen(x[i]))));
  }
}

template <class Op, class T>
void backward_abreast(const Tensor& tensor, const Quantizer& q, const Unit& unit, const Arrays<T>& at) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t kRepetitions = 64;  // of a period in a run
  const std::vector<A> steps = steps_of<Op, A>(tensor, q);
  const int64_t period = steps.size();
  std::vector<A> run(period);
  std::vector<double> sums(period);
  for (int64_t begin = unit.begin; begin < unit.end; begin += kRepetitions) {
    const int64_t end = begin + kRepetitions < unit.end ? begin + kRepetitions : unit.end;
    std::fill(run.begin(), run.end(), A(0));
    for (int64_t o = begin; o < end; ++o) {
      const T *x = at.x + o * period, *g = at.g + o * period;
      T* out = at.out + o * period;
      int64_t i = 0;
      for (; i + lanes<V> <= period; i += lanes<V>) {
        V s = load<V>(run.data() + i);
        store(out + i, typename Op::template At<V, Divisor<V>>(q, load<V>(steps.data() + i))
                           .backward(load<V>(x + i), load<V>(g + i), &s));
        store(run.data() + i, s);
      }
      for (; i < period; ++i)
        out[i] = narrow<T>(
            typename Op::template At<A, Divisor<A>>(q, steps[i]).backward(A(widen(x[i])), A(widen(g[i])), &run[i]));
    }
    for (int64_t i = 0; i < period; ++i) sums[i] += double(run[i]);
  }
  for (int64_t c = 0; c < tensor.columns; ++c) {
    unit.sums[c] = 0;
    for (int64_t i = 0; i < tensor.run; ++i) unit.sums[c] += sums[c * tensor.run + i];
  }
}

template <class T>
void ask_for_huge_targets(const List& list, const Quantizer& q) {
  for (int64_t t = 0; t < list.count; ++t)
    ask_for_huge_pages(reinterpret_cast<void*>(static_cast<const int64_t*>(q.target)[t]),
                       tensor_of(list, t).numel * sizeof(T));
}

template <class Op, class T>
void quantize_list(const List& list, const Quantizer& q, int threads) {
  threads = threads_for(list, threads);
  ask_for_huge_targets<T>(list, q);
  const Units<0> units(list);
  const int64_t count = units.all.size();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < count; ++u) {
    const Unit& unit = units.all[u];
    const Tensor& tensor = tensor_of(list, unit.tensor);
    const Arrays<T> at(list, q, unit.tensor);
    if constexpr (kHasChannels<Op>) {
      if (unit.way == Way::abreast) {
        forward_abreast<Op>(tensor, q, unit, at);
        continue;
      }
      if (unit.way == Way::columns) {
        for (int64_t c = unit.begin; c < unit.end; ++c)
          Formula<Op, T>(q, tensor.first_column + c).forward(at, c * tensor.rows, tensor.rows);
        continue;
      }
    }
    const ChannelChunk part = channel_chunk_at(list, unit.chunk);
    const Formula<Op, T> formula(q, tensor.first_column + part.column);
    each_stretch(tensor, part, [&](int64_t j, int64_t length) { formula.forward(at, j, length); });
  }
}

template <class Op, class T>
void correct_maxima(const List& list, const Quantizer& q, const Units<Op::kSums>& units, int threads) {
  using A = Acc<T>;
  const int64_t count = units.all.size();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < count; ++u) {
    const Unit& unit = units.all[u];
    if (unit.sums[1] == 0) continue;
    const Arrays<T> at(list, q, unit.tensor);
    const ChannelChunk part = channel_chunk_at(list, unit.chunk);
    typename Op::template At<A, Divisor<A>> formula(q, unit.tensor);
    formula.share_out(q, unit.tensor);
    for (int64_t j = part.row; j < part.row + part.n; ++j)
      if (A x = widen(at.x[j]); abs_(x) == formula.top) at.out[j] = narrow<T>(formula.corrected(x, A(widen(at.g[j]))));
  }
}

template <class Op, class T>
void gradient_list(const List& list, const Quantizer& q, int threads) {
  using A = Acc<T>;
  constexpr int kSums = Op::kSums;
  threads = threads_for(list, threads);
  ask_for_huge_targets<T>(list, q);
  const Units<kSums> units(list);
  const int64_t count = units.all.size();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < count; ++u) {
    const Unit& unit = units.all[u];
    const Tensor& tensor = tensor_of(list, unit.tensor);
    const Arrays<T> at(list, q, unit.tensor);
    if constexpr (kHasChannels<Op>) {
      if (unit.way == Way::abreast) {
        backward_abreast<Op>(tensor, q, unit, at);
        continue;
      }
      if (unit.way == Way::columns) {
        for (int64_t c = unit.begin; c < unit.end; ++c) {
          Gradient<Op, T> column(q, tensor.first_column + c);
          column.backward(at, c * tensor.rows, tensor.rows);
          double sums[kSums];
          column.total(sums);
          Op::template finish<A>(q, tensor.first_column + c, sums, double(tensor.rows));
        }
        continue;
      }
    }
    const ChannelChunk part = channel_chunk_at(list, unit.chunk);
    Gradient<Op, T> column(q, tensor.first_column + part.column);
    each_stretch(tensor, part, [&](int64_t j, int64_t length) { column.backward(at, j, length); });
    column.total(unit.sums);
  }
  for (int64_t t = 0; t < list.count; ++t) {
    const Tensor& tensor = tensor_of(list, t);
    if (units.all[units.first[t]].way == Way::columns) continue;  // each was finished by its unit
    for (int64_t c = 0; c < tensor.columns; ++c) {
      double sums[kSums];
      units.total(tensor, t, c, sums);
      Op::template finish<A>(q, tensor.first_column + c, sums, double(tensor.rows));
    }
  }
  if constexpr (std::is_same<Op, Dorefa>::value)
    if (!q.flag) correct_maxima<Op, T>(list, q, units, threads);
}

template <class Op>
void quantize(const List& list, const Quantizer& q, int threads) {
  with_type(list.dtype, [&](auto like) { quantize_list<Op, decltype(like)>(list, q, threads); });
}
template <class Op>
void quantize_gradient(const List& list, const Quantizer& q, int threads) {
  with_type(list.dtype, [&](auto like) { gradient_list<Op, decltype(like)>(list, q, threads); });
}

void lsq_forward(const List& list, const Quantizer& q, int threads) {
  with_lsq(q, [&](auto op) { quantize<decltype(op)>(list, q, threads); });
}
void lsq_backward(const List& list, const Quantizer& q, int threads) {
  with_lsq(q, [&](auto op) { quantize_gradient<decltype(op)>(list, q, threads); });
}
void pact_backward(const List& list, const Quantizer& q, int threads) {
  q.flag ? quantize_gradient<Pact<true>>(list, q, threads) : quantize_gradient<Pact<false>>(list, q, threads);
}
void dorefa_forward(const List& list, const Quantizer& q, int threads) {
  q.bits == 1 ? quantize<DorefaSign>(list, q, threads) : quantize<Dorefa>(list, q, threads);
}
void dorefa_backward(const List& list, const Quantizer& q, int threads) {
  q.bits == 1 ? quantize<Copy>(list, q, threads) : quantize_gradient<Dorefa>(list, q, threads);
}

}  // namespace R2_ISA

namespace cpu::R2_ISA {
const Quantizers quantizers = {
    .lsq_fwd = lsq_forward,
    .lsq_bwd = lsq_backward,
    .ewgs_fwd = quantize<Ewgs>,
    .ewgs_bwd = quantize_gradient<Ewgs>,
    .pact_fwd = quantize<Pact<false>>,
    .pact_bwd = pact_backward,
    .dorefa_fwd = dorefa_forward,
    .dorefa_bwd = dorefa_backward,
};
}  // namespace cpu::R2_ISA
}  // namespace r2
