// Reduce a list to per-column results; map a list elementwise. A reader makes the state of one chunk; chunks are cut
// and merged in a fixed order, so the result is the same bits for any number of threads.
#pragma once
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

#include "../losses.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kMostChunk = 16384;           // rows: bounds the scratch of one column of several
constexpr int64_t kHuge = 2 << 20;          // bytes of a huge page
constexpr int64_t kAskForHuge = 4 * kHuge;  // from here on fresh pages cost more than asking for huge ones

// Calls visit(memory index, row within the chunk, length) for each run of consecutive memory of the chunk.
template <class Visit>
inline void each_run(const Tensor& tensor, int d, const Chunk& c, Visit visit) {
  int64_t k = c.row, end = c.row + c.n;
  while (k < end) {
    int64_t within = k % tensor.run, length = tensor.run - within < end - k ? tensor.run - within : end - k;
    visit(k / tensor.run * d * tensor.run + c.column * tensor.run + within, k - c.row, length);
    k += length;
  }
}

// Vectors in a run, and runs in a block: sums of sums of sums, whose rounding errors grow with the longest of the three
// chains, not with their product.
constexpr int kRun = 12;

// Feeds all numbers to the vector lanes, and the last few to the scalar one.
template <class Wide, class Tail, class T, class Add>
R2_HD void sweep(const T* w, int64_t n, Wide& wide, Tail& tail, Add add) {
  using V = Vec<Acc<T>>;
  int64_t i = 0;
  while (i + lanes<V> <= n) {
    Wide block = {};
    for (int runs = 0; runs < kRun && i + lanes<V> <= n; ++runs) {
      const int64_t end = i + kRun * lanes<V> < n ? i + kRun * lanes<V> : n;
      Wide run = {};
      for (; i + lanes<V> <= end; i += lanes<V>) {
        // what the next chunk reads comes in while this one is computed from cache: soft_min_max of 47 MB in 2.0 ms,
        // not 3.2
        __builtin_prefetch(w + n + i);
        add(run, load<V>(w + i));
      }
      block += run;
    }
    wide += block;
  }
  for (; i < n; ++i) add(tail, Acc<T>(widen(w[i])));
}

template <class T>
struct Extremes {
  Acc<T> low, high;
};

// Two pairs of registers hide the latency of min and max.
template <class T>
R2_HD Extremes<T> extremes(const T* w, int64_t n) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int step = lanes<V>;
  V low0 = splat<V>(A(INFINITY)), low1 = low0, high0 = -low0, high1 = high0;
  int64_t i = 0;
  for (; i + 2 * step <= n; i += 2 * step) {
    V a = load<V>(w + i), b = load<V>(w + i + step);
    low0 = a < low0 ? a : low0, high0 = a > high0 ? a : high0;
    low1 = b < low1 ? b : low1, high1 = b > high1 ? b : high1;
  }
  auto less = [](auto a, auto b) { return a < b ? a : b; };
  auto more = [](auto a, auto b) { return a > b ? a : b; };
  Extremes<T> e = {fold<A>(less(low0, low1), less), fold<A>(more(high0, high1), more)};
  for (; i < n; ++i) e = {less(A(widen(w[i])), e.low), more(A(widen(w[i])), e.high)};
  return e;
}

// As many threads as have this much to do; waking one costs more than a smaller share saves.
inline int threads_for(const List& list, int threads) {
  int64_t useful = list.chunks * list.chunk / 16384;
  return useful < 1 ? 1 : useful < threads ? int(useful) : threads;
}

// The states of the chunks of a tensor to its result.
template <class Op, class A>
void merge_tensor(const List& list, const Forward& f, int64_t t) {
  const A* partial = static_cast<const A*>(f.partial);
  int64_t first = tensor_of(list, t).first_chunk, rows = tensor_of(list, t).rows,
          parts = (rows + list.chunk - 1) / list.chunk;
  double total = 0;
  for (int c = 0; c < list.d; ++c) {
    Column column = column_at<A>(list, f.first, f.second, t, c, f.bits);
    double state[kState];
    for (int s = 0; s < kState; ++s) state[s] = double(partial[(first + c) * kState + s]);
    for (int64_t part = 1; part < parts; ++part)
      Op::merge(state, partial + (first + part * list.d + c) * kState, column, sizeof(A) == 4);
    total += Op::finish(state, column, list, t * list.d + c, static_cast<A*>(f.saved), static_cast<A*>(f.out));
  }
  if (Op::kLoss) static_cast<A*>(f.out)[t] = A(total);
}

template <class T, class Reader, class Op>
void reduce(const List& list, const Forward& f, int threads) {
  using A = Acc<T>;
  A* partial = static_cast<A*>(f.partial);
  threads = threads_for(list, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < list.chunks; ++i) {
    Chunk c = chunk_at(list, i);
    const Tensor& tensor = tensor_of(list, c.tensor);
    const T* w = reinterpret_cast<const T*>(list.pointers[c.tensor]);
    Column column = column_at<A>(list, f.first, f.second, c.tensor, c.column);
    if (list.d == 1) {
      Reader::read(w + c.row, c.n, column, f.flag, partial + i * kState);
    } else {
      T scratch[kMostChunk];
      each_run(tensor, list.d, c, [&](int64_t at, int64_t row, int64_t length) {
        std::memcpy(scratch + row, w + at, length * sizeof(T));
      });
      Reader::read(scratch, c.n, column, f.flag, partial + i * kState);
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && list.count > 256)
  for (int64_t t = 0; t < list.count; ++t) merge_tensor<Op, A>(list, f, t);
}

template <bool kAdd, class T, class Wide, class Tail>
inline void map_run(const T* w, T* out, int64_t n, const Wide& wide, const Tail& tail) {
  using V = Vec<Acc<T>>;
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) {
    V g = wide(load<V>(w + i));
    store(out + i, kAdd ? load<V>(out + i) + g : g);
  }
  for (; i < n; ++i) {
    Acc<T> g = tail(widen(w[i]));
    out[i] = narrow<T>(kAdd ? widen(out[i]) + g : g);
  }
}

inline void ask_for_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kAskForHuge) return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge,
            end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T, class Op, bool kAdd>
void map(const List& list, const Backward& b, int threads) {
  using A = Acc<T>;
  const int64_t* targets = static_cast<const int64_t*>(b.target);
  threads = threads_for(list, threads);
  if (!kAdd)
    for (int64_t t = 0; t < list.count; ++t)
      if (targets[t]) ask_for_huge_pages(reinterpret_cast<void*>(targets[t]), tensor_of(list, t).numel * sizeof(T));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < list.chunks; ++i) {
    Chunk c = chunk_at(list, i);
    const Tensor& tensor = tensor_of(list, c.tensor);
    const T* w = reinterpret_cast<const T*>(list.pointers[c.tensor]);
    T* out = reinterpret_cast<T*>(targets[c.tensor]);
    Column column = column_at<A>(list, b.first, b.second, c.tensor, c.column);
    int64_t at = c.tensor * list.d + c.column;
    const A* saved = static_cast<const A*>(b.saved) + at * Op::kSaved;
    if (c.row == 0 && b.parameter_gradient)
      static_cast<A*>(b.parameter_gradient)[at] = A(Op::parameter_gradient(list, b, c.tensor, at, column, saved));
    if (!out) continue;
    auto wide = Op::template gradient<Vec<A>>(list, b, c.tensor, at, column, saved);
    auto tail = Op::template gradient<A>(list, b, c.tensor, at, column, saved);
    if (list.d == 1) {
      map_run<kAdd>(w + c.row, out + c.row, c.n, wide, tail);
    } else {
      each_run(tensor, list.d, c,
               [&](int64_t j, int64_t, int64_t length) { map_run<kAdd>(w + j, out + j, length, wide, tail); });
    }
    if (c.row == 0 && c.column == 0 && !kAdd)
      for (int64_t j = tensor.rows * list.d; j < tensor.numel; ++j) out[j] = narrow<T>(A(0));
  }
}

template <class Reader, class Op>
void loss_forward(const List& list, const Forward& f, int threads) {
  with_type(list.dtype, [&](auto like) { reduce<decltype(like), Reader, Op>(list, f, threads); });
}

template <class Op>
void loss_backward(const List& list, const Backward& b, int threads) {
  with_type(list.dtype, [&](auto like) {
    using T = decltype(like);
    b.add ? map<T, Op, true>(list, b, threads) : map<T, Op, false>(list, b, threads);
  });
}

}  // namespace R2_ISA
}  // namespace r2
