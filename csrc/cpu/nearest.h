// The nearest centroid of rows of d numbers, a few vectors of rows side by side.
#pragma once
#include "dkm_group.h"

namespace r2 {
inline namespace R2_ISA {

// The codes of a group of kVectors vectors of rows, number m of which lies kRows further on than number m - 1: of the
// centroid (K, d) with the least square of a distance, which for d = 1 is its size; of two the lower one.
template <int kD, class A>
R2_HD void nearest(const A* x, const A* centroids, int64_t K, int d, Indices<A>* code) {
  using V = Vec<A>;
  using Code = Indices<A>;
  d = kD ? kD : d;
  V own[kD ? kD : 1][kVectors], best[kVectors];
  for (int m = 0; m < kD; ++m)
    for (int u = 0; u < kVectors; ++u) own[m][u] = RowGroup<A>::at(x, m, u);
  for (int u = 0; u < kVectors; ++u) best[u] = splat<V>(A(INFINITY)), code[u] = Code{};
  for (int64_t j = 0; j < K; ++j) {
    V D[kVectors] = {};
    for (int m = 0; m < d; ++m) {
      const V centroid = splat<V>(centroids[j * d + m]);
      for (int u = 0; u < kVectors; ++u) {
        const V difference = (kD ? own[kD ? m : 0][u] : RowGroup<A>::at(x, m, u)) - centroid;
        D[u] = d == 1 ? abs_(difference) : D[u] + difference * difference;
      }
    }
    const Code index = Code{} + Index<A>(j);
    for (int u = 0; u < kVectors; ++u) {
      const Code nearer = D[u] < best[u];  // a NaN never is
      best[u] = nearer ? D[u] : best[u], code[u] = nearer ? index : code[u];
    }
  }
}

// The same of n rows of a block (d, kRows), into `found`, which has kRows places: codes leave as vectors.
template <int kD, class A>
R2_HD void nearest_rows(const A* x, const A* centroids, int64_t K, int d, int n, Index<A>* found) {
  Indices<A> code[kRows / lanes<Vec<A>>];
  for (int i = 0; i < n; i += RowGroup<A>::rows) nearest<kD>(x + i, centroids, K, d, code + i / lanes<Vec<A>>);
  std::memcpy(found, code, sizeof(code));
}

// Calls f(d), where d is small and float32 with d as a constant; 0 is any.
template <class A, class F>
R2_HD void with_width(int d, F f) {
  if (sizeof(A) == 4 && d == 1) return f(std::integral_constant<int, 1>());
  if (sizeof(A) == 4 && d == 2) return f(std::integral_constant<int, 2>());
  if (sizeof(A) == 4 && d == 4) return f(std::integral_constant<int, 4>());
  if (sizeof(A) == 4 && d == 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, 0>());
}

}  // namespace R2_ISA
}  // namespace r2
