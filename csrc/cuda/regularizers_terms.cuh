// Several regularizers from one launch: each sweeps a chunk small enough to stay in the first cache; backward, the
// gradients of all are summed in registers.
#pragma once
#include "range_losses.cuh"
#include "regularizers.cuh"

namespace r2::cuda {

constexpr int kBinRoom = 32768, kBinRoomOfTerms = 16384;  // bytes of shared memory
constexpr int kFunctor = 128;                             // bytes of the largest gradient

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 3 : kBlocks<T>)
    terms_kernel(List list, Terms<Forward> terms) {
  using A = Acc<T>;
  const Chunk c = chunk_at(list, blockIdx.x);
  const Rows<T> rows(list, c);
#pragma unroll 1
  for (int k = 0; k < terms.count; ++k) {
    const Forward& f = terms.of[k];
    const Column column = column_at<A>(list, f.first, f.second, c.tensor, 0, f.bits);
    A* partial = static_cast<A*>(f.partial) +
                 int64_t(blockIdx.x) * (terms.term[k] == Term::bin_reg ? BinReg::state_size(f.bits) : kState);
    __syncthreads();
    switch (terms.term[k]) {
      case Term::l_inf: LInfReader::chunk(rows, column, partial); break;
      case Term::margin: MarginReader::chunk(rows, column, partial); break;
      case Term::soft_min_max:
        f.flag ? SoftReader<true>::chunk(rows, column, partial) : SoftReader<false>::chunk<T>(rows, column, partial);
        break;
      case Term::kure: MomentsReader::chunk(rows, column, partial); break;
      case Term::bin_reg: BinRegReader<kBinRoomOfTerms>::chunk(rows, column, partial); break;
      case Term::msqe: MsqeReader::chunk(rows, column, partial); break;
      case Term::partial_l2: PartialL2Reader::chunk(rows, column, partial); break;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) bins_kernel(List list, Forward f) {
  using A = Acc<T>;
  const Chunk c = chunk_at(list, blockIdx.x);
  BinRegReader<kBinRoom>::chunk(Rows<T>(list, c), column_at<A>(list, f.first, f.second, c.tensor, 0, f.bits),
                                static_cast<A*>(f.partial) + int64_t(blockIdx.x) * BinReg::state_size(f.bits));
}

// A block for each term of each tensor.
template <class A>
__global__ void __launch_bounds__(kMergers, 1) merge_terms_kernel(List list, Terms<Forward> terms) {
  __shared__ Merging other;
  const int k = blockIdx.x % terms.count;
  const int64_t t = blockIdx.x / terms.count;
  const Forward& f = terms.of[k];
  switch (terms.term[k]) {
    case Term::l_inf: return merge_tensor<LInfOp, A>(list, f, t, other);
    case Term::margin: return merge_tensor<MarginOp, A>(list, f, t, other);
    case Term::soft_min_max: return merge_tensor<SoftOp<false>, A>(list, f, t, other);
    case Term::kure: return merge_tensor<KureOp, A>(list, f, t, other);
    case Term::bin_reg: return merge_bins<A>(list, f, t, other);
    case Term::msqe: return merge_tensor<MsqeOp, A>(list, f, t, other);
    case Term::partial_l2: return merge_tensor<PartialL2Op, A>(list, f, t, other);
  }
}

template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) bins_map_kernel(List list, Backward b) {
  using A = Acc<T>;
  __shared__ A slopes[256];
  const Chunk c = chunk_at(list, blockIdx.x);
  T* out = place<T>(list, b.target, c.tensor);
  if (!out) return;
  BinRegGradient<A>::fill(b, c.tensor, slopes);
  __syncthreads();
  const Column column = column_at<A>(list, b.first, b.second, c.tensor, 0, b.bits);
  map_rows<kAdd>(Rows<T>(list, c), out, BinRegGradient<A>{Binner<A>(column.first, column.bits), slopes});
}

// The gradients of all terms at a block's chunk; those of term k were made by thread k.
template <class A>
struct Gradients {
  const Terms<Backward>& terms;
  const unsigned char (*functors)[kFunctor];

  template <class G, int n>
  static __device__ __forceinline__ void add_one(const unsigned char* functor, const A (&w)[n], A (&g)[n]) {
    static_assert(sizeof(G) <= kFunctor);
    const G gradient = *reinterpret_cast<const G*>(functor);
#pragma unroll
    for (int j = 0; j < n; ++j) g[j] += gradient(w[j]);
  }
  template <int n>
  __device__ __forceinline__ void add(const A (&w)[n], A (&g)[n]) const {
#pragma unroll 1
    for (int k = 0; k < terms.count; ++k) switch (terms.term[k]) {
        case Term::l_inf: add_one<LInf::Gradient<A>>(functors[k], w, g); break;
        case Term::margin: add_one<Margin::Gradient<A>>(functors[k], w, g); break;
        case Term::soft_min_max: add_one<Soft::Gradient<A>>(functors[k], w, g); break;
        case Term::kure: add_one<Kure::Gradient<A>>(functors[k], w, g); break;
        case Term::bin_reg: add_one<BinRegGradient<A>>(functors[k], w, g); break;
        case Term::msqe: add_one<Msqe::Gradient<A>>(functors[k], w, g); break;
        case Term::partial_l2: add_one<PartialL2::Gradient<A>>(functors[k], w, g); break;
      }
  }
};

template <class Op, class A>
__device__ void make_gradient(const List& list, const Backward& b, const Chunk& c, unsigned char* functor) {
  using G = typename Op::template Gradient<A>;
  const Column column = column_at<A>(list, b.first, b.second, c.tensor, 0, b.bits);
  const A* saved = static_cast<const A*>(b.saved) + c.tensor * Op::kSaved;
  new (functor) G(Op::template gradient<A>(list, b, c.tensor, c.tensor, column, saved));
  if (c.row == 0 && b.parameter_gradient)
    static_cast<A*>(b.parameter_gradient)[c.tensor] =
        A(Op::parameter_gradient(list, b, c.tensor, c.tensor, column, saved));
}

template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) terms_map_kernel(List list, Terms<Backward> terms) {
  using A = Acc<T>;
  constexpr int pack = kPack<T>, packs = sizeof(T) == 4 ? 2 : 1, n = packs * pack;  // weights of a thread at a time
  alignas(16) __shared__ unsigned char functors[kTerms][kFunctor];
  __shared__ A slopes[256];
  const Chunk c = chunk_at(list, blockIdx.x);
  T* out = place<T>(list, terms.of[0].target, c.tensor);
  for (int k = 0; k < terms.count; ++k)
    if (terms.term[k] == Term::bin_reg) BinRegGradient<A>::fill(terms.of[k], c.tensor, slopes);
  if (int(threadIdx.x) < terms.count) {
    const int k = threadIdx.x;
    const Backward& b = terms.of[k];
    switch (terms.term[k]) {
      case Term::l_inf: make_gradient<LInfOp, A>(list, b, c, functors[k]); break;
      case Term::margin: make_gradient<MarginOp, A>(list, b, c, functors[k]); break;
      case Term::soft_min_max: make_gradient<SoftOp<false>, A>(list, b, c, functors[k]); break;
      case Term::kure: make_gradient<KureOp, A>(list, b, c, functors[k]); break;
      case Term::bin_reg:
        new (functors[k])
            BinRegGradient<A>{Binner<A>(column_at<A>(list, b.first, b.second, c.tensor, 0).first, b.bits), slopes};
        break;
      case Term::msqe: make_gradient<MsqeOp, A>(list, b, c, functors[k]); break;
      case Term::partial_l2: make_gradient<PartialL2Op, A>(list, b, c, functors[k]); break;
    }
  }
  __syncthreads();
  if (!out) return;

  const Gradients<A> gradients = {terms, functors};
  const T* w = place<const T>(list, list.pointers, c.tensor) + c.row;
  T* to = out + c.row;
  const int rows = int(c.n), head = before_boundary(w) == before_boundary(to) ? min(before_boundary(w), rows) : rows;
  const int full = (rows - head) / n, edges = rows - full * n;
#pragma unroll 1
  for (int i = threadIdx.x; i < full; i += kThreads) {
    // neighbouring threads read neighbouring packs
    const int at = i / kThreads * kThreads * n, width = min(kThreads, full - i / kThreads * kThreads);
    const uint4* from = reinterpret_cast<const uint4*>(w + head + at) + i % kThreads;
    uint4* into = reinterpret_cast<uint4*>(to + head + at) + i % kThreads;
    uint4 bits[packs], old[packs];
#pragma unroll
    for (int u = 0; u < packs; ++u) {
      bits[u] = __ldg(from + u * width);
      if (kAdd) old[u] = __ldcg(into + u * width);
    }
    A x[n], g[n];
    widen_packs<packs, T>(bits, x);
    if (kAdd) widen_packs<packs, T>(old, g);
    if (!kAdd)
#pragma unroll
      for (int j = 0; j < n; ++j) g[j] = 0;
    gradients.add(x, g);
    write_packs<T>(g, into, width);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < edges; i += kThreads) {
    const int j = i < head ? i : i + full * n;
    A x[1] = {widen(w[j])}, g[1] = {kAdd ? widen(to[j]) : A(0)};
    gradients.add(x, g);
    narrow(g[0], to[j]);
  }
}

}  // namespace r2::cuda
