// k-means of sorted scalars on a GPU, a block for each group: the exact programme on cells (as in
// csrc/cpu/kmeans_programme.h), then Lloyd on all values. Sums are of float64, in an order that depends on the numbers
// alone.
#pragma once
#include "dkm_common.cuh"

namespace r2::cuda {

constexpr int kLineThreads = 256, kLineWarps = kLineThreads / 32;
constexpr int kMostLineClusters = 512;
constexpr int kMostCells = 2048;  // below 2^16

// Bytes of shared memory for so many cells.
constexpr size_t line_bytes(int cells) { return size_t(cells + 1) * 6 * sizeof(double); }

// Of so many values; what they hold is told at LineGroup.
struct LineScratch {
  int64_t sums, cuts;
  R2_HD LineScratch(int stride, int most, bool weighted)
      : sums(int64_t(stride + 1) * (weighted ? 2 : 1)),
        cuts(int64_t(most - 1) * ((stride < kMostCells ? stride : kMostCells) + 1)) {}
  R2_HD int64_t bytes() const { return (sums * 8 + cuts * 2 + 7) / 8 * 8; }
};

// write(i, read(0) + .. + read(i)) for all i below n, by a block.
template <class X, class Read, class Write>
__device__ void running_sums(int n, Read read, Write write) {
  __shared__ X totals[kLineWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  X carried = 0;
  for (int first = 0; first < n; first += kLineThreads) {
    const int i = first + int(threadIdx.x);
    X x = i < n ? read(i) : X(0);
    for (int by = 1; by < 32; by *= 2) {
      const X left = __shfl_up_sync(~0u, x, by);
      if (lane >= by) x += left;
    }
    if (lane == 31) totals[warp] = x;
    __syncthreads();
    X before = carried;
    for (int w = 0; w < kLineWarps; ++w) {
      if (w == warp) before = carried;
      carried += totals[w];
    }
    if (i < n) write(i, before + x);
    __syncthreads();
  }
}

// to[i], for i up to n: the sum of read over [0, i), 0 at `middle`, each side summed from there: an outlier at an end
// takes no precision from the rest.
template <class Read>
__device__ void outward_sums(int n, int middle, Read read, double* to) {
  if (threadIdx.x == 0) to[middle] = 0;
  running_sums<double>(
      n - middle, [&](int i) { return read(middle + i); }, [&](int i, double x) { to[middle + 1 + i] = x; });
  running_sums<double>(
      middle, [&](int i) { return read(middle - 1 - i); }, [&](int i, double x) { to[middle - 1 - i] = -x; });
}

// A group as its block works on it. Edges: where runs of values begin, and last their number.
template <class A, bool kWeighted>
struct LineGroup {
  const A* values;
  const double* weights;
  int n, clusters, most;
  double scale, inverse;  // powers of two: of values in this scale squares neither overflow nor vanish
  double *total, *mass;   // prefix sums of weight x value, and of weight
  double *sums, *sums_of_first, *sums_of_second;  // over cells: mass, mass x value, mass x value^2
  double *least, *fewer;                          // inertia of the cells before each end
  int *edges, *spare;
  uint16_t* cuts;  // (clusters - 1, cells + 1): where the last of 2, 3, ... clusters begins

  __device__ LineGroup(const Lines& lines, int cells, double* shared) {
    const int64_t g = blockIdx.x;
    const LineScratch scratch(lines.stride, lines.most, kWeighted);
    char* own = static_cast<char*>(lines.scratch) + g * scratch.bytes();
    values = static_cast<const A*>(lines.values) + g * lines.stride;
    weights = kWeighted ? lines.weights + g * lines.stride : nullptr;
    n = lines.sizes[g], clusters = lines.clusters[g], most = cells;
    total = reinterpret_cast<double*>(own), mass = total + lines.stride + 1;
    cuts = reinterpret_cast<uint16_t*>(own + scratch.sums * 8);
    sums = shared, sums_of_first = sums + cells + 1, sums_of_second = sums_of_first + cells + 1;
    least = sums_of_second + cells + 1, fewer = least + cells + 1;
    edges = reinterpret_cast<int*>(fewer + cells + 1), spare = edges + cells + 1;
  }

  __device__ double at(int i) const { return double(values[i]) * inverse; }
  __device__ double mass_of(int from, int to) const { return kWeighted ? mass[to] - mass[from] : double(to - from); }

  // of values [from, to); kept to their range, so that equal values are met exactly
  __device__ double mean(int from, int to, double otherwise) const {
    const double m = mass_of(from, to);
    if (!(m > 0)) return otherwise;
    return fmin(fmax((total[to] - total[from]) / m, at(from)), at(to - 1));
  }

  // the first of values [from, to) that is above, or `to`
  __device__ int above(double threshold, int from, int to) const {
    while (from < to) {
      const int half = (from + to) / 2;
      if (at(half) > threshold)
        to = half;
      else
        from = half + 1;
    }
    return from;
  }

  __device__ void sum_up() {
    int exponent;
    frexp(fmax(fabs(double(values[0])), fabs(double(values[n - 1]))), &exponent);
    exponent = min(max(exponent, -1000), 1000);
    scale = ldexp(1.0, exponent), inverse = ldexp(1.0, -exponent);
    if (kWeighted) outward_sums(n, n / 2, [&](int i) { return weights[i]; }, mass);
    outward_sums(n, n / 2, [&](int i) { return kWeighted ? weights[i] * at(i) : at(i); }, total);
    __syncthreads();
  }

  // The number of cells, each a run of equal values where these are few, else as algorithms/kmeans.py makes them: those
  // that may hold the most inertia are halved, by value, again and again.
  __device__ int make_cells() { return n <= most ? cells_of_equal_values() : halved_cells(); }

  __device__ int cells_of_equal_values() {
    const auto begins = [&](int i) { return i == 0 || values[i] != values[i - 1] ? 1 : 0; };
    __shared__ int count;
    running_sums<int>(n, begins, [&](int i, int x) {
      if (begins(i)) edges[x - 1] = i;
      if (i == n - 1) edges[x] = n, count = x;
    });
    return count;
  }

  __device__ int halved_cells() {
    uint32_t* keys = reinterpret_cast<uint32_t*>(least);  // upper halves of the bounds of inertia: of numbers in order
    int cells = 1;
    if (threadIdx.x == 0) edges[0] = 0, edges[1] = n;
    __syncthreads();
    while (cells < most) {
      each(cells, [&](int i) {
        const double range = at(edges[i + 1] - 1) - at(edges[i]);
        keys[i] = uint32_t(uint64_t(__double_as_longlong(mass_of(edges[i], edges[i + 1]) * range * range)) >> 32);
      });
      __syncthreads();
      const int added = halve(keys, cells, min(most - cells, (cells + 1) / 2));
      int* made = spare;
      spare = edges, edges = made;
      cells += added;
      if (added == 0) break;
    }
    return cells;
  }

  // Puts into `spare` the edges and those within the cells of the `room` largest keys above 0; how many these are.
  __device__ int halve(const uint32_t* keys, int cells, int room) {
    const auto count = [&](uint32_t least_key) {
      int found = 0;
      for (int first = 0; first < cells; first += kLineThreads) {
        const int i = first + int(threadIdx.x);
        found += __syncthreads_count(i < cells && keys[i] >= least_key);
      }
      return found;
    };
    uint32_t low = 1, high = 0x80000000u;  // count(low) >= room, where so many are above 0; count(high) < room
    while (high - low > 1) {
      const uint32_t half = low + (high - low) / 2;
      if (count(half) >= room)
        low = half;
      else
        high = half;
    }
    const int surely = count(high), more = min(room, count(low)) - surely;
    // of those with the key `low` the first
    int* rank = reinterpret_cast<int*>(fewer);
    running_sums<int>(cells, [&](int i) { return keys[i] == low ? 1 : 0; }, [&](int i, int x) { rank[i] = x; });
    __syncthreads();
    const auto halved = [&](int i) { return keys[i] >= high || (keys[i] == low && rank[i] <= more) ? 1 : 0; };
    running_sums<int>(cells, halved, [&](int i, int x) {
      const int from = edges[i], to = edges[i + 1];
      spare[i + x - halved(i)] = from;
      if (halved(i)) {
        const double lowest = at(from), highest = at(to - 1), middle = (lowest + highest) / 2;
        spare[i + x] = above(middle < highest ? middle : lowest, from, to);
      }
      if (i == cells - 1) spare[i + 1 + x] = n;
    });
    __syncthreads();
    return surely + more;
  }

  // no product is added to anything, so the compiler fuses nothing
  __device__ double inertia(int i, int j) const {
    const double m = sums[j] - sums[i], first = sums_of_first[j] - sums_of_first[i];
    return fmax(sums_of_second[j] - sums_of_second[i] - (m > 0 ? first * first / m : 0.0), 0.0);
  }

  __device__ uint16_t& cut(int k, int j) const { return cuts[int64_t(k - 1) * (most + 1) + j]; }

  // Runs of the cells into `starts`, a place for each cluster.
  __device__ void partition(int cells, int* starts) {
    const int middle = cells / 2;
    const auto value = [&](int i) { return mean(edges[i], edges[i + 1], at(edges[i])); };
    const double shift = value(middle);
    const auto mass_at = [&](int i) { return mass_of(edges[i], edges[i + 1]); };
    outward_sums(cells, middle, mass_at, sums);
    outward_sums(cells, middle, [&](int i) { return mass_at(i) * (value(i) - shift); }, sums_of_first);
    outward_sums(
        cells, middle, [&](int i) { return mass_at(i) * (value(i) - shift) * (value(i) - shift); }, sums_of_second);
    __syncthreads();
    each(cells + 1, [&](int j) { least[j] = inertia(0, j); });
    __syncthreads();
    for (int k = 1; k < clusters; ++k) {
      double* before = fewer;
      fewer = least, least = before;
      const int first = k + 1 < clusters ? k + 1 : cells, columns = cells + 1 - first;
      int step = 1;
      while (2 * step <= columns) step *= 2;
      for (; step > 0; step /= 2) solve(k, first, columns, cells, step);
    }
    if (threadIdx.x == 0) {
      for (int k = clusters - 1, end = cells; k > 0; --k) starts[k] = edges[end = cut(k, end)];
      starts[0] = 0;
    }
  }

  // One level of the programme of k + 1 clusters: the columns first - 1 + step, + 3 step, ..., whose last cluster
  // begins between those of the columns a step away, of the levels before. As many lanes to a column as there are.
  __device__ void solve(int k, int first, int columns, int cells, int step) {
    const int count = (columns / step + 1) / 2;
    int lanes = 32;
    while (lanes > 1 && lanes * count > kLineThreads) lanes /= 2;
    for (int column = threadIdx.x / lanes, round = 0; round < count; round += kLineThreads / lanes) {
      const int place = (2 * (round + column) + 1) * step, j = first - 1 + place, lane = threadIdx.x % lanes;
      const bool is_there = place <= columns;
      double inertia_of_best = INFINITY;
      int best = INT32_MAX;
      if (is_there) {
        const int low = place > step ? cut(k, j - step) : k, high = place + step <= columns ? cut(k, j + step) : cells,
                  last = min(high, j - 1), lowest = min(max(low, k > 1 ? int(cut(k - 1, j)) : 0), last);
        for (int i = lowest + lane; i <= last; i += lanes) {
          const double candidate = fewer[i] + inertia(i, j);
          if (candidate < inertia_of_best) inertia_of_best = candidate, best = i;
        }
      }
      for (int by = lanes / 2; by > 0; by /= 2) {
        const double other = __shfl_xor_sync(~0u, inertia_of_best, by);
        const int other_best = __shfl_xor_sync(~0u, best, by);
        if (other < inertia_of_best || (other == inertia_of_best && other_best < best))
          inertia_of_best = other, best = other_best;
      }
      if (is_there && lane == 0) least[j] = inertia_of_best, cut(k, j) = uint16_t(best);
    }
    __syncthreads();
  }

  // From runs (clusters + 1) of the values.
  __device__ void lloyd(int64_t max_iter, int* runs, int* found, double* centroids) const {
    each(clusters, [&](int k) { centroids[k] = at(min(runs[k], n - 1)); });
    for (int64_t iteration = 0; iteration < max_iter; ++iteration) {
      each(clusters, [&](int k) { centroids[k] = mean(runs[k], runs[k + 1], centroids[k]); });
      __syncthreads();
      bool changed = false;
      each(clusters - 1, [&](int k) {
        found[k + 1] = above((centroids[k] + centroids[k + 1]) / 2, 0, n);
        changed |= found[k + 1] != runs[k + 1];
      });
      if (!__syncthreads_or(changed)) break;
      each(clusters - 1, [&](int k) { runs[k + 1] = found[k + 1]; });
      __syncthreads();
    }
  }
};

template <class A, bool kWeighted>
__global__ void __launch_bounds__(kLineThreads) lines_kernel(Lines lines, int most) {
  extern __shared__ double shared[];
  __shared__ int runs[kMostLineClusters + 1], found[kMostLineClusters + 1];
  __shared__ double centroids[kMostLineClusters];
  LineGroup<A, kWeighted> group(lines, most, shared);
  double* out = lines.out + int64_t(blockIdx.x) * lines.most;
  if (group.n == 0) {
    each(group.clusters, [&](int k) { out[k] = NAN; });
    return;
  }
  group.sum_up();
  const int cells = group.make_cells();
  __syncthreads();
  if (cells > group.clusters)
    group.partition(cells, runs);
  else
    each(group.clusters, [&](int k) { runs[k] = k < cells ? group.edges[k] : group.n; });
  if (threadIdx.x == 0) runs[group.clusters] = group.n;
  __syncthreads();
  group.lloyd(lines.max_iter, runs, found, centroids);
  __syncthreads();
  each(group.clusters, [&](int k) { out[k] = centroids[k] * group.scale; });
}

}  // namespace r2::cuda
