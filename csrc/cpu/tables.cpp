// Rows of numbers that each have a table, as files store them. Compiled once for each instruction set (R2_ISA).
#include "kernels.h"
#include "nearest.h"

namespace r2 {
inline namespace R2_ISA {

// Codes as `assign` finds them.
template <class T>
void nearest_of_row(const T* w, int64_t n, const Acc<T>* table, int entries, uint8_t* codes) {
  using A = Acc<T>;
  A x[kRows] = {};
  for (int64_t row = 0; row < n; row += kRows) {
    const int count = n - row < kRows ? int(n - row) : kRows;
    for (int i = 0; i < count; ++i) x[i] = widen(w[row + i]);
    Index<A> found[kRows];
    nearest_rows<1>(x, table, entries, 1, count, found);
    for (int i = 0; i < count; ++i) codes[row + i] = uint8_t(found[i]);
  }
}

inline void nearest_entries(const Tables& t, int threads) {
  with_type(t.dtype, [&](auto like) {
    using T = decltype(like);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < t.groups; ++g)
      nearest_of_row(static_cast<const T*>(t.weights) + g * t.n, t.n,
                     static_cast<const Acc<T>*>(t.tables) + g * t.entries, t.entries, t.codes + g * t.n);
  });
}

// Sums of w^2 and of (w - its entry)^2, and how often each code occurs. The entries are of the weights' type.
template <class T>
void errors_of_row(const T* w, const uint8_t* codes, int64_t n, const T* table, int entries, double* sums,
                   int64_t* counts) {
  constexpr int kSide = 8;
  double wide[256], energy[kSide] = {}, noise[kSide] = {};
  uint32_t seen[4][256] = {};  // neighbours of the same code would wait for one another
  for (int k = 0; k < entries; ++k) wide[k] = widen(table[k]);
  int64_t i = 0;
  for (; i + kSide <= n; i += kSide)
    for (int s = 0; s < kSide; ++s) {
      const double x = widen(w[i + s]), error = x - wide[codes[i + s]];
      energy[s] += x * x, noise[s] += error * error, ++seen[s % 4][codes[i + s]];
    }
  for (; i < n; ++i) {
    const double x = widen(w[i]), error = x - wide[codes[i]];
    energy[0] += x * x, noise[0] += error * error, ++seen[0][codes[i]];
  }
  sums[0] = sums[1] = 0;
  for (int s = 0; s < kSide; ++s) sums[0] += energy[s], sums[1] += noise[s];
  for (int k = 0; k < entries; ++k) counts[k] += int64_t(seen[0][k]) + seen[1][k] + seen[2][k] + seen[3][k];
}

inline void errors(const Tables& t, int threads) {
  with_type(t.dtype, [&](auto like) {
    using T = decltype(like);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      int64_t counts[256] = {};
#pragma omp for schedule(static)
      for (int64_t g = 0; g < t.groups; ++g)
        errors_of_row(static_cast<const T*>(t.weights) + g * t.n, t.codes + g * t.n, t.n,
                      static_cast<const T*>(t.tables) + g * t.entries, t.entries, t.sums + 2 * g, counts);
#pragma omp critical
      for (int k = 0; k < t.entries; ++k) t.counts[k] += counts[k];
    }
  });
}

}  // namespace R2_ISA
namespace cpu::R2_ISA {
const TablePasses tables = {.nearest = nearest_entries, .errors = errors};
}  // namespace cpu::R2_ISA
}  // namespace r2
