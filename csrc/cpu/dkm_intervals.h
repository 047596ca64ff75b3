// Scalars in the Euclidean metric (csrc/dkm.h): the interval of each weight, the numbers of its row of the table, and
// the shares of its two groups, in vectors.
#pragma once
#include "dkm_passes.h"

#include "../dkm.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kBlock = 512;  // weights whose intervals and records lie in the first cache

// Picks from 2^level numbers at once, from registers while they fit in.
#if defined(__AVX512F__)
R2_HD Vec<float> pick_any(const float* from, Indices<float> i) {
  return bit_cast<Vec<float>>(_mm512_i32gather_ps(bit_cast<__m512i>(i), from, 4));
}
R2_HD Vec<double> pick_any(const double* from, Indices<double> i) {
  return bit_cast<Vec<double>>(_mm512_i64gather_pd(bit_cast<__m512i>(i), from, 8));
}
template <int kLevel>
R2_HD Vec<float> pick(const float* from, Indices<float> i) {
  const __m512i at = bit_cast<__m512i>(i);
  if constexpr (kLevel <= 4) return bit_cast<Vec<float>>(_mm512_permutexvar_ps(at, _mm512_loadu_ps(from)));
  if constexpr (kLevel == 5)
    return bit_cast<Vec<float>>(_mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + 16)));
  if constexpr (kLevel == 6 || kLevel == 7) {
    constexpr int half = 1 << (kLevel - 1);
    return (i & half) != 0 ? pick<kLevel - 1>(from + half, i) : pick<kLevel - 1>(from, i);
  }
  if constexpr (kLevel > 7) return pick_any(from, i);
}
template <int kLevel>
R2_HD Vec<double> pick(const double* from, Indices<double> i) {
  const __m512i at = bit_cast<__m512i>(i);
  if constexpr (kLevel <= 3) return bit_cast<Vec<double>>(_mm512_permutexvar_pd(at, _mm512_loadu_pd(from)));
  if constexpr (kLevel == 4)
    return bit_cast<Vec<double>>(_mm512_permutex2var_pd(_mm512_loadu_pd(from), at, _mm512_loadu_pd(from + 8)));
  if constexpr (kLevel > 4) return pick_any(from, i);
}
#elif defined(__AVX2__)
R2_HD Vec<float> pick_any(const float* from, Indices<float> i) {
  return bit_cast<Vec<float>>(_mm256_i32gather_ps(from, bit_cast<__m256i>(i), 4));
}
R2_HD Vec<double> pick_any(const double* from, Indices<double> i) {
  return bit_cast<Vec<double>>(_mm256_i64gather_pd(from, bit_cast<__m256i>(i), 8));
}
template <int kLevel>
R2_HD Vec<float> pick(const float* from, Indices<float> i) {
  if constexpr (kLevel <= 3)
    return bit_cast<Vec<float>>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), bit_cast<__m256i>(i)));
  if constexpr (kLevel == 4 || kLevel == 5) {
    constexpr int half = 1 << (kLevel - 1);
    return (i & half) != 0 ? pick<kLevel - 1>(from + half, i) : pick<kLevel - 1>(from, i);
  }
  if constexpr (kLevel > 5) return pick_any(from, i);
}
template <int kLevel>
R2_HD Vec<double> pick(const double* from, Indices<double> i) {
  return pick_any(from, i);
}
#else
template <class A>
R2_HD Vec<A> pick_any(const A* from, Indices<A> i) {
  Vec<A> v;
  for (int j = 0; j < lanes<Vec<A>>; ++j) v[j] = from[i[j]];
  return v;
}
template <int kLevel, class A>
R2_HD Vec<A> pick(const A* from, Indices<A> i) {
  return pick_any(from, i);
}
#endif

// How many of 16 numbers are <= w.
template <class A>
R2_HD int rank(const A* row, A w) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(row), _mm512_set1_ps(w), _CMP_LE_OQ));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    const __m256 x = _mm256_set1_ps(w), low = _mm256_cmp_ps(_mm256_loadu_ps(row), x, _CMP_LE_OQ),
                 high = _mm256_cmp_ps(_mm256_loadu_ps(row + 8), x, _CMP_LE_OQ);
    return __builtin_popcount(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
  }
#endif
  int n = 0;
  for (int i = 0; i < 16; ++i) n += row[i] <= w;
  return n;
}

// Four numbers each, side by side in memory.
template <class A>
R2_HD void pick_four(const A* from, const Index<A>* i, Vec<A>* v) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    for (int r = 0; r < 4; ++r) {
      const auto one = [&](int j) { return _mm_loadu_ps(from + 4 * int64_t(i[r + 4 * j])); };
#if defined(__AVX512F__)
      const __m512 x = _mm512_insertf32x4(_mm512_castps128_ps512(one(0)), one(1), 1);
      v[r] = bit_cast<Vec<float>>(_mm512_insertf32x4(_mm512_insertf32x4(x, one(2), 2), one(3), 3));
#else
      v[r] = bit_cast<Vec<float>>(_mm256_insertf128_ps(_mm256_castps128_ps256(one(0)), one(1), 1));
#endif
    }
    return transpose_4x4(v);
  }
#endif
  for (int m = 0; m < 4; ++m) {
    Vec<A> x = {};
    for (int j = 0; j < lanes<Vec<A>>; ++j) x[j] = from[4 * int64_t(i[j]) + m];
    v[m] = x;
  }
}

// What the passes look up for one iteration of one tensor.
template <class A>
struct IntervalTable {
  using V = Vec<A>;
  // levels of tables whose numbers registers hold, so that they are not loaded one by one: a few, and most
#if defined(__AVX512F__)
  static constexpr int kFew = sizeof(A) == 4 ? 5 : 4, kMost = sizeof(A) == 4 ? 7 : 4,
                       kDescended = sizeof(A) == 4 ? 8 : 4;
#else
  static constexpr int kFew = 0, kMost = 0, kDescended = 3;
#endif

  A *keys, *numbers;
  int size, levels, depth;  // 2^levels > size, 2^depth >= size
  A slope, zero;            // NaN where tau is of no use
  A unit;                   // of all lengths here: weights are multiplied by it first

  static int levels_of(int K) {
    int n = 1;
    while (K >> n) ++n;
    return n;
  }
  static constexpr int64_t key(int level) { return level < 5 ? 16 * level : 48 + (int64_t(1) << level); }
  static int64_t keys_size(int K) { return key(levels_of(K)) + (int64_t(1) << levels_of(K)) + 16; }
  bool ranked() const { return depth > kDescended; }
  static int padded_levels(int levels) { return levels <= kFew ? kFew : levels <= kMost ? kMost : levels; }
  static int64_t numbers_size(int K) { return (int64_t(kNumbers) << padded_levels(levels_of(K))) + 16; }
  // The numbers of an interval lie in two rows of four, or each number of all intervals in an array of its own.
  int64_t at(int interval, int number) const {
    const int padded = padded_levels(levels);
    return levels > kMost ? ((int64_t(number / 4) << padded) + interval) * 4 + number % 4
                          : (int64_t(number) << padded) + interval;
  }

  void fill(const Iteration<A>& it, const Spread& s, int how_many) {
    size = it.size, levels = levels_of(size), depth = levels - (size == 1 << (levels - 1));
    unit = it.unit, slope = A(it.slope()), zero = A(0 * (1 / it.tau));
    // level by level the centroids that a binary search compares with, then the last, or instead of four levels all in
    // rows; NaN, which no weight reaches, where there is none
    const auto centroid = [&](int64_t j) { return j < size ? it.old[j] : A(NAN); };
    const int upper = ranked() ? depth - 4 : depth;
    for (int level = 0; level < upper; ++level)
      for (int64_t i = 0; i < int64_t(1) << level; ++i)
        keys[key(level) + i] = centroid(((2 * i + 1) << (depth - 1 - level)) - 1);
    for (int64_t i = ranked() ? 0 : (1 << depth) - 1, j = 0; i < int64_t(1) << depth; ++i, ++j)
      keys[key(upper) + j] = centroid(i);
    // the output needs the means as they are
    const bool absolute = how_many == 4;
    tables(it, s, how_many, [&](int k, int number, double x) {
      numbers[at(k, number)] = A(absolute && number > kBend ? x + double(it.old[k ? k - 1 : 0]) : x);
    });
  }

  template <int kFrom, int kTo>
  R2_HD static Indices<A> descend(const A* keys, V w, Indices<A> k) {
    if constexpr (kFrom < kTo) {
      const Indices<A> further = pick<kFrom>(keys + key(kFrom), k) <= w;  // -1 where true
      return descend<kFrom + 1, kTo>(keys, w, k + k - further);
    }
    return k;
  }
  // The intervals of n weights, a multiple of a vector: kLevels levels by descent and, with kRank, the last four by
  // comparing with a row of keys.
  template <int kLevels, bool kRank>
  void locate_with(const A* __restrict w, int64_t n, Index<A>* __restrict k) const {
    const A* const __restrict keys = this->keys;
    const int upper = kRank ? depth - 4 : kLevels;
    const V last = splat<V>(keys[key(upper)]);
    for (int64_t i = 0; i < n; i += lanes<V>) {
      const V x = load<V>(w + i);
      Indices<A> at = descend<0, kLevels>(keys, x, Indices<A>{});
      for (int level = kLevels; level < upper; ++level) {
        const Indices<A> further = pick_any(keys + key(level), at) <= x;
        at = at + at - further;
      }
      if (!kRank) at -= last <= x;
      std::memcpy(k + i, &at, sizeof(at));
    }
    if (!kRank) return;
    const A* const __restrict rows = keys + key(upper);
    for (int64_t i = 0; i < n; ++i) k[i] = 16 * k[i] + rank(rows + 16 * int64_t(k[i]), w[i]);
  }
  void locate(const A* w, int64_t n, Index<A>* k) const {
    switch (ranked() ? depth - 4 : depth + 16) {
      case 16: return locate_with<0, false>(w, n, k);
      case 16 + 1: return locate_with<1, false>(w, n, k);
      case 16 + 2: return locate_with<2, false>(w, n, k);
      case 16 + 3: return locate_with<3, false>(w, n, k);
      case 16 + 4: return locate_with<4, false>(w, n, k);
      case 16 + 5: return locate_with<5, false>(w, n, k);
      case 16 + 6: return locate_with<6, false>(w, n, k);
      case 16 + 7: return locate_with<7, false>(w, n, k);
      case 16 + 8: return locate_with<8, false>(w, n, k);
      case 0: return locate_with<0, true>(w, n, k);
      case 1: return locate_with<1, true>(w, n, k);
      case 2: return locate_with<2, true>(w, n, k);
      case 3: return locate_with<3, true>(w, n, k);
      case 4: return locate_with<4, true>(w, n, k);
      default: return locate_with<5, true>(w, n, k);
    }
  }

  // Four of the numbers, from a multiple of four on. kMode: padded_levels, or -1 where they lie in rows of four
  template <int kMode>
  R2_HD void look_up(int first, const Index<A>* k, V* four) const {
    if constexpr (kMode < 0) {
      pick_four(numbers + (int64_t(first) << levels), k, four);
    } else {
      Indices<A> i;
      std::memcpy(&i, k, sizeof(i));
      for (int m = 0; m < 4; ++m) four[m] = pick<kMode>(numbers + (int64_t(first + m) << kMode), i);
    }
  }
};

// The shares of the groups for x = w - reference, times AttentionScale::up, as is their product `both`; NaN where x is
// not finite.
template <class V>
struct Shares {
  V left, right, both;
  template <class A>
  R2_HD Shares(const IntervalTable<A>& t, V x, V bend) {
    const V s = x * t.slope - bend, e = power(-abs_(s)),
            most = splat<V>(1) / (e * AttentionScale<A>::down + (splat<V>(1) + x * t.zero)), least = e * most,
            rest = most * AttentionScale<A>::up;
    right = s > splat<V>(0) ? rest : least, left = s > splat<V>(0) ? least : rest, both = least * most;
  }
};

}  // namespace R2_ISA
}  // namespace r2
