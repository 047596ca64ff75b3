// Reduce a list to one state per chunk, merge the states of each tensor, map a list elementwise. One block per chunk;
// every order is fixed, so results are the same bits on every run.
#pragma once
#include "places.cuh"

#include "../losses.h"

namespace r2::cuda {

constexpr int kMergers = 256;
// to a multiprocessor, at least: 168 (80) registers for each thread
template <class T>
constexpr int kBlocks = sizeof(Acc<T>) == 8 ? 3 : 6;

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

// Whether the tensors of a reader or an op may have several columns.
template <class Op>
constexpr bool kHasColumns = false;

// The rows of one chunk of one column. Where numbers that follow each other belong to different columns, a block takes
// as many `columns` as share 32 bytes, the unit in which memory is moved, and a thread has one of them; the blocks of
// the others have none.
template <class T, bool kColumns = false>
struct Rows {
  static constexpr int kMost = kColumns ? 32 / sizeof(T) : 1;  // columns of a block
  const T* memory;
  int64_t row, run;
  int n, d, column, columns;

  __device__ Rows(const List& list, const Chunk& c)
      : memory(place<const T>(list, list.pointers, c.tensor)), row(c.row), run(tensor_of(list, c.tensor).run),
        n(int(c.n)), d(list.d), column(c.column), columns(1) {
    if (!kColumns || !is_abreast()) return;
    const int groups = (d + kMost - 1) / kMost, each = (d + groups - 1) / groups;
    columns = c.column % each ? 0 : min(each, d - c.column);
    if (columns) column += threadIdx.x % columns;
  }

  __device__ Rows first(int most) const {
    Rows some = *this;
    some.n = n < most ? n : most;
    return some;
  }

  // of row i
  __device__ int64_t at(int64_t i) const {
    return kColumns && d > 1 ? (row + i) / run * d * run + column * run + (row + i) % run : row + i;
  }

  __device__ bool is_abreast() const { return d > 1 && run == 1; }
  __device__ Interleaved abreast() const { return {columns, d, sizeof(T)}; }

  __device__ bool in_runs() const { return Runs<1>::kept(n, (d - 1) * run, sizeof(T)); }
  // whether a run is 128-bit units, in the memory where the first row is at p
  __device__ bool in_packs(const T* p) const { return (row | run | n) % kPack<T> == 0 && before_boundary(p) == 0; }
  template <int unit>
  __device__ Runs<unit> runs() const {
    return {row % run, run, (d - 1) * run, sizeof(T)};
  }
};

template <int packs, class T, int n = kPack<T>>
__device__ __forceinline__ void widen_packs(const typename Pack<T, n>::Bits (&bits)[packs], Acc<T> (&w)[packs * n]) {
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    Pack<T, n> pack(bits[u]);
#pragma unroll
    for (int j = 0; j < n; ++j) w[u * n + j] = widen(pack.number[j]);
  }
}

template <int units, int unit, class T, class Places, class Lane>
__device__ __forceinline__ void take_units(const T* memory, const Places& places, int i, Lane& lane) {
  typename Pack<T, unit>::Bits bits[units];
#pragma unroll
  for (int u = 0; u < units; ++u) bits[u] = Pack<T, unit>::read(places.at(memory, i, u)).bits;
  Acc<T> w[units * unit];
  widen_packs<units, T, unit>(bits, w);
  lane.take(w);
}

// Gives every number to one thread: lane.take(numbers[n]) with as many at once as there are. Full tiles come first.
template <int unit, class T, class Places, class Lane>
__device__ __forceinline__ void sweep_units(const T* memory, int units, const Places& places, Lane& lane) {
  constexpr int loads = kLoads<T, unit>;
  int i = places.first();
#pragma unroll 1
  for (; i + (loads - 1) * places.step() < units; i += loads * places.step())
    take_units<loads, unit>(memory, places, i, lane);
#pragma unroll 1
  for (; i < units; i += places.step()) take_units<1, unit>(memory, places, i, lane);
}

template <bool kPinned, class T, class Lane>
__device__ __forceinline__ void sweep_stretch(const T* w, int n, Lane& lane) {
  constexpr int pack = kPack<T>;
  const int head = min(before_boundary(w), n), packs = (n - head) / pack, edges = n - packs * pack;
  const T* body = w + head;
  if (kPinned) pin(body);
  sweep_units<pack>(body, packs, Dense<pack>(), lane);
  if (int(threadIdx.x) < edges) {
    const int j = threadIdx.x;
    Acc<T> x[1] = {widen(w[j < head ? j : j + packs * pack])};
    lane.take(x);
  }
}

template <class T, bool kColumns, class Lane>
__device__ void sweep(const Rows<T, kColumns>& rows, Lane& lane) {
  constexpr int pack = kPack<T>;
  const T* w = rows.memory + rows.at(0);
  if constexpr (kColumns) {
    if (rows.is_abreast()) return sweep_units<1>(w, rows.n, rows.abreast(), lane);
    if (rows.d > 1 && !rows.in_runs()) {
      for (int i = threadIdx.x; i < rows.n; i += kThreads) {
        Acc<T> x[1] = {widen(rows.memory[rows.at(i)])};
        lane.take(x);
      }
      return;
    }
    if (rows.d > 1)
      return rows.in_packs(w) ? sweep_units<pack>(w, rows.n / pack, rows.template runs<pack>(), lane)
                              : sweep_units<1>(w, rows.n, rows.template runs<1>(), lane);
  }
  sweep_stretch<kColumns>(w, rows.n, lane);  // a kernel of several terms has no registers for that
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

// Reduces each number over the block, or over the threads of each of `columns` columns; every thread gets the results
// of its own. For one column a warp takes a number of all threads.
template <class Combine, int n, class A>
__device__ void block_reduce(A (&x)[n], int columns = 1) {
  __shared__ A all[n][kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int v = 0; v < n; ++v) all[v][threadIdx.x] = x[v];
  __syncthreads();
  if (columns == 1) {
#pragma unroll
    for (int v = warp; v < n; v += kWarps) {
      A a = all[v][lane];
      for (int w = 1; w < kWarps; ++w) a = Combine::of(a, all[v][lane + w * 32]);
      for (int distance = 16; distance > 0; distance /= 2) a = Combine::of(a, __shfl_xor_sync(~0u, a, distance));
      if (lane == 0) all[v][0] = a;
    }
  } else {
    const int row = threadIdx.x / columns, rows = kThreads / columns;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (row < half && row + half < rows)
        for (int v = 0; v < n; ++v)
          all[v][threadIdx.x] = Combine::of(all[v][threadIdx.x], all[v][threadIdx.x + half * columns]);
      __syncthreads();
    }
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < n; ++v) x[v] = all[v][threadIdx.x % columns];
  __syncthreads();
}

template <class Reader, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) partial_kernel(List list, Forward f) {
  using A = Acc<T>;
  const Chunk c = chunk_at(list, blockIdx.x);
  const Rows<T, kHasColumns<Reader>> rows(list, c);
  if (!rows.columns) return;
  const Column column = column_at<A>(list, f.first, f.second, c.tensor, rows.column, f.bits);
  const int64_t at = int64_t(blockIdx.x) + rows.column - c.column;
  Reader::chunk(rows, column, static_cast<A*>(f.partial) + at * kState);
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

template <bool kAdd, int units, int unit, class T, class Places, class G>
__device__ __forceinline__ void map_some(const T* w, T* out, const Places& places, int i, const G& gradient) {
  using Packed = Pack<T, unit>;
  Packed from[units], old[units];
#pragma unroll
  for (int u = 0; u < units; ++u) {
    from[u] = Packed::read(places.at(w, i, u));
    if (kAdd) old[u] = Packed::reread(places.at(out, i, u));
  }
#pragma unroll
  for (int u = 0; u < units; ++u) {
    Packed to;
#pragma unroll
    for (int j = 0; j < unit; ++j) {
      const Acc<T> g = gradient(widen(from[u].number[j]));
      narrow(kAdd ? widen(old[u].number[j]) + g : g, to.number[j]);
    }
    to.write(places.at(out, i, u));
  }
}

template <bool kAdd, int unit, int loads, class T, class Places, class G>
__device__ __forceinline__ void map_units(const T* w, T* out, int units, const Places& places, const G& gradient) {
  int i = places.first();
#pragma unroll 1
  for (; i + (loads - 1) * places.step() < units; i += loads * places.step())
    map_some<kAdd, loads, unit>(w, out, places, i, gradient);
#pragma unroll 1
  for (; i < units; i += places.step()) map_some<kAdd, 1, unit>(w, out, places, i, gradient);
}

template <bool kAdd, class T, class G>
__device__ __forceinline__ void map_stretch(const T* w, T* out, int n, const G& gradient) {
  constexpr int pack = kPack<T>;
  if (before_boundary(w) != before_boundary(out))
    return map_units<kAdd, 1, kLoads<T, 1> / 2>(w, out, n, Dense<1>(), gradient);
  const int head = min(before_boundary(w), n), packs = (n - head) / pack, edges = n - packs * pack;
  const T* from = w + head;
  T* to = out + head;
  pin(from), pin(to);
  map_units<kAdd, pack, kInFlight>(from, to, packs, Dense<pack>(), gradient);
  if (int(threadIdx.x) < edges) {
    const int j = int(threadIdx.x) < head ? threadIdx.x : threadIdx.x + packs * pack;
    map_one<kAdd>(w[j], out[j], gradient);
  }
}

template <bool kAdd, class T, bool kColumns, class G>
__device__ void map_rows(const Rows<T, kColumns>& rows, T* memory, const G& gradient) {
  constexpr int pack = kPack<T>, singles = kLoads<T, 1> / 2;
  const T* w = rows.memory + rows.at(0);
  T* out = memory + rows.at(0);
  if constexpr (kColumns) {
    if (rows.is_abreast()) return map_units<kAdd, 1, singles>(w, out, rows.n, rows.abreast(), gradient);
    if (rows.d > 1 && !rows.in_runs()) {
      for (int i = threadIdx.x; i < rows.n; i += kThreads)
        map_one<kAdd>(rows.memory[rows.at(i)], memory[rows.at(i)], gradient);
      return;
    }
    if (rows.d > 1)
      return rows.in_packs(w) && rows.in_packs(out)
                 ? map_units<kAdd, pack, kInFlight>(w, out, rows.n / pack, rows.template runs<pack>(), gradient)
                 : map_units<kAdd, 1, singles>(w, out, rows.n, rows.template runs<1>(), gradient);
  }
  map_stretch<kAdd>(w, out, rows.n, gradient);
}

template <class Op, class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) map_kernel(List list, Backward b) {
  using A = Acc<T>;
  using G = decltype(Op::template gradient<A>(list, b, 0, 0, Column{}, static_cast<const A*>(nullptr)));
  Chunk c = chunk_at(list, blockIdx.x);
  const Tensor& tensor = tensor_of(list, c.tensor);
  T* out = place<T>(list, b.target, c.tensor);
  const Rows<T, kHasColumns<Op>> rows(list, c);
  if (!rows.columns) return;

  // One thread for each column does what needs float64, slow on most GPUs.
  alignas(G) __shared__ unsigned char shared[rows.kMost][sizeof(G)];
  if (int(threadIdx.x) < rows.columns) {
    const int64_t at = c.tensor * list.d + rows.column;
    const Column column = column_at<A>(list, b.first, b.second, c.tensor, rows.column, b.bits);
    const A* saved = static_cast<const A*>(b.saved) + at * Op::kSaved;
    new (shared[threadIdx.x]) G(Op::template gradient<A>(list, b, c.tensor, at, column, saved));
    if (c.row == 0 && b.parameter_gradient)
      static_cast<A*>(b.parameter_gradient)[at] = A(Op::parameter_gradient(list, b, c.tensor, at, column, saved));
  }
  if (!out) return;
  __syncthreads();
  const G gradient = *reinterpret_cast<const G*>(shared[rows.column - c.column]);
  map_rows<kAdd>(rows, out, gradient);

  if constexpr (!kAdd) {
    if (c.row != 0 || c.column != 0) return;
    for (int64_t j = tensor.rows * list.d + threadIdx.x; j < tensor.numel; j += kThreads) narrow(A(0), out[j]);
  }
}

}  // namespace r2::cuda
