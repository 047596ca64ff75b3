// The passes of DKM that give each row something: output, gradient, assign.
#pragma once
#include "dkm_rows.cuh"

namespace r2::cuda {

// The leftovers of a row's tensor: they lie at its end.
template <class A>
__device__ void put_leftovers(const Tensor& tensor, int d, const Memory<A>& from, const Memory<A>& out) {
  for (int64_t i = tensor.rows * d + threadIdx.x; i < tensor.numel; i += blockDim.x) out.put(i, from.get(i));
}

template <int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>)
    dkm_row_output_kernel(List list, Clusters clusters, Pass pass) {
  constexpr int wide = kWide<D>;
  __shared__ Tile<D, A, 2> tile;
  const RowChunk part(list, clusters);
  const Iterated<A> it(list, clusters, pass, part.tensor);
  const Memory<A> w(place(list, list.pointers, part.tensor), list.dtype),
      out(place(list, pass.target, part.tensor), list.dtype);
  const RowPlaces places(tensor_of(list, part.tensor), part.row, it.d);
  const A back = 1 / it.unit;
  Centroids<D, A, 2> centroids = {it, tile};
  for (int first = 0; first < part.rows; first += kThreads) {
    const int n = min(kThreads, part.rows - first);
    const RowPlace where = places.of(first + min(int(threadIdx.x), n - 1));
    Point<D, A> x;
    x.load(w, where, it.d, it.unit);
    Nearest<A> nearest;
    nearest.find(centroids, x);
    for (int block = 0; block < it.d; block += wide) {
      A Z = 0, sum[wide] = {};
      centroids.sweep([&](int, auto c, auto fresh, auto) {
        const A e = nearest.attention(it, square_distance(x, c, it.d));
        Z += e;
#pragma unroll
        for (int i = 0; i < wide; ++i) {
          const int at = D > 0 ? i : block + i;
          sum[i] = fma(e, D > 0 || at < it.d ? fresh(at) : A(0), sum[i]);
        }
      });
#pragma unroll
      for (int i = 0; i < wide; ++i)
        if (int(threadIdx.x) < n && block + i < it.d) out.put(where.at + (block + i) * where.run, sum[i] / Z * back);
    }
  }
  if (part.row == 0) put_leftovers(tensor_of(list, part.tensor), it.d, w, out);
}

// A step's part of dL/dw: sum_j a_j v_j - sum_j a_j (P_j - mean P) slope_j / tau, with P and the slope relative to
// those of the nearest centroid, which nothing can then cancel where it has all the attention.
template <bool kLast, int D, class A>
__device__ void add_row_step(Centroids<D, A, 3>& centroids, const Point<D, A>& x, const Point<D, A>& g, int block,
                             A (&into)[kWide<D>]) {
  constexpr int wide = kWide<D>;
  const Iterated<A>& it = centroids.it;
  const int d = it.d;
  auto difference = [&](auto c, int i) {
    const int at = D > 0 ? i : block + i;
    return D > 0 || at < d ? number(x, at) - c(at) : A(0);
  };
  Nearest<A> nearest;
  nearest.find(centroids, x);
  A base = 0, slope[wide] = {};
  centroids.at(nearest.index, [&](int, auto c, auto fresh, auto v) {
    base = pull<kLast>(x, g, fresh, v, d);
    const A s = it.slope(square_distance(x, c, d));
#pragma unroll
    for (int i = 0; i < wide; ++i) slope[i] = s * difference(c, i);
  });
  A Z = 0, mean = 0, sum_v[wide] = {}, sum_slope[wide] = {}, sum_both[wide] = {};
  centroids.sweep([&](int, auto c, auto fresh, auto v) {
    const A square = square_distance(x, c, d), e = nearest.attention(it, square), s = it.slope(square),
            P = pull<kLast>(x, g, fresh, v, d) - base;
    Z += e, mean = fma(e, P, mean);
#pragma unroll
    for (int i = 0; i < wide; ++i) {
      const A other = e * (fma(s, difference(c, i), -slope[i]));
      const int at = D > 0 ? i : block + i;
      sum_v[i] = fma(e, D > 0 || at < d ? v(at) : A(0), sum_v[i]);
      sum_slope[i] += other, sum_both[i] = fma(P, other, sum_both[i]);
    }
  });
  const A scale = 1 / Z, unit = 1 / it.tau;
#pragma unroll
  for (int i = 0; i < wide; ++i) into[i] += scale * (sum_v[i] - (sum_both[i] - mean * scale * sum_slope[i]) * unit);
}

template <int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>)
    dkm_row_gradient_kernel(List list, Clusters clusters, Pass pass) {
  constexpr int wide = kWide<D>;
  __shared__ Tile<D, A, 3> tile;
  const RowChunk part(list, clusters);
  const Memory<A> w(place(list, list.pointers, part.tensor), list.dtype),
      gs(place(list, pass.grads, part.tensor), list.dtype);
  const Memory<A> out(place(list, pass.target, part.tensor), list.dtype);
  const int d = list.d;
  const RowPlaces places(tensor_of(list, part.tensor), part.row, d);
  for (int first = 0; first < part.rows; first += kThreads) {
    const int n = min(kThreads, part.rows - first);
    const RowPlace where = places.of(first + min(int(threadIdx.x), n - 1));
    Point<D, A> x, g;
    x.load(w, where, d, Iterated<A>(list, clusters, pass, part.tensor).unit), g.load(gs, where, d);
    for (int block = 0; block < d; block += wide) {
      A sum[wide] = {};
      for (int step = 0; step < pass.steps; ++step) {
        const Iterated<A> it(list, clusters, pass, part.tensor, step);
        Centroids<D, A, 3> centroids = {it, tile};
        step == 0 ? add_row_step<true>(centroids, x, g, block, sum) : add_row_step<false>(centroids, x, g, block, sum);
      }
#pragma unroll
      for (int i = 0; i < wide; ++i)
        if (int(threadIdx.x) < n && block + i < d) out.put(where.at + (block + i) * where.run, sum[i]);
    }
  }
  if (part.row == 0) put_leftovers(tensor_of(list, part.tensor), d, gs, out);
}

// The nearest centroid in the caller's order, without fused multiply-adds: ties are then those of the plain formula.
__device__ __forceinline__ float plain_add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float plain_square(float a) { return __fmul_rn(a, a); }
__device__ __forceinline__ double plain_add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double plain_square(double a) { return __dmul_rn(a, a); }

template <int D, class A>
__global__ void __launch_bounds__(kThreads, kResident<D, A>)
    dkm_assign_kernel(List list, Clusters clusters, Pass pass) {
  constexpr int kRows = D == 1 ? 4 : D == 2 ? 2 : 1;
  __shared__ Tile<D, A, 1> tile;
  const RowChunk part(list, clusters);
  const Iterated<A> it(list, clusters, pass, part.tensor);
  const int64_t target = place(list, pass.target, part.tensor);
  const Memory<A> w(place(list, list.pointers, part.tensor), list.dtype);
  const RowPlaces places(tensor_of(list, part.tensor), part.row, it.d);
  Centroids<D, A, 1> centroids = {it, tile};
  for (int first = 0; first < part.rows; first += kThreads * kRows) {
    Point<D, A> x[kRows];
    A least[kRows];
    int best[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = min(first + r * kThreads + int(threadIdx.x), part.rows - 1);
      x[r].load(w, places.of(row), it.d, it.unit);
      least[r] = INFINITY, best[r] = 0;
    }
    centroids.sweep([&](int j, auto c, auto, auto) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        A sum;
        if constexpr (D == 1) {
          sum = abs_(x[r].v[0] - c(0));
        } else {
          sum = 0;
#pragma unroll
          for (int i = 0; i < (D > 0 ? D : it.d); ++i) sum = plain_add(sum, plain_square(number(x[r], i) - c(i)));
        }
        if (sum < least[r]) least[r] = sum, best[r] = j;
      }
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r * kThreads + threadIdx.x;
      if (row >= part.rows) continue;
      if (it.K <= 256)
        reinterpret_cast<uint8_t*>(target)[part.row + row] = uint8_t(best[r]);
      else
        reinterpret_cast<int32_t*>(target)[part.row + row] = best[r];
    }
  }
}

}  // namespace r2::cuda
