// One-dimensional k-means of many groups on the CPU. Compiled once for each instruction set (R2_ISA).
#include <limits>

#include "kernels.h"
#include "kmeans_lines.h"

namespace r2 {
inline namespace R2_ISA {

// The centroids of one group.
template <class T>
void fit_line(const T* w, const double* weight, const LineGroups& lines, int64_t i, LineFit<Acc<T>>& fit) {
  using A = Acc<T>;
  int64_t n = lines.sizes[i], clusters = lines.clusters[i];
  A* out = reinterpret_cast<A*>(lines.out[i]);
  A largest = 0;
  bool finite = true;
  for (int64_t j = 0; j < n; ++j) {
    A size = std::abs(widen(w[j]));
    finite &= size <= std::numeric_limits<A>::max();
    largest = std::max(largest, size);
  }
  if (!finite) return void(std::fill(out, out + clusters, A(NAN)));
  double unit = sizeof(T) == 8 ? power_above(largest, 1000) : 1;  // squares of float32 fit float64
  fit.centroids.resize(clusters);
  fit.fit(line_of(w, weight, n, 1 / unit, lines.zero, fit.scratch), clusters, lines.max_iter, fit.centroids.data());
  for (int64_t k = 0; k < clusters; ++k) out[k] = A(fit.centroids[k] * unit);
}

// A group is the work of one thread.
inline void fit_lines(const int64_t* pointers, const LineGroups& lines, int threads) {
  with_type(lines.dtype, [&](auto like) {
    using T = decltype(like);
#pragma omp parallel num_threads(threads) if (threads > 1 && lines.count > 1)
    {
      LineFit<Acc<T>> fit;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < lines.count; ++i)
        fit_line(reinterpret_cast<const T*>(pointers[i]),
                 lines.weights ? reinterpret_cast<const double*>(lines.weights[i]) : nullptr, lines, i, fit);
    }
  });
}

void fit_rows(const RowGroups& groups, int threads);  // kmeans_rows.cpp

// Where clusters begin; `prefix`: three rows of cells + 1 sums each.
inline void partition_cells(const double* prefix, int64_t cells, int64_t clusters, int64_t* starts) {
  std::vector<double> sums(3 * (cells + 1 + kRoom));
  const double* rows[3];
  for (int s = 0; s < 3; ++s) {
    double* row = sums.data() + s * (cells + 1 + kRoom);
    rows[s] = row;
    std::copy(prefix + s * (cells + 1), prefix + (s + 1) * (cells + 1), row);
  }
  partition({rows[0], rows[1], rows[2]}, cells, clusters, starts);
}

}  // namespace R2_ISA
namespace cpu::R2_ISA {
const KMeans kmeans = {.fit_lines = fit_lines, .partition = partition_cells, .fit_rows = fit_rows};
}  // namespace cpu::R2_ISA
}  // namespace r2
