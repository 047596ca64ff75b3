// Sorting of weights with their masses: by radix, which for 4,096 numbers takes 15 us where std::sort takes 200.
#pragma once
#include <cmath>
#include <cstring>
#include <numeric>

#include "kmeans_programme.h"

namespace r2 {
inline namespace R2_ISA {

constexpr double kAnchor = 1 << 20;  // mass of the zeros that a centroid must meet, in that of all others (ANCHOR)

// Integers in the order of numbers, the same for 0 and -0, and back.
inline uint32_t key_of(float x) {
  uint32_t u = bit_cast<uint32_t>(x + 0.0f);
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}
template <class T, class = std::enable_if_t<sizeof(T) == 2>>
uint32_t key_of(T x) {
  uint32_t u = x.bits == 0x8000 ? 0 : x.bits;
  return u ^ (u >> 15 ? 0xffffu : 0x8000u);
}
template <class T>
float from_key(uint32_t key) {
  if constexpr (sizeof(T) == 2)
    return widen(T{uint16_t(key ^ (key >> 15 ? 0x8000u : 0xffffu))});
  else
    return bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Sorts by the highest of the lower 32 or the lower `kBits` bits of E, stable; `spare` is as long. The result is in one
// of the two. `differ`: the bits of the keys that are not the same everywhere.
template <int kDigit, int kBits, class E>
E* radix_sort(E* items, E* spare, int64_t n, uint32_t differ) {
  constexpr int passes = (kBits + kDigit - 1) / kDigit, size = 1 << kDigit, low = 8 * sizeof(E) - 32;
  uint32_t counts[passes][size] = {};
  auto digit = [](E item, int pass) { return uint32_t(item >> low) >> pass * kDigit & (size - 1); };
  for (int64_t i = 0; i < n; ++i)
    for (int p = 0; p < passes; ++p) ++counts[p][digit(items[i], p)];
  for (int p = 0; p < passes; ++p) {
    if (!(differ >> p * kDigit & (size - 1))) continue;
    std::exclusive_scan(counts[p], counts[p] + size, counts[p], 0u);
    for (int64_t i = 0; i < n; ++i) spare[counts[p][digit(items[i], p)]++] = items[i];
    std::swap(items, spare);
  }
  return items;
}
template <int kBits, class E>
E* sorted(E* items, E* spare, int64_t n, uint32_t differ) {
  return n < 1024 || kBits == 16 ? radix_sort<8, kBits>(items, spare, n, differ)
                                 : radix_sort<11, kBits>(items, spare, n, differ);
}

// Numbers of one group in order, with their masses, or each with mass 1 where `mass` is null.
template <class A>
struct Line {
  const A* x;
  const double* mass;
  int64_t n;
};

// Memory of `line_of`, by the type of the numbers.
template <class A>
struct LineScratch {
  Scratch<uint32_t> keys, more_keys;
  Scratch<uint64_t> pairs, more_pairs;
  Scratch<A> x, raw;
  Scratch<double> mass, raw_mass;
  std::vector<int64_t> order;
};

// Equal numbers as one, in place.
template <class A>
int64_t merged(A* x, double* mass, int64_t n) {
  int64_t last = 0;
  for (int64_t i = 1; i < n; ++i) {  // no branch, which would be guessed wrong every other time
    bool other = x[i] != x[last];
    double before = other ? 0 : mass[last];
    last += other;
    x[last] = x[i], mass[last] = before + mass[i];
  }
  return last + 1;
}

constexpr int64_t kMerged = 1 << 14;  // up to so many numbers are merged where they are equal
constexpr int64_t kTabled = 1 << 15;  // 16-bit numbers that are counted by their bits, not sorted

// 16-bit numbers by their bits: in time and memory that no longer depend on how many there are.
template <class T>
Line<float> counted_line(const T* w, const double* weight, double unit, int64_t n, bool zero, LineScratch<float>& s) {
  double* by_bits = s.raw_mass.get(1 << 16);
  std::fill(by_bits, by_bits + (1 << 16), 0.0);
  if (weight) {
    for (int64_t i = 0; i < n; ++i) by_bits[w[i].bits] += weight[i] * unit;
  } else {
    // 32 bits in four tables: runs of equal numbers do not wait for each other
    std::vector<uint32_t> counts(4 << 16);
    for (int64_t begin = 0; begin < n; begin += int64_t(1) << 31) {
      int64_t end = std::min(n, begin + (int64_t(1) << 31));
      std::fill(counts.begin(), counts.end(), 0);
      for (int64_t i = begin; i < end; ++i) ++counts[(i & 3) << 16 | w[i].bits];
      for (int64_t v = 0; v < 1 << 16; ++v)
        by_bits[v] += double(counts[v]) + counts[1 << 16 | v] + counts[2 << 16 | v] + counts[3 << 16 | v];
    }
  }
  float* x = s.x.get(1 << 16);
  double *mass = s.mass.get(1 << 16), total = 0;
  if (zero) {
    by_bits[0] = by_bits[0x8000] = 0;
    for (int64_t v = 0; v < 1 << 16; ++v) total += by_bits[v];
    by_bits[0] = total > 0 ? kAnchor * total : 1;
  }
  int64_t count = 0;
  auto take = [&](int64_t v) {
    if (by_bits[v] > 0) x[count] = widen(T{uint16_t(v)}), mass[count++] = by_bits[v];
  };
  for (int64_t v = 0xffff; v >= 0x8000; --v) take(v);
  for (int64_t v = 0; v < 0x8000; ++v) take(v);
  return {x, mass, merged(x, mass, count)};
}

// Numbers and masses by value, stable.
inline void sort_pairs(const float* x, const double* mass, int64_t n, LineScratch<float>& s, float* to,
                       double* masses) {
  uint64_t* pairs = s.pairs.get(n);
  uint32_t differ = 0, first = key_of(x[0]);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t key = key_of(x[i]);
    pairs[i] = uint64_t(key) << 32 | uint32_t(i), differ |= key ^ first;
  }
  pairs = sorted<32>(pairs, s.more_pairs.get(n), n, differ);
  for (int64_t i = 0; i < n; ++i)
    to[i] = from_key<float>(uint32_t(pairs[i] >> 32)), masses[i] = mass[uint32_t(pairs[i])];
}
inline void sort_pairs(const double* x, const double* mass, int64_t n, LineScratch<double>& s, double* to,
                       double* masses) {
  s.order.resize(n);
  std::iota(s.order.begin(), s.order.end(), 0);
  std::stable_sort(s.order.begin(), s.order.end(), [&](int64_t a, int64_t b) { return x[a] < x[b]; });
  for (int64_t i = 0; i < n; ++i) to[i] = x[s.order[i]], masses[i] = mass[s.order[i]];
}

// The numbers in order, without masses; equal ones are one where there are not too many.
template <class T>
Line<float> plain_line(const T* w, int64_t n, double, LineScratch<float>& s) {
  uint32_t* keys = s.keys.get(n);
  uint32_t differ = 0, first = key_of(w[0]);
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(w[i]), differ |= keys[i] ^ first;
  keys = sorted<8 * sizeof(T)>(keys, s.more_keys.get(n), n, differ);
  int64_t count = n;
  if (n <= kMerged) {
    s.order.resize(n);  // where runs of equal keys end; no branch, which would be guessed wrong every other time
    count = 0;
    for (int64_t i = 0; i + 1 < n; ++i) s.order[count] = i, count += keys[i] != keys[i + 1];
    s.order[count++] = n - 1;
  }
  float* x = s.x.get(n);
  if (count == n) {
    for (int64_t i = 0; i < n; ++i) x[i] = from_key<T>(keys[i]);
    return {x, nullptr, n};
  }
  double* mass = s.mass.get(count);
  for (int64_t c = 0; c < count; ++c) {
    x[c] = from_key<T>(keys[s.order[c]]);
    mass[c] = double(s.order[c] - (c ? s.order[c - 1] : -1));
  }
  return {x, mass, count};
}
inline Line<double> plain_line(const double* w, int64_t n, double factor, LineScratch<double>& s) {
  double* x = s.x.get(n);
  for (int64_t i = 0; i < n; ++i) x[i] = w[i] * factor;
  std::sort(x, x + n);
  if (n > kMerged) return {x, nullptr, n};
  double* mass = s.mass.get(n);
  std::fill(mass, mass + n, 1.0);
  return {x, mass, merged(x, mass, n)};
}

// The n numbers w in order, times `factor` (1 but for doubles, whose squares could overflow); those of weight 0 are
// left out. zero: all zeros are one of a mass at which a centroid must be.
template <class T>
Line<Acc<T>> line_of(const T* w, const double* weight, int64_t n, double factor, bool zero, LineScratch<Acc<T>>& s) {
  using A = Acc<T>;
  double unit = 1;
  if (weight) unit = 1 / power_above(*std::max_element(weight, weight + n), 1000);
  if constexpr (sizeof(T) == 2)
    if (n >= kTabled) return counted_line(w, weight, unit, n, zero, s);
  if (!weight && !zero) return plain_line(w, n, factor, s);
  A* raw = s.raw.get(n + 1);
  double *raw_mass = s.raw_mass.get(n + 1), total = 0;
  int64_t count = zero;
  for (int64_t i = 0; i < n; ++i) {
    A v = widen(w[i]);
    double m = weight ? weight[i] * unit : 1;
    if (m > 0 && !(zero && v == 0)) raw[count] = A(v * factor), raw_mass[count++] = m, total += m;
  }
  if (zero) raw[0] = 0, raw_mass[0] = total > 0 ? kAnchor * total : 1;
  A* x = s.x.get(count);
  double* mass = s.mass.get(count);
  sort_pairs(raw, raw_mass, count, s, x, mass);
  return {x, mass, count <= kMerged ? merged(x, mass, count) : count};
}

}  // namespace R2_ISA
}  // namespace r2
