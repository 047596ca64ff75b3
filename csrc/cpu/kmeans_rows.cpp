// k-means of rows of d numbers, for every group of a list: greedy k-means++ on some rows, then Lloyd on all. Sums are
// of float64, over parts of a group that depend on its size alone, so the bits are the same for any number of threads.
#include <algorithm>

#include "nearest.h"
#include "scratch.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int64_t kPart = 4096;  // rows that are summed up by one thread, more of them for more clusters

template <class X>
R2_HD X larger_bits(const X* x, int64_t n) {
  using bits = typename Lane<X>::bits;
  bits most = 0;  // of numbers >= 0 they are in order, NaN last
  for (int64_t i = 0; i < n; ++i) most = std::max(most, bit_cast<bits>(abs_(x[i])));
  return bit_cast<X>(most);
}

// What one thread works in, or several with the same group. Rows lie in blocks (d, kRows), with zeros behind the last.
template <class A>
class RowsKMeans {
 public:
  RowsKMeans(int d, int threads) : d_(d), threads_(threads) {}

  template <class T>
  void fit(const RowGroups& groups, int64_t group) {
    A* out = address<A>(groups.out, group);
    K_ = groups.clusters[group], width_ = d_ + 1;
    if (!take(address<const T>(groups.rows, group), address<const double>(groups.weights, group),
              groups.sizes[group])) {
      std::fill(out, out + K_ * d_, A(NAN));
      return;
    }
    centroids_ = centroid_memory_.get(K_ * d_);
    const int64_t* drawn = address<const int64_t>(groups.drawn, group);
    seed(drawn, drawn ? groups.seeds[group] : n_, address<const double>(groups.uniform, group));
    with_width<A>(d_, [&](auto kD) { lloyd<kD>(groups.max_iter); });
    for (int64_t i = 0; i < K_ * d_; ++i) out[i] = A(centroids_[i] * scale_);
  }

 private:
  template <class Run>
  void over(int64_t n, Run run) const {
#pragma omp parallel for schedule(static) num_threads(threads_) if (threads_ > 1)
    for (int64_t i = 0; i < n; ++i) run(i);
  }

  int64_t blocks_of(int64_t n) const { return (n + kRows - 1) / kRows; }

  // The rows of weight above 0, divided by a power of two, as the weights are; false where a number is not finite.
  template <class T>
  bool take(const T* rows, const double* weight, int64_t n) {
    const int64_t parts = (n + kPart - 1) / kPart;
    A* largest = largest_memory_.get(parts);
    over(parts, [&](int64_t p) {
      const int64_t first = p * kPart * d_, count = std::min(n, (p + 1) * kPart) * d_ - first;
      A block[kRows];
      largest[p] = 0;
      for (int64_t i = 0; i < count; i += kRows) {
        const int64_t length = std::min(int64_t(kRows), count - i);
        for (int64_t j = 0; j < length; ++j) block[j] = widen(rows[first + i + j]);
        const A most = larger_bits(block, length);
        largest[p] = most > largest[p] || !(most < A(INFINITY)) ? most : largest[p];
        if (!(largest[p] < A(INFINITY))) return;
      }
    });
    A most = larger_bits(largest, parts);
    if (!(most < A(INFINITY))) return false;
    const int64_t* used = nullptr;
    n_ = n;
    if (weight && std::any_of(weight, weight + n, [](double w) { return !(w > 0); })) {
      int64_t* at = used_memory_.get(n);
      n_ = 0;
      for (int64_t i = 0; i < n; ++i)
        if (weight[i] > 0) at[n_++] = i;
      used = at, most = 0;
      for (int64_t i = 0; i < n_; ++i)
        for (int m = 0; m < d_; ++m) most = std::max(most, A(std::abs(widen(rows[used[i] * d_ + m]))));
    }
    if (n_ == 0) return false;
    scale_ = power_above(most, sizeof(A) == 4 ? 100 : 1000);
    const A inverse = A(1 / scale_);
    const double lighter = weight ? 1 / power_above(larger_bits(weight, n), 1000) : 1;
    A* x = x_memory_.get(blocks_of(n_) * d_ * kRows);
    double* mass = weight ? weight_memory_.get(blocks_of(n_) * kRows) : nullptr;
    over(blocks_of(n_), [&](int64_t b) {
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = b * kRows + i, from = row < n_ ? used ? used[row] : row : -1;
        for (int m = 0; m < d_; ++m)
          x[(b * d_ + m) * kRows + i] = from < 0 ? A(0) : A(widen(rows[from * d_ + m])) * inverse;
        if (mass) mass[row] = from < 0 ? 0 : weight[from] * lighter;
      }
    });
    x_ = x, weight_ = mass;
    return true;
  }

  // Of `n` rows, all or those `drawn`: again and again, of some drawn in proportion to weight x squared distance from
  // the centroids so far, the one that leaves the least. `uniform`: numbers in [0, 1), one for the first centroid and
  // 2 + log(K) for every other.
  void seed(const int64_t* drawn, int64_t n, const double* uniform) {
    using V = Vec<double>;
    const int64_t blocks = blocks_of(n), most = 2 + int64_t(std::log(double(K_)));
    double *x = seed_memory_.get(blocks * kRows * (d_ + 2 + most)), *mass = x + blocks * kRows * d_,
           *left = mass + blocks * kRows, *after = left + blocks * kRows;
    double *share = share_memory_.get(blocks * (most + 1)), *shares = share + blocks;
    double* tried = tried_memory_.get(most * d_);
    over(blocks, [&](int64_t b) {
      share[b] = 0;
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = b * kRows + i, row = at >= n ? 0 : drawn ? drawn[at] : at;
        for (int m = 0; m < d_; ++m) x[(b * d_ + m) * kRows + i] = double(number(row, m));
        mass[at] = at >= n ? 0 : weight_ ? weight_[row] : 1;
        left[at] = 1;
        share[b] += mass[at];
      }
    });
    for (int64_t k = 0; k < K_; ++k) {
      double* centroid = centroids_ + k * d_;
      const int64_t tries = k == 0 ? 1 : most;
      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) total += share[b];
      if (total == 0) {  // as many centroids as rows that differ
        std::copy(centroid - d_, centroid, centroid);
        continue;
      }
      for (int64_t t = 0; t < tries; ++t) {
        const int64_t at = place(share, left, mass, blocks, *uniform++ * total);
        for (int m = 0; m < d_; ++m) tried[t * d_ + m] = x[(at / kRows * d_ + m) * kRows + at % kRows];
      }
      over(blocks, [&](int64_t b) {
        for (int64_t t = 0; t < tries; ++t) {
          V sums = {};
          for (int i = 0; i < kRows; i += lanes<V>) {
            const int64_t at = b * kRows + i;
            V D = {};
            for (int m = 0; m < d_; ++m) {
              const V difference = load<V>(x + (b * d_ + m) * kRows + i) - tried[t * d_ + m];
              D += difference * difference;
            }
            if (k > 0) D = lower(D, load<V>(left + at));
            store(after + t * blocks * kRows + at, D);
            sums += D * load<V>(mass + at);
          }
          shares[t * blocks + b] = sum(sums);
        }
      });
      int64_t best = 0;
      double least = INFINITY;
      for (int64_t t = 0; t < tries; ++t) {
        double leaves = 0;
        for (int64_t b = 0; b < blocks; ++b) leaves += shares[t * blocks + b];
        if (leaves < least) least = leaves, best = t;
      }
      std::copy(tried + best * d_, tried + (best + 1) * d_, centroid);
      std::copy(after + best * blocks * kRows, after + (best + 1) * blocks * kRows, left);
      std::copy(shares + best * blocks, shares + (best + 1) * blocks, share);
    }
  }

  A number(int64_t row, int m) const { return x_[(row / kRows * d_ + m) * kRows + row % kRows]; }

  // The first row up to which the shares are more than `target`, or else the last that has one.
  static int64_t place(const double* share, const double* left, const double* mass, int64_t blocks, double target) {
    int64_t block = 0, row = 0;
    double before = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (share[b] == 0) continue;
      block = b;
      if (before + share[b] > target) break;
      before += share[b];
    }
    for (int64_t i = block * kRows; i < (block + 1) * kRows; ++i) {
      const double own = left[i] * mass[i];
      if (own == 0) continue;
      row = i, before += own;
      if (before > target) break;
    }
    return row;
  }

  template <int kD>
  void lloyd(int64_t max_iter) {
    const int64_t rows = blocks_of(n_) * kRows;
    part_ = blocks_of(std::max(kPart, 4 * K_)) * kRows, parts_ = (n_ + part_ - 1) / part_;
    codes_ = code_memory_.get(rows), near_ = near_memory_.get(K_ * d_);
    sums_ = sum_memory_.get(parts_ * K_ * width_);
    char* changed = changed_memory_.get(parts_);
    std::fill(codes_, codes_ + rows, -1);
    for (int64_t iteration = 0; iteration < max_iter; ++iteration) {
      for (int64_t i = 0; i < K_ * d_; ++i) near_[i] = A(centroids_[i]);
      over(parts_, [&](int64_t p) { changed[p] = assign_part<kD>(p); });
      if (std::none_of(changed, changed + parts_, [](char c) { return c; })) break;
      merge();
      if (fill())
        over(parts_,
             [&](int64_t p) {
               each_block(p, [&](int64_t b, int n, double* sums) { add<kD>(b, filled_ + b * kRows, n, sums); });
             }),
            merge();
      for (int64_t k = 0; k < K_; ++k) {
        const double* total = sums_ + k * width_;
        if (total[0] > 0)
          for (int m = 0; m < d_; ++m) centroids_[k * d_ + m] = total[1 + m] / total[0];
      }
    }
  }

  // visit(block, its rows, the sums of the part, which are 0 at first)
  template <class Visit>
  void each_block(int64_t part, Visit visit) {
    double* sums = sums_ + part * K_ * width_;
    std::fill(sums, sums + K_ * width_, 0.0);
    const int64_t end = std::min(n_, (part + 1) * part_);
    for (int64_t row = part * part_; row < end; row += kRows)
      visit(row / kRows, int(std::min(int64_t(kRows), end - row)), sums);
  }

  template <int kD>
  bool assign_part(int64_t part) {
    bool changed = false;
    each_block(part, [&](int64_t b, int n, double* sums) {
      Index<A> found[kRows];
      nearest_rows<kD>(x_ + b * d_ * kRows, near_, K_, d_, n, found);
      int32_t *codes = codes_ + b * kRows, differ = 0;
      for (int i = 0; i < n; ++i) differ |= codes[i] ^ int32_t(found[i]), codes[i] = int32_t(found[i]);
      changed |= differ != 0;
      add<kD>(b, codes, n, sums);
    });
    return changed;
  }

  // The block's rows to the sums (K, {mass, mass x row}).
  template <int kD>
  R2_HD void add(int64_t block, const int32_t* codes, int n, double* sums) const {
    const int d = kD ? kD : d_;
    const A* x = x_ + block * d * kRows;
    const double* weight = weight_ ? weight_ + block * kRows : nullptr;
    for (int i = 0; i < n; ++i) {
      double* to = sums + codes[i] * int64_t(d + 1);
      const double w = weight ? weight[i] : 1;
      to[0] += w;
      for (int m = 0; m < d; ++m) to[1 + m] += w * double(x[m * kRows + i]);
    }
  }

  void merge() {
    for (int64_t p = 1; p < parts_; ++p)
      for (int64_t i = 0; i < K_ * width_; ++i) sums_[i] += sums_[p * K_ * width_ + i];
  }

  // Each empty cluster takes the row farthest from its own centroid and from the rows taken before; false where none is
  // empty.
  bool fill() {
    int64_t empty = 0;
    for (int64_t k = 0; k < K_; ++k) empty += sums_[k * width_] == 0;
    if (empty == 0) return false;
    filled_ = filled_memory_.get(blocks_of(n_) * kRows);
    std::copy(codes_, codes_ + n_, filled_);
    A* far = far_memory_.get(n_);
    for (int64_t i = 0; i < n_; ++i) far[i] = apart(i, [&](int m) { return near_[codes_[i] * d_ + m]; });
    for (int64_t k = 0; k < K_; ++k) {
      if (sums_[k * width_] != 0) continue;
      const int64_t row = std::max_element(far, far + n_) - far;
      if (far[row] == 0) break;
      filled_[row] = int32_t(k);
      for (int64_t i = 0; i < n_; ++i) far[i] = std::min(far[i], apart(i, [&](int m) { return number(row, m); }));
    }
    return true;
  }

  template <class Other>
  R2_HD A apart(int64_t row, Other other) const {
    A D = 0;
    for (int m = 0; m < d_; ++m) D += (number(row, m) - other(m)) * (number(row, m) - other(m));
    return D;
  }

  const int d_, threads_;
  int64_t n_, K_, width_, part_, parts_;
  double scale_;
  const A* x_;
  const double* weight_;
  double *centroids_, *sums_;
  A* near_;
  int32_t *codes_, *filled_;
  Scratch<A> x_memory_, near_memory_, far_memory_, largest_memory_;
  Scratch<double> weight_memory_, seed_memory_, share_memory_, tried_memory_, centroid_memory_, sum_memory_;
  Scratch<int64_t> used_memory_;
  Scratch<int32_t> code_memory_, filled_memory_;
  Scratch<char> changed_memory_;
};

// Groups that are much of a thread's share have all threads, one after the other; each of the others has one.
void fit_rows(const RowGroups& groups, int threads) {
  const auto cost = [&](int64_t i) { return double(groups.sizes[i]) * double(groups.clusters[i]); };
  double total = 0;
  for (int64_t i = 0; i < groups.count; ++i) total += cost(i);
  const auto shared = [&](int64_t i) { return groups.sizes[i] > kPart && cost(i) * 4 * threads > total; };
  with_type(groups.dtype, [&](auto like) {
    using T = decltype(like);
    {
      RowsKMeans<Acc<T>> together(groups.d, threads);
      for (int64_t i = 0; i < groups.count; ++i)
        if (shared(i)) together.template fit<T>(groups, i);
    }
#pragma omp parallel num_threads(threads) if (threads > 1 && groups.count > 1)
    {
      RowsKMeans<Acc<T>> alone(groups.d, 1);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < groups.count; ++i)
        if (!shared(i)) alone.template fit<T>(groups, i);
    }
  });
}

}  // namespace R2_ISA
}  // namespace r2
