// Map the columns of a list, x -> y; and map x, g -> dx and sum as it goes. One block per chunk of the plan.
#pragma once
#include "skeletons.cuh"

#include "../quantizers.h"

namespace r2::cuda {

constexpr int kBeside = 16;  // blocks that share the columns of a tensor when their sums are merged
constexpr int kSummers = 256;
// to a multiprocessor, at least: 128 registers for each thread, with 64 KB of loads in flight
constexpr int kGradientBlocks = 4;
template <class T>
constexpr int kQuantizeBlocks = sizeof(Acc<T>) == 8 ? 4 : 5;

// Where the rows threadIdx.x, threadIdx.x + kThreads, ... of a chunk lie, without a division for each.
struct ChannelStride {
  int64_t at, within, run, step, step_within, wrap;

  __device__ ChannelStride(const Tensor& tensor, const ChannelChunk& part)
      : run(tensor.columns == 1 ? tensor.numel : tensor.run) {
    const int64_t row = part.row + threadIdx.x;
    within = row % run, at = row / run * tensor.columns * run + part.column * run + within;
    step = kThreads / run * tensor.columns * run + kThreads % run, step_within = kThreads % run,
    wrap = (tensor.columns - 1) * run;
  }

  __device__ int64_t next() {
    int64_t now = at;
    at += step, within += step_within;
    if (within >= run) within -= run, at += wrap;
    return now;
  }
};

// The chunk as consecutive memory, where it is that.
struct Stretch {
  int64_t begin;
  bool is_one;
  __device__ Stretch(const Tensor& tensor, const ChannelChunk& part)
      : begin(part.column * tensor.rows + part.row), is_one(tensor.columns == 1 || tensor.run == tensor.rows) {}
};

struct Edges {
  int head, packs, count;
  template <class T>
  __device__ Edges(const T* p, int n)
      : head(min(before_boundary(p), n)), packs((n - head) / kPack<T>), count(n - packs * kPack<T>) {}
  template <class T>
  __device__ int at(int i) const {
    return i < head ? i : i + packs * kPack<T>;
  }
};

template <int packs, class T, class F>
__device__ __forceinline__ void forward_packs(const uint4* x, uint4* y, const F& formula) {
  uint4 bits[packs];
#pragma unroll
  for (int u = 0; u < packs; ++u) bits[u] = __ldg(x + u * kThreads);
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    Pack<T> from(bits[u]), to;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) narrow(formula.forward(widen(from.number[j])), to.number[j]);
    __stwb(y + u * kThreads, to.bits);
  }
}

// Memory that lies out of step: a number at a time, several of them under way.
template <class T, class F>
__device__ __forceinline__ void forward_singles(const T* x, T* y, int n, const F& formula) {
  constexpr int loads = kLoads<T, 1> / 2;
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (loads - 1) * kThreads < n; i += loads * kThreads) {
    Acc<T> some[loads];
#pragma unroll
    for (int u = 0; u < loads; ++u) some[u] = widen(Pack<T, 1>::read(x + i + u * kThreads).number[0]);
#pragma unroll
    for (int u = 0; u < loads; ++u) write_one(formula.forward(some[u]), y + i + u * kThreads);
  }
#pragma unroll 1
  for (; i < n; i += kThreads) narrow(formula.forward(widen(x[i])), y[i]);
}

template <class T, class F>
__device__ __forceinline__ void forward_wide(const T* x, T* y, int n, const F& formula) {
  if (before_boundary(x) != before_boundary(y)) return forward_singles(x, y, n, formula);
  const Edges edges(x, n);
  const uint4* from = reinterpret_cast<const uint4*>(x + edges.head);
  uint4* to = reinterpret_cast<uint4*>(y + edges.head);
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kThreads < edges.packs; i += kInFlight * kThreads)
    forward_packs<kInFlight, T>(from + i, to + i, formula);
#pragma unroll 1
  for (; i < edges.packs; i += kThreads) forward_packs<1, T>(from + i, to + i, formula);
  if (int(threadIdx.x) < edges.count) {
    const int j = edges.at<T>(threadIdx.x);
    narrow(formula.forward(widen(x[j])), y[j]);
  }
}

template <int n, class A, class F>
__device__ __forceinline__ void backward_batch(const A (&x)[n], const A (&g)[n], A (&dx)[n], A* sums,
                                               const F& formula) {
  A some[kQuantizerSums] = {};
#pragma unroll
  for (int j = 0; j < n; ++j) dx[j] = formula.backward(x[j], g[j], some);
#pragma unroll
  for (int s = 0; s < kQuantizerSums; ++s) sums[s] += some[s];
}

template <int packs, class T, class F>
__device__ __forceinline__ void backward_packs(const uint4* x, const uint4* g, uint4* dx, Acc<T>* sums,
                                               const F& formula) {
  using A = Acc<T>;
  uint4 of_x[packs], of_g[packs];
#pragma unroll
  for (int u = 0; u < packs; ++u) of_x[u] = __ldg(x + u * kThreads), of_g[u] = __ldg(g + u * kThreads);
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    A a[kPack<T>], b[kPack<T>], c[kPack<T>];
    const uint4 one[1] = {of_x[u]}, other[1] = {of_g[u]};
    widen_packs<1, T>(one, a), widen_packs<1, T>(other, b);
    backward_batch(a, b, c, sums, formula);
    write_packs<T>(c, dx + u * kThreads, 0);
  }
}

template <class T, class F>
__device__ __forceinline__ void backward_one(const T& x, const T& g, T& dx, Acc<T>* sums, const F& formula) {
  narrow(formula.backward(widen(x), widen(g), sums), dx);
}

// The numbers at next(), as many as `left` says, in runs: long sums of equal terms would all round the same way.
template <class T, class F, class Next>
__device__ void backward_strided(const T* x, const T* g, T* dx, int left, Next next, Acc<T>* sums, const F& formula) {
  constexpr int kRun = 16;
  while (left > 0) {
    Acc<T> some[kQuantizerSums] = {};
    for (int i = 0; i < kRun && left > 0; ++i, --left) {
      const int64_t at = next();
      backward_one(x[at], g[at], dx[at], some, formula);
    }
#pragma unroll
    for (int s = 0; s < kQuantizerSums; ++s) sums[s] += some[s];
  }
}

template <class T, class F>
__device__ __forceinline__ void backward_singles(const T* x, const T* g, T* dx, int n, Acc<T>* sums, const F& formula) {
  constexpr int loads = kLoads<T, 1> / 2;
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (loads - 1) * kThreads < n; i += loads * kThreads) {
    Acc<T> a[loads], b[loads], c[loads];
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      a[u] = widen(Pack<T, 1>::read(x + i + u * kThreads).number[0]);
      b[u] = widen(Pack<T, 1>::read(g + i + u * kThreads).number[0]);
    }
    backward_batch(a, b, c, sums, formula);
#pragma unroll
    for (int u = 0; u < loads; ++u) write_one(c[u], dx + i + u * kThreads);
  }
#pragma unroll 1
  for (; i < n; i += kThreads) backward_one(x[i], g[i], dx[i], sums, formula);
}

template <class T, class F>
__device__ __forceinline__ void backward_wide(const T* x, const T* g, T* dx, int n, Acc<T>* sums, const F& formula) {
  const int boundary = before_boundary(x);
  if (boundary != before_boundary(g) || boundary != before_boundary(dx))
    return backward_singles(x, g, dx, n, sums, formula);
  const Edges edges(x, n);
  const uint4 *from = reinterpret_cast<const uint4*>(x + edges.head),
              *other = reinterpret_cast<const uint4*>(g + edges.head);
  uint4* to = reinterpret_cast<uint4*>(dx + edges.head);
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kThreads < edges.packs; i += kInFlight * kThreads)
    backward_packs<kInFlight, T>(from + i, other + i, to + i, sums, formula);
#pragma unroll 1
  for (; i < edges.packs; i += kThreads) backward_packs<1, T>(from + i, other + i, to + i, sums, formula);
  if (int(threadIdx.x) < edges.count) {
    const int j = edges.at<T>(threadIdx.x);
    backward_one(x[j], g[j], dx[j], sums, formula);
  }
}

// Whether a column is divided as IEEE has it: one with a step out of all proportion, and all in float64. The others get
// the fast divisor.
template <class Op, class A>
__device__ bool is_plain(const Quantizer& q, int64_t column) {
  if constexpr (sizeof(A) == 8) {
    return true;
  } else {
    const A by = Op::template divisor<A>(q, column);
    return !(by >= FastDivisor::kLeast && by <= FastDivisor::kGreatest);
  }
}

template <class A>
struct FastFor {
  using type = FastDivisor;
};
template <>
struct FastFor<double> {
  using type = Divisor<double>;
};

// Where numbers that follow each other belong to different columns, one block takes as many columns as share 32 bytes,
// the unit in which memory is moved, and those of the others have nothing to do. A thread has one column.
template <class T>
struct Abreast {
  static constexpr int kColumns = 32 / sizeof(T), kRows = kThreads / kColumns;
  int64_t column, at, step;
  int row;
  bool is_mine, is_here;

  __device__ Abreast(const Tensor& tensor, const ChannelChunk& part)
      : column(part.column + threadIdx.x % kColumns), at((part.row + threadIdx.x / kColumns) * tensor.columns + column),
        step(kRows * tensor.columns), row(threadIdx.x / kColumns), is_mine(part.column % kColumns == 0),
        is_here(column < tensor.columns) {}

  __device__ int64_t next() {
    int64_t now = at;
    at += step;
    return now;
  }

  static __device__ bool serves(const Tensor& tensor) { return tensor.columns > 1 && tensor.run == 1; }
};

template <class Op, class T>
__device__ void forward_abreast(const Tensor& tensor, const ChannelChunk& part, const Quantizer& q, const T* x, T* y) {
  Abreast<T> me(tensor, part);
  if (!me.is_mine || !me.is_here) return;
  const typename Op::template At<Acc<T>, Divisor<Acc<T>>> formula(q, tensor.first_column + me.column);
  for (int i = me.row; i < part.n; i += me.kRows, me.at += me.step) narrow(formula.forward(widen(x[me.at])), y[me.at]);
}

template <class Op, class T>
__device__ void backward_abreast(const Tensor& tensor, const ChannelChunk& part, const Quantizer& q, const T* x,
                                 const T* g, T* dx) {
  using A = Acc<T>;
  __shared__ A all[kThreads];
  Abreast<T> me(tensor, part);
  if (!me.is_mine) return;
  A sums[kQuantizerSums] = {};
  if (me.is_here) {
    const typename Op::template At<A, Divisor<A>> formula(q, tensor.first_column + me.column);
    backward_strided(
        x, g, dx, (int(part.n) - me.row + me.kRows - 1) / me.kRows, [&] { return me.next(); }, sums, formula);
  }
  for (int s = 0; s < Op::kSums; ++s) {
    all[threadIdx.x] = sums[s];
    __syncthreads();
    if (me.row == 0 && me.is_here) {
      double total = 0;
      for (int i = threadIdx.x; i < kThreads; i += me.kColumns) total += double(all[i]);
      q.partial[(int64_t(blockIdx.x) + threadIdx.x) * kQuantizerSums + s] = total;
    }
    __syncthreads();
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks<T>) quantize_kernel(List list, Quantizer q) {
  using A = Acc<T>;
  const ChannelChunk part = channel_chunk_at(list, blockIdx.x);
  const Tensor& tensor = tensor_of(list, part.tensor);
  const T* x = place<const T>(list, list.pointers, part.tensor);
  T* y = place<T>(list, q.target, part.tensor);
  const int64_t column = tensor.first_column + part.column;
  if constexpr (kHasChannels<Op>)
    if (Abreast<T>::serves(tensor)) return forward_abreast<Op>(tensor, part, q, x, y);
  const Stretch stretch(tensor, part);
  if (stretch.is_one && (sizeof(A) == 8 || !is_plain<Op, A>(q, column))) {
    forward_wide(x + stretch.begin, y + stretch.begin, int(part.n),
                 typename Op::template At<A, typename FastFor<A>::type>(q, column));
  } else {
    const typename Op::template At<A, Divisor<A>> formula(q, column);
    ChannelStride places(tensor, part);
    for (int i = threadIdx.x; i < part.n; i += kThreads) {
      const int64_t at = places.next();
      narrow(formula.forward(widen(x[at])), y[at]);
    }
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads, kGradientBlocks) gradient_kernel(List list, Quantizer q) {
  using A = Acc<T>;
  const ChannelChunk part = channel_chunk_at(list, blockIdx.x);
  const Tensor& tensor = tensor_of(list, part.tensor);
  const T *x = place<const T>(list, list.pointers, part.tensor), *g = place<const T>(list, q.grads, part.tensor);
  T* dx = place<T>(list, q.target, part.tensor);
  const int64_t column = tensor.first_column + part.column;
  if constexpr (kHasChannels<Op>)
    if (Abreast<T>::serves(tensor)) return backward_abreast<Op>(tensor, part, q, x, g, dx);
  const Stretch stretch(tensor, part);
  A sums[kQuantizerSums] = {};
  if (stretch.is_one && (sizeof(A) == 8 || !is_plain<Op, A>(q, column))) {
    const typename Op::template At<A, typename FastFor<A>::type> formula(q, column);
    backward_wide(x + stretch.begin, g + stretch.begin, dx + stretch.begin, int(part.n), sums, formula);
  } else {
    const typename Op::template At<A, Divisor<A>> formula(q, column);
    ChannelStride places(tensor, part);
    backward_strided(
        x, g, dx, (int(part.n) - int(threadIdx.x) + kThreads - 1) / kThreads, [&] { return places.next(); }, sums,
        formula);
  }
  double total[Op::kSums];
#pragma unroll
  for (int s = 0; s < Op::kSums; ++s) total[s] = sums[s];
  block_reduce<Sum>(total);
  if (threadIdx.x == 0)
    for (int s = 0; s < Op::kSums; ++s) q.partial[int64_t(blockIdx.x) * kQuantizerSums + s] = total[s];
}

// A warp takes a column of a tensor; its lanes every 32nd of the column's chunks, and then by pairs.
template <class Op, class A>
__global__ void __launch_bounds__(kSummers) sums_kernel(List list, Quantizer q) {
  const Tensor& tensor = tensor_of(list, blockIdx.x / kBeside);
  const int64_t parts = (tensor.rows + list.chunk - 1) / list.chunk;
  const int lane = threadIdx.x % 32;
  for (int64_t c = blockIdx.x % kBeside * (kSummers / 32) + threadIdx.x / 32; c < tensor.columns;
       c += kBeside * (kSummers / 32)) {
    double sums[Op::kSums] = {};
    for (int64_t part = lane; part < parts; part += 32)
#pragma unroll
      for (int s = 0; s < Op::kSums; ++s)
        sums[s] += q.partial[(tensor.first_chunk + part * tensor.columns + c) * kQuantizerSums + s];
#pragma unroll
    for (int s = 0; s < Op::kSums; ++s)
      for (int distance = 16; distance > 0; distance /= 2) sums[s] += __shfl_xor_sync(~0u, sums[s], distance);
    if (lane == 0) Op::template finish<A>(q, tensor.first_column + c, sums, double(tensor.rows));
  }
}

// DoReFa's gradient at the maxima, in the chunks that hold some.
template <class T>
__global__ void __launch_bounds__(kThreads) maxima_kernel(List list, Quantizer q) {
  using A = Acc<T>;
  if (q.partial[int64_t(blockIdx.x) * kQuantizerSums + 1] == 0) return;
  const ChannelChunk part = channel_chunk_at(list, blockIdx.x);
  const T *x = place<const T>(list, list.pointers, part.tensor), *g = place<const T>(list, q.grads, part.tensor);
  T* dx = place<T>(list, q.target, part.tensor);
  Dorefa::At<A, Divisor<A>> formula(q, part.tensor);
  formula.share_out(q, part.tensor);
  for (int64_t j = part.row + threadIdx.x; j < part.row + part.n; j += kThreads)
    if (A w = widen(x[j]); abs_(w) == formula.top) narrow(formula.corrected(w, A(widen(g[j]))), dx[j]);
}

}  // namespace r2::cuda
