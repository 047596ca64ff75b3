// The exact programme of one-dimensional k-means: cells in order of value, cut into clusters of least inertia (Wang and
// Song 2011), by divide and conquer (Grønlund et al. 2017): the best start of the last cluster never moves left as
// cells are added, nor as clusters are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "scratch.h"
#include "simd.h"

namespace r2 {
inline namespace R2_ISA {

// For each edge between cells the sums of mass, mass * value and mass * value^2 before it, from any origin; behind the
// last one there is room for a vector.
struct Moments {
  const double *mass, *first, *second;

  // Of the cells between edges i and j in one cluster. No product is added to anything, so no compiler fuses the two,
  // and all machines agree to the bit.
  template <class V>
  V inertia(int64_t i, int64_t j) const {
    V m = mass[j] - load<V>(mass + i), f = first[j] - load<V>(first + i);
    V v = (second[j] - load<V>(second + i)) - f * f / m;
    return v > 0 ? v : V{};
  }
};
constexpr int kRoom = lanes<Vec<double>>;

// Edges from low to high.
struct Window {
  int64_t low, high;
  int64_t size() const { return high - low + 1; }
};

// The least of fewer[i] + inertia(i, j) over the edges i from low to high < j; `at` is the lowest such i. All of it
// takes a vector of edges at once: eight divisions cost no more than one.
inline double best_start(const Moments& m, const double* fewer, int64_t j, int64_t low, int64_t high, int32_t* at) {
  using V = Vec<double>;
  using I = Vector<double>::bits;
  I lane;
  for (int l = 0; l < lanes<V>; ++l) lane[l] = l;
  auto values = [&](int64_t i) {
    V value = load<V>(fewer + i) + m.inertia<V>(i, j);
    return lane <= high - i ? value : V{} + INFINITY;
  };
  V least = values(low);
  I best = lane + low;
  for (int64_t i = low + lanes<V>; i <= high; i += lanes<V>) {
    V value = values(i);
    best = value < least ? lane + i : best;
    least = value < least ? value : least;
  }
#if defined(__AVX512F__)
  double found = _mm512_reduce_min_pd(bit_cast<__m512d>(least));
  __mmask8 same = _mm512_cmp_pd_mask(bit_cast<__m512d>(least), _mm512_set1_pd(found), _CMP_EQ_OQ);
  *at = high - low < lanes<V> ? int32_t(low + __builtin_ctz(same | 256))
                              : int32_t(_mm512_mask_reduce_min_epi64(same, bit_cast<__m512i>(best)));
  return found;
#else
  double found = least[0];
  int64_t first = best[0];
  for (int l = 1; l < lanes<V>; ++l)
    if (least[l] < found || (least[l] == found && best[l] < first)) found = least[l], first = best[l];
  *at = int32_t(first);
  return found;
#endif
}

// For each edge j of `ends`: the least inertia of the cells before it with one cluster more than `fewer` has for the
// edges of `starts`, and where that cluster starts. Arrays are those of all edges. `bound`, where given, is as `cuts`
// for one cluster fewer.
inline void add_cluster(const Moments& m, Window starts, Window ends, const double* fewer, const int32_t* bound,
                        double* least, int32_t* cuts) {
  int64_t step = 1;
  while (2 * step <= ends.size()) step *= 2;
  for (; step; step /= 2)  // every second one of the ends of before: between neighbours that are known
    for (int64_t j = ends.low + step - 1; j <= ends.high; j += 2 * step) {
      int64_t low = j - step < ends.low ? starts.low : cuts[j - step],
              high = std::min(j - 1, j + step > ends.high ? starts.high : int64_t(cuts[j + step]));
      if (bound) low = std::max(low, int64_t(bound[j]));
      least[j] = best_start(m, fewer, j, std::min(low, high), high, cuts + j);
    }
}

// Where each of `clusters` <= cells begins, of least inertia in all; the table of all cuts is clusters x cells.
inline void partition(const Moments& m, int64_t cells, int64_t clusters, int64_t* starts) {
  std::vector<double> least(cells + 1 + kRoom), fewer(cells + 1 + kRoom);
  std::vector<int32_t> cuts(clusters * (cells + 1));
  for (int64_t j = 1; j <= cells; ++j) least[j] = m.inertia<double>(0, j);
  for (int64_t k = 1; k < clusters; ++k) {
    std::swap(fewer, least);
    add_cluster(m, {k, cells - 1}, {k + 1 < clusters ? k + 1 : cells, cells}, fewer.data(),
                &cuts[(k - 1) * (cells + 1)], least.data(), &cuts[k * (cells + 1)]);
  }
  for (int64_t k = clusters - 1, end = cells; k >= 0; --k) starts[k] = end = cuts[k * (cells + 1) + end];
}

// The programme where the cut before cluster k lies in window k (windows[1] to windows[clusters - 1]).
class Windowed {
 public:
  // least(k)[j], j in window k: inertia of the cells before edge j in k clusters
  void forward(const Moments& m, int64_t cells, int64_t clusters, const Window* windows) {
    run(m, clusters, [&](int64_t k) { return k < clusters ? windows[k] : Window{cells, cells}; });
  }
  // least(k)[j]: of the cells behind the edge that is the j-th from the last one; `mirrored` are the sums of the cells
  // in reverse
  void backward(const Moments& mirrored, int64_t cells, int64_t clusters, const Window* windows) {
    run(mirrored, clusters, [&](int64_t k) {
      if (k == clusters) return Window{cells, cells};
      Window w = windows[clusters - k];
      return Window{cells - w.high, cells - w.low};
    });
  }
  const double* least(int64_t k) const { return rows_[k].least; }
  void starts(int64_t cells, int64_t clusters, int64_t* starts) const {
    starts[0] = 0;
    for (int64_t k = clusters - 1, end = cells; k > 0; --k) starts[k] = end = rows_[k + 1].cuts[end];
  }

 private:
  struct Row {
    double* least;
    int32_t* cuts;
  };
  template <class WindowOf>
  void run(const Moments& m, int64_t clusters, WindowOf window) {
    int64_t total = 0;
    for (int64_t k = 1; k <= clusters; ++k) total += window(k).size() + kRoom;
    double* least = least_.get(total);
    int32_t* cuts = cuts_.get(total);
    rows_.resize(clusters + 1);
    for (int64_t k = 1; k <= clusters; ++k) {
      Window w = window(k);
      rows_[k] = {least - w.low, cuts - w.low};
      least += w.size() + kRoom, cuts += w.size() + kRoom;
      if (k == 1)
        for (int64_t j = w.low; j <= w.high; ++j) rows_[1].least[j] = m.inertia<double>(0, j);
      else
        add_cluster(m, window(k - 1), w, rows_[k - 1].least, nullptr, rows_[k].least, rows_[k].cuts);
    }
  }

  Scratch<double> least_;
  Scratch<int32_t> cuts_;
  std::vector<Row> rows_;
};

}  // namespace R2_ISA
}  // namespace r2
