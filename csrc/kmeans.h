// The exact programme of one-dimensional k-means: cells in order of value, cut into clusters of least inertia (Wang and
// Song 2011), by divide and conquer (Grønlund et al. 2017): the best start of the last cluster never moves left as
// cells are added, nor as clusters are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace r2 {

class Partition {
 public:
  // prefix: (3, cells + 1), the sums of mass, mass * value and mass * value^2 over the cells before each. `starts`: the
  // first cell of each cluster.
  static void run(const double* prefix, int64_t cells, int64_t clusters, int64_t* starts) {
    Partition p(prefix, cells);
    std::vector<int32_t> cuts(clusters * (cells + 1));
    for (int64_t k = 1; k < clusters; k++) {
      std::swap(p.fewer_, p.least_);
      p.fewer_cuts_ = &cuts[(k - 1) * (cells + 1)], p.cuts_ = &cuts[k * (cells + 1)];
      p.solve(k + 1 < clusters ? k + 1 : cells, cells + 1, k, cells - 1);
    }
    for (int64_t k = clusters - 1, end = cells; k >= 0; k--) starts[k] = end = cuts[k * (cells + 1) + end];
  }

 private:
  Partition(const double* prefix, int64_t cells)
      : mass_(prefix), first_(prefix + cells + 1), second_(first_ + cells + 1), least_(cells + 1), fewer_(cells + 1) {
    for (int64_t j = 1; j <= cells; j++) least_[j] = inertia(0, j);
  }

  // of cells i .. j-1 in one cluster; no product is added to anything, so no compiler fuses the two, and all machines
  // agree to the bit
  double inertia(int64_t i, int64_t j) const {
    double mass = mass_[j] - mass_[i], first = first_[j] - first_[i];
    return std::max(second_[j] - second_[i] - (mass > 0 ? first * first / mass : 0.0), 0.0);
  }

  // for every end j in [from, to): where the last cluster starts best, which is known to lie in [low, high]
  void solve(int64_t from, int64_t to, int64_t low, int64_t high) {
    if (from >= to) return;
    int64_t j = from + (to - from) / 2, last = std::min(high, j - 1),
            i = std::min(std::max(low, int64_t(fewer_cuts_[j])), last), best = i;
    double least = fewer_[i] + inertia(i, j);
    while (++i <= last) {
      double candidate = fewer_[i] + inertia(i, j);
      if (candidate < least) least = candidate, best = i;
    }
    least_[j] = least, cuts_[j] = int32_t(best);
    solve(from, j, low, best);
    solve(j + 1, to, best, high);
  }

  const double *mass_, *first_, *second_;
  std::vector<double> least_, fewer_;  // inertia of the cells before each end, in so many clusters and in one fewer
  const int32_t* fewer_cuts_;
  int32_t* cuts_;
};

}  // namespace r2
