// Reduce a list to one state per chunk, merge the states of each tensor, map a list elementwise. One block per chunk;
// every order is fixed, so results are the same bits on every run.
#pragma once
#include "numbers.cuh"

#include "../losses.h"

namespace r2::cuda {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kMergers = 256;
// to a multiprocessor, at least: 128 (80) registers for each thread
template <class T>
constexpr int kBlocks = sizeof(Acc<T>) == 8 ? 4 : 6;
constexpr int kInFlight = 4;  // 128-bit loads of a thread

// The first rows of a chunk, read ahead to find what its sums are taken relative to: all rows of a small chunk, a
// sixteenth of a large one.
constexpr int kSample = 4096;

// The address of tensor t, by a table as the contract has it.
__device__ __forceinline__ int64_t place(const List& list, const void* table, int64_t t) {
  return list.count == 1 ? reinterpret_cast<int64_t>(table) : static_cast<const int64_t*>(table)[t];
}
template <class T>
__device__ __forceinline__ T* place(const List& list, const void* table, int64_t t) {
  return reinterpret_cast<T*>(place(list, table, t));
}

// The rows of one chunk of one column.
template <class T>
struct Rows {
  const T* memory;
  int64_t row, run;
  int n, d, column;

  __device__ Rows(const List& list, const Chunk& c)
      : memory(place<const T>(list, list.pointers, c.tensor)), row(c.row), run(tensor_of(list, c.tensor).run),
        n(int(c.n)), d(list.d), column(c.column) {}

  __device__ int64_t at(int64_t i) const { return (row + i) / run * d * run + column * run + (row + i) % run; }

  __device__ Rows first(int most) const {
    Rows some = *this;
    some.n = n < most ? n : most;
    return some;
  }
};

// Where the rows threadIdx.x, threadIdx.x + kThreads, ... of a chunk lie, without a division for each.
struct Stride {
  int64_t at, within, run, step, step_within, wrap;

  template <class T>
  __device__ explicit Stride(const Rows<T>& rows)
      : at(rows.at(threadIdx.x)), within((rows.row + threadIdx.x) % rows.run), run(rows.run),
        step(kThreads / run * rows.d * run + kThreads % run), step_within(kThreads % run), wrap((rows.d - 1) * run) {}

  __device__ int64_t next() {
    int64_t now = at;
    at += step, within += step_within;
    if (within >= run) within -= run, at += wrap;
    return now;
  }
};

// Gives every row to one thread: lane.take(numbers[n]) with as many at once as there are. Full tiles come first.
template <class T, class Lane>
__device__ void sweep_strided(const Rows<T>& rows, Lane& lane) {
  constexpr int batch = kPack<T>;
  Stride stride(rows);
  int i = threadIdx.x;
  for (; i + (batch - 1) * kThreads < rows.n; i += batch * kThreads) {
    Acc<T> w[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) w[j] = widen(rows.memory[stride.next()]);
    lane.take(w);
  }
  for (; i < rows.n; i += kThreads) {
    Acc<T> w[1] = {widen(rows.memory[stride.next()])};
    lane.take(w);
  }
}

template <int packs, class T>
__device__ __forceinline__ void widen_packs(const uint4 (&bits)[packs], Acc<T> (&w)[packs * kPack<T>]) {
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    Pack<T> pack(bits[u]);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) w[u * kPack<T> + j] = widen(pack.number[j]);
  }
}

template <class T, class Lane>
__device__ void sweep(const Rows<T>& rows, Lane& lane) {
  constexpr int pack = kPack<T>;
  if (rows.d != 1) return sweep_strided(rows, lane);
  const T* w = rows.memory + rows.row;
  const int head = min(before_boundary(w), rows.n), packs = (rows.n - head) / pack, edges = rows.n - packs * pack;
  const uint4* p = reinterpret_cast<const uint4*>(w + head);
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kThreads < packs; i += kInFlight * kThreads) {
    uint4 bits[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) bits[u] = __ldg(p + i + u * kThreads);
    Acc<T> x[kInFlight * pack];
    widen_packs<kInFlight, T>(bits, x);
    lane.take(x);
  }
#pragma unroll 1
  for (; i < packs; i += kThreads) {
    uint4 bits[1] = {__ldg(p + i)};
    Acc<T> x[pack];
    widen_packs<1, T>(bits, x);
    lane.take(x);
  }
  if (int(threadIdx.x) < edges) {
    int j = threadIdx.x;
    Acc<T> x[1] = {widen(w[j < head ? j : j + packs * pack])};
    lane.take(x);
  }
}

struct Sum {
  template <class A>
  static __device__ A of(A a, A b) {
    return a + b;
  }
};
struct Max {
  template <class A>
  static __device__ A of(A a, A b) {
    return max_nan(a, b);
  }
};

// Reduces each number over the block; every thread gets the results. A warp takes a number of all threads.
template <class Combine, int n, class A>
__device__ void block_reduce(A (&x)[n]) {
  __shared__ A all[n][kThreads], result[n];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int v = 0; v < n; ++v) all[v][threadIdx.x] = x[v];
  __syncthreads();
#pragma unroll
  for (int v = warp; v < n; v += kWarps) {
    A a = all[v][lane];
    for (int w = 1; w < kWarps; ++w) a = Combine::of(a, all[v][lane + w * 32]);
    for (int distance = 16; distance > 0; distance /= 2) a = Combine::of(a, __shfl_xor_sync(~0u, a, distance));
    if (lane == 0) result[v] = a;
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < n; ++v) x[v] = result[v];
}

template <class Reader, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) partial_kernel(List list, Forward f) {
  using A = Acc<T>;
  Chunk c = chunk_at(list, blockIdx.x);
  Column column = column_at<A>(list, f.first, f.second, c.tensor, c.column, f.bits);
  Reader::template chunk<T>(Rows<T>(list, c), column, static_cast<A*>(f.partial) + int64_t(blockIdx.x) * kState);
}

using Merging = double[kMergers][kState];

// The states of one column, by threads that each take every kMergers-th and then by pairs; thread 0 has the result.
template <class Op, class A>
__device__ void merge_column(const List& list, const A* partial, int64_t parts, Column column, double* state,
                             Merging& other) {
  constexpr bool single = sizeof(A) == 4;
  const int me = threadIdx.x, active = int(min(parts, int64_t(kMergers)));
  if (me < active)
    for (int s = 0; s < kState; ++s) state[s] = double(partial[me * list.d * kState + s]);
  for (int64_t part = me + kMergers; part < parts; part += kMergers)
    Op::merge(state, partial + part * list.d * kState, column, single);
  for (int width = kMergers / 2; width > 0; width /= 2) {
    if (width >= active) continue;
    if (width <= me && me < 2 * width)
      for (int s = 0; s < kState; ++s) other[me][s] = state[s];
    __syncthreads();
    if (me < width && me + width < active) Op::merge(state, other[me + width], column, single);
    __syncthreads();
  }
}

template <class Op, class A>
__device__ void merge_tensor(const List& list, const Forward& f, int64_t t, Merging& other) {
  const int64_t first = tensor_of(list, t).first_chunk, parts = (tensor_of(list, t).rows + list.chunk - 1) / list.chunk;
  double total = 0;
  for (int c = 0; c < list.d; ++c) {
    Column column = column_at<A>(list, f.first, f.second, t, c, f.bits);
    double state[kState];
    merge_column<Op>(list, static_cast<const A*>(f.partial) + (first + c) * kState, parts, column, state, other);
    if (threadIdx.x == 0)
      total += Op::finish(state, column, list, t * list.d + c, static_cast<A*>(f.saved), static_cast<A*>(f.out));
  }
  if (Op::kLoss && threadIdx.x == 0) static_cast<A*>(f.out)[t] = A(total);
}

template <class Op, class A>
__global__ void __launch_bounds__(kMergers, 1) merge_kernel(List list, Forward f) {
  __shared__ Merging other;
  merge_tensor<Op, A>(list, f, blockIdx.x, other);
}

template <bool kAdd, class T, class G>
__device__ __forceinline__ void map_one(const T& w, T& out, const G& gradient) {
  Acc<T> g = gradient(widen(w));
  narrow(kAdd ? widen(out) + g : g, out);
}

template <bool kAdd, int packs, class T, class G>
__device__ __forceinline__ void map_packs(const uint4* w, uint4* out, const G& gradient) {
  uint4 bits[packs], old[packs];
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    bits[u] = __ldg(w + u * kThreads);
    if (kAdd) old[u] = __ldcg(out + u * kThreads);
  }
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    Pack<T> from(bits[u]), to(old[u]);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) map_one<kAdd>(from.number[j], to.number[j], gradient);
    __stwb(out + u * kThreads, to.bits);
  }
}

template <bool kAdd, class T, class G>
__device__ void map_rows(const Rows<T>& rows, T* memory, const G& gradient) {
  constexpr int pack = kPack<T>;
  const T* w = rows.memory + rows.row;
  T* out = memory + rows.row;
  if (rows.d != 1 || before_boundary(w) != before_boundary(out)) {
    Stride stride(rows);
    for (int i = threadIdx.x; i < rows.n; i += kThreads) {
      int64_t at = stride.next();
      map_one<kAdd>(rows.memory[at], memory[at], gradient);
    }
    return;
  }
  const int head = min(before_boundary(w), rows.n), packs = (rows.n - head) / pack, edges = rows.n - packs * pack;
  const uint4* from = reinterpret_cast<const uint4*>(w + head);
  uint4* to = reinterpret_cast<uint4*>(out + head);
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kThreads < packs; i += kInFlight * kThreads)
    map_packs<kAdd, kInFlight, T>(from + i, to + i, gradient);
#pragma unroll 1
  for (; i < packs; i += kThreads) map_packs<kAdd, 1, T>(from + i, to + i, gradient);
  if (int(threadIdx.x) < edges) {
    int j = threadIdx.x < head ? threadIdx.x : threadIdx.x + packs * pack;
    map_one<kAdd>(w[j], out[j], gradient);
  }
}

template <class Op, class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) map_kernel(List list, Backward b) {
  using A = Acc<T>;
  using G = decltype(Op::template gradient<A>(list, b, 0, 0, Column{}, static_cast<const A*>(nullptr)));
  Chunk c = chunk_at(list, blockIdx.x);
  const Tensor& tensor = tensor_of(list, c.tensor);
  T* out = place<T>(list, b.target, c.tensor);

  // One thread does what needs float64, slow on most GPUs.
  alignas(G) __shared__ unsigned char shared[sizeof(G)];
  if (threadIdx.x == 0) {
    const int64_t at = c.tensor * list.d + c.column;
    const Column column = column_at<A>(list, b.first, b.second, c.tensor, c.column, b.bits);
    const A* saved = static_cast<const A*>(b.saved) + at * Op::kSaved;
    new (shared) G(Op::template gradient<A>(list, b, c.tensor, at, column, saved));
    if (c.row == 0 && b.parameter_gradient)
      static_cast<A*>(b.parameter_gradient)[at] = A(Op::parameter_gradient(list, b, c.tensor, at, column, saved));
  }
  if (!out) return;
  __syncthreads();
  const G gradient = *reinterpret_cast<const G*>(shared);
  map_rows<kAdd>(Rows<T>(list, c), out, gradient);

  if (kAdd || c.row != 0 || c.column != 0) return;
  for (int64_t j = tensor.rows * list.d + threadIdx.x; j < tensor.numel; j += kThreads) narrow(A(0), out[j]);
}

}  // namespace r2::cuda
