// Several regularizers from one read of the weights on the CPU: a chunk in cache is read by all. Compiled once for each
// instruction set.
#include "range_losses.h"
#include "regularizers.h"
#include "regularizers_terms.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kBlock = 2048;  // weights whose gradients are summed before they are rounded

template <class A>
int64_t state_size(Term term, const Forward& f) {
  return term == Term::bin_reg ? BinReg::state_size(f.bits) : kState;
}

template <class T>
void read_chunk(Term term, const Forward& f, const T* w, int64_t n, Column c, Acc<T>* state) {
  switch (term) {
    case Term::l_inf: return LInfReader::read(w, n, c, f.flag, state);
    case Term::margin: return MarginReader::read(w, n, c, f.flag, state);
    case Term::soft_min_max: return SoftReader::read(w, n, c, f.flag, state);
    case Term::kure: return MomentsReader::read(w, n, c, f.flag, state);
    case Term::bin_reg: return BinRegReader::read(w, n, c, f.flag, state);
    case Term::msqe: return MsqeReader::read(w, n, c, f.flag, state);
    case Term::partial_l2: return PartialL2Reader::read(w, n, c, f.flag, state);
  }
}

template <class A>
void merge_bins(const List& list, const Forward& f, int64_t t) {
  const int bins = 1 << f.bits;
  const int64_t first = tensor_of(list, t).first_chunk, parts = (tensor_of(list, t).rows + list.chunk - 1) / list.chunk,
                stride = BinReg::state_size(f.bits);
  A* saved = static_cast<A*>(f.saved) + (t << f.bits) * 2;
  double count[256] = {}, error[256] = {}, total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const A* partial = static_cast<const A*>(f.partial) + (first + part) * stride;
    const double unit = partial[2 * bins];
    for (int b = 0; b < bins; ++b) count[b] += double(partial[b]), error[b] += partial[bins + b] * unit * unit;
  }
  for (int b = 0; b < bins; ++b) {
    const double mean = BinReg::mean(error[b], count[b]);
    saved[b] = A(count[b]), saved[bins + b] = A(mean), total += mean;
  }
  static_cast<A*>(f.out)[t] = A(total);
}

template <class A>
void merge_term(Term term, const List& list, const Forward& f, int64_t t) {
  switch (term) {
    case Term::l_inf: return merge_tensor<LInfOp, A>(list, f, t);
    case Term::margin: return merge_tensor<MarginOp, A>(list, f, t);
    case Term::soft_min_max: return merge_tensor<SoftOp<false>, A>(list, f, t);
    case Term::kure: return merge_tensor<KureOp, A>(list, f, t);
    case Term::bin_reg: return merge_bins<A>(list, f, t);
    case Term::msqe: return merge_tensor<MsqeOp, A>(list, f, t);
    case Term::partial_l2: return merge_tensor<PartialL2Op, A>(list, f, t);
  }
}

template <class T>
void reduce_terms(const List& list, const Terms<Forward>& terms, int threads) {
  using A = Acc<T>;
  threads = threads_for(list, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < list.chunks; ++i) {
      Chunk c = chunk_at(list, i);
      const T* w = reinterpret_cast<const T*>(list.pointers[c.tensor]) + c.row;
      for (int k = 0; k < terms.count; ++k) {
        const Forward& f = terms.of[k];
        Column column = column_at<A>(list, f.first, f.second, c.tensor, 0, f.bits);
        read_chunk(terms.term[k], f, w, c.n, column, static_cast<A*>(f.partial) + i * state_size<A>(terms.term[k], f));
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < list.count * terms.count; ++i)
      merge_term<A>(terms.term[i % terms.count], list, terms.of[i % terms.count], i / terms.count);
  }
}

// `map` is called with the gradient of a term for vectors and for single numbers.
template <class Op, class A, class Map>
void with_op(const List& list, const Backward& b, int64_t t, bool first, Map map) {
  const Column column = column_at<A>(list, b.first, b.second, t, 0, b.bits);
  const A* saved = static_cast<const A*>(b.saved) + t * Op::kSaved;
  map(Op::template gradient<Vec<A>>(list, b, t, t, column, saved),
      Op::template gradient<A>(list, b, t, t, column, saved));
  if (first && b.parameter_gradient)
    static_cast<A*>(b.parameter_gradient)[t] = A(Op::parameter_gradient(list, b, t, t, column, saved));
}

template <class A, class Map>
void with_gradient(Term term, const List& list, const Backward& b, int64_t t, bool first, Map map) {
  switch (term) {
    case Term::l_inf: return with_op<LInfOp, A>(list, b, t, first, map);
    case Term::margin: return with_op<MarginOp, A>(list, b, t, first, map);
    case Term::soft_min_max: return with_op<SoftOp<false>, A>(list, b, t, first, map);
    case Term::kure: return with_op<KureOp, A>(list, b, t, first, map);
    case Term::bin_reg: {
      const Column column = column_at<A>(list, b.first, b.second, t, 0, b.bits);
      const A* counts = static_cast<const A*>(b.saved) + (t << b.bits) * 2;
      const double grad = LossOp<BinReg>::upstream<A>(b, t);
      return map(BinRegGradient<Vec<A>>(grad, column, counts), BinRegGradient<A>(grad, column, counts));
    }
    case Term::msqe: return with_op<MsqeOp, A>(list, b, t, first, map);
    case Term::partial_l2: return with_op<PartialL2Op, A>(list, b, t, first, map);
  }
}

template <class T, bool kAdd>
void map_one(const List& list, const Terms<Backward>& terms, const Chunk& c, const T* w, T* out) {
  with_gradient<Acc<T>>(terms.term[0], list, terms.of[0], c.tensor, c.row == 0,
                        [&](const auto& wide, const auto& tail) { map_run<kAdd>(w, out, c.n, wide, tail); });
}

enum class Place { first, between, last };

// The gradient of one of several terms: the first is added to what `out` holds, if at all, the last rounded into it.
template <Place place, bool kAdd, class T, class Wide, class Tail, class A = Acc<T>>
void sum_run(const T* w, A* total, T* out, int64_t n, Wide wide, Tail tail) {
  using V = Vec<A>;
  auto sum = [&](int64_t i, auto g) {
    using G = decltype(g);
    if (place != Place::first) g = load<G>(total + i) + g;
    if (place == Place::first && kAdd) g = load<G>(out + i) + g;
    place == Place::last ? store(out + i, g) : store(total + i, g);
  };
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) sum(i, wide(load<V>(w + i)));
  for (; i < n; ++i) sum(i, tail(A(widen(w[i]))));
}

template <class T, bool kAdd>
void map_all(const List& list, const Terms<Backward>& terms, const Chunk& c, const T* w, T* out) {
  alignas(64) Acc<T> total[kBlock];
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    const int64_t n = c.n - begin < kBlock ? c.n - begin : kBlock;
    for (int k = 0; k < terms.count; ++k)
      with_gradient<Acc<T>>(terms.term[k], list, terms.of[k], c.tensor, c.row + begin == 0,
                            [&](const auto& wide, const auto& tail) {
                              using Wide = std::decay_t<decltype(wide)>;
                              using Tail = std::decay_t<decltype(tail)>;
                              auto run = k == 0                ? sum_run<Place::first, kAdd, T, Wide, Tail>
                                         : k + 1 < terms.count ? sum_run<Place::between, kAdd, T, Wide, Tail>
                                                               : sum_run<Place::last, kAdd, T, Wide, Tail>;
                              run(w + begin, total, out + begin, n, wide, tail);
                            });
  }
}

template <class T>
void map_terms(const List& list, const Terms<Backward>& terms, int threads) {
  const int64_t* targets = static_cast<const int64_t*>(terms.of[0].target);
  const bool add = terms.of[0].add;
  threads = threads_for(list, threads);
  if (!add)
    for (int64_t t = 0; t < list.count; ++t)
      if (targets[t]) ask_for_huge_pages(reinterpret_cast<void*>(targets[t]), tensor_of(list, t).numel * sizeof(T));
  auto map = terms.count == 1 ? (add ? map_one<T, true> : map_one<T, false>)
             : add            ? map_all<T, true>
                              : map_all<T, false>;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < list.chunks; ++i) {
    Chunk c = chunk_at(list, i);
    if (!targets[c.tensor]) {
      for (int k = 0; c.row == 0 && k < terms.count; ++k)
        with_gradient<Acc<T>>(terms.term[k], list, terms.of[k], c.tensor, true, [](const auto&, const auto&) {});
      continue;
    }
    map(list, terms, c, reinterpret_cast<const T*>(list.pointers[c.tensor]) + c.row,
        reinterpret_cast<T*>(targets[c.tensor]) + c.row);
  }
}

void terms_forward(const List& list, const Terms<Forward>& terms, int threads) {
  with_type(list.dtype, [&](auto like) { reduce_terms<decltype(like)>(list, terms, threads); });
}

void terms_backward(const List& list, const Terms<Backward>& terms, int threads) {
  with_type(list.dtype, [&](auto like) { map_terms<decltype(like)>(list, terms, threads); });
}

}  // namespace R2_ISA
}  // namespace r2
