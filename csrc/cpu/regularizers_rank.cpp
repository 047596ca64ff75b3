// The exact k-th smallest |w| of each tensor: 16 bits of what is left at a time, by counting; and one such count, for a
// search over shards. Counts are integers, so threads may add them in any order.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "regularizers_terms.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

// rows: up to these they are sorted as far as need be; above, a sample first says where to look
constexpr int64_t kSelect = 4096;
constexpr int kDigits = 1 << 16;
constexpr int kGroup = 1024;  // weights between two looks at how much room is left
constexpr int kStrip = 512;   // weights whose digits are written down before they are counted,
constexpr int kTables = 4;    // in so many tables, so that one addition need not wait for the one before

template <int kBytes_>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};
template <class T>
using Key = typename Unsigned<sizeof(T)>::type;

R2_HD uint32_t key_of(uint32_t key) { return key; }
R2_HD uint64_t key_of(uint64_t key) { return key; }
// In the order of |w|, NaN last.
template <class T>
R2_HD Key<T> key_of(T w) {
  return Key<T>(bit_cast<Key<T>>(w) << 1);
}
template <class T>
R2_HD T value_of(Key<T> key) {
  return bit_cast<T>(Key<T>(key >> 1));
}

// How many keys are below `low`; those between, ends included, are added to `keys`.
template <class T>
int64_t split(const T* w, int64_t n, Key<T> low, Key<T> high, Key<T>* keys, int64_t* found) {
  int64_t below = 0, i = 0, at = *found;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    constexpr int sign = std::is_same<T, float>::value;
    const __m512i least = _mm512_set1_epi32(low), most = _mm512_set1_epi32(high);
    for (; i + 16 <= n; i += 16) {
      __m512i key = _mm512_slli_epi32(_mm512_loadu_si512(w + i), sign);
      __mmask16 under = _mm512_cmplt_epu32_mask(key, least), inside = _mm512_mask_cmple_epu32_mask(~under, key, most);
      _mm512_storeu_si512(keys + at, _mm512_maskz_compress_epi32(inside, key));
      below += __builtin_popcount(under), at += __builtin_popcount(inside);
    }
  }
#endif
  for (; i < n; ++i) {
    Key<T> key = key_of(w[i]);
    keys[at] = key;
    below += key < low, at += key >= low && key <= high;
  }
  *found = at;
  return below;
}

// Sets `key` where it is found among those between two that a sample gives: one pass over memory. False where they are
// too many or too few.
template <class T>
bool select_by_sample(const T* w, int64_t n, int64_t place, int threads, Key<T>* key) {
  constexpr int64_t size = 1024;
  constexpr double deviations = 3.5;
  std::vector<Key<T>> sample(size);
  for (int64_t i = 0; i < size; ++i) sample[i] = key_of(w[(2 * i + 1) * n / (2 * size)]);
  const double part = double(place) / n, centre = part * size,
               margin = deviations * std::sqrt(size * part * (1 - part)) + 2;
  const int64_t from = int64_t(centre - margin), to = int64_t(centre + margin) + 1;
  Key<T> low = 0, high = ~Key<T>(0);
  if (from >= 0) {
    std::nth_element(sample.begin(), sample.begin() + from, sample.end());
    low = sample[from];
  }
  if (to < size) {
    std::nth_element(sample.begin() + std::max<int64_t>(from, 0), sample.begin() + to, sample.end());
    high = sample[to];
  }
  const int64_t room = n / threads / 3;
  struct Share {
    std::unique_ptr<Key<T>[]> keys;
    int64_t below = 0, found = 0;
  };
  std::vector<Share> shares(threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int share = 0; share < threads; ++share) {
    Share& own = shares[share];
    own.keys.reset(new Key<T>[room + 2 * kGroup]);
    const int64_t begin = n * share / threads, end = n * (share + 1) / threads;
    for (int64_t i = begin; i < end && own.found <= room; i += kGroup)
      own.below += split(w + i, std::min<int64_t>(kGroup, end - i), low, high, own.keys.get(), &own.found);
  }
  int64_t below = 0, found = 0;
  for (const Share& share : shares) {
    if (share.found > room) return false;
    below += share.below, found += share.found;
  }
  if (place < below || place >= below + found) return false;
  std::vector<Key<T>> all;
  all.reserve(found);
  for (const Share& share : shares) all.insert(all.end(), share.keys.get(), share.keys.get() + share.found);
  place -= below;
  if (found > kSelect && found < n && select_by_sample(all.data(), found, place, 1, key)) return true;
  std::nth_element(all.begin(), all.begin() + place, all.end());
  *key = all[place];
  return true;
}

template <class T>
Key<T> select(const T* w, int64_t n, int64_t place) {
  std::vector<Key<T>> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(w[i]);
  std::nth_element(keys.begin(), keys.begin() + place, keys.end());
  return keys[place];
}

// The digit below `shift + 16`, of the weights whose key begins with `prefix`.
template <class T>
void count_digits(const T* w, int64_t n, int shift, Key<T> prefix, uint32_t* even, uint32_t* odd) {
  constexpr int width = 8 * sizeof(T), group = 32;
  if (shift + 16 == width) {
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      __builtin_prefetch(w + i + 1024);
      ++even[key_of(w[i]) >> shift], ++odd[key_of(w[i + 1]) >> shift];
    }
    if (i < n) ++even[key_of(w[i]) >> shift];
    return;
  }
  if constexpr (width > 16) {
    const int above = shift + 16;
    auto count = [&](T one) {
      if (key_of(one) >> above == prefix) ++even[key_of(one) >> shift & (kDigits - 1)];
    };
    int64_t i = 0;
    for (; i + group <= n; i += group) {
      Key<T> any = 0;
      for (int j = 0; j < group; ++j) any |= key_of(w[i + j]) >> above == prefix ? 1 : 0;
      if (any)
        for (int j = 0; j < group; ++j) count(w[i + j]);
    }
    for (; i < n; ++i) count(w[i]);
  }
}

template <class T>
Key<T> select_by_digits(const T* w, int64_t n, int64_t place, int threads, std::vector<uint32_t>& counts) {
  Key<T> prefix = 0;
  for (int shift = 8 * sizeof(T) - 16; shift >= 0; shift -= 16) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int share = 0; share < threads; ++share) {
        uint32_t* even = counts.data() + int64_t(share) * 2 * kDigits;
        std::fill(even, even + 2 * kDigits, 0);
        const int64_t begin = n * share / threads, end = n * (share + 1) / threads;
        count_digits(w + begin, end - begin, shift, prefix, even, even + kDigits);
      }
    }
    int64_t digit = -1, before = 0, here = 0;
    do {
      before += here, here = 0, ++digit;
      for (int table = 0; table < 2 * threads; ++table) here += counts[int64_t(table) * kDigits + digit];
    } while (before + here <= place);
    place -= before;
    prefix = Key<T>((sizeof(T) > 2 ? uint64_t(prefix) << 16 : 0) | uint64_t(digit));
  }
  return prefix;
}

template <class T>
Key<T> select_large(const T* w, int64_t n, int64_t place, int threads, std::vector<uint32_t>& counts) {
  Key<T> key = 0;
  if (sizeof(T) > 2 && select_by_sample(w, n, place, threads, &key)) return key;
  counts.resize(int64_t(threads) * 2 * kDigits);
  return select_by_digits(w, n, place, threads, counts);
}

template <class T>
void rank_tensors(const List& list, const Rank& r, int threads) {
  using A = Acc<T>;
  auto weights = [&](int64_t t) { return reinterpret_cast<const T*>(list.pointers[t]); };
  auto put = [&](int64_t t, Key<T> key) { static_cast<A*>(r.theta)[t] = widen(value_of<T>(key)); };
  auto is_small = [&](int64_t t) { return tensor_of(list, t).rows <= kSelect; };
  threads = threads_for(list, threads);
  bool large = false;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(|| : large)
  for (int64_t t = 0; t < list.count; ++t) {
    if (r.rank[t] < 1) {
      static_cast<A*>(r.theta)[t] = A(NAN);
    } else if (is_small(t)) {
      put(t, select(weights(t), tensor_of(list, t).rows, r.rank[t] - 1));
    } else {
      large = true;
    }
  }
  if (!large) return;
  std::vector<uint32_t> counts;
  for (int64_t t = 0; t < list.count; ++t)
    if (r.rank[t] >= 1 && !is_small(t))
      put(t, select_large(weights(t), tensor_of(list, t).rows, r.rank[t] - 1, threads, counts));
}

void rank(const List& list, const Rank& r, int threads) {
  with_type(list.dtype, [&](auto like) { rank_tensors<decltype(like)>(list, r, threads); });
}

// Counts of a digit, of keys that begin with a prefix; behind them those of the other keys.
template <class T>
void count_strip(const T* w, int64_t n, int shift, bool first, Key<T> prefix, uint32_t (*counts)[2 * kRadix]) {
  alignas(64) uint16_t at[kStrip];  // written down first, which the compiler does in vectors
  const int above = first ? 0 : shift + 8;
  for (int64_t i = 0; i < n; ++i) {
    const Key<T> key = Key<T>(key_of(w[i]) >> 1);
    const bool counted = first | (Key<T>(key >> above) == prefix);
    at[i] = uint16_t((key >> shift & (kRadix - 1)) | (counted ? 0 : kRadix));
  }
  int64_t i = 0;
  for (; i + kTables <= n; i += kTables)
    for (int k = 0; k < kTables; ++k) ++counts[k][at[i + k]];
  for (; i < n; ++i) ++counts[0][at[i]];
}

template <class T>
void count_places(const List& list, const Digits& d, int threads) {
  const bool first = d.place == 0;
  const int shift = 8 * (int(sizeof(T)) - 1 - d.place);
  threads = threads_for(list, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t total[kRadix] = {}, tensor = 0;
    auto add = [&] {
      int64_t* all = d.counts + tensor * kRadix;
      for (int b = 0; b < kRadix; ++b) {
        if (total[b] == 0) continue;
#pragma omp atomic
        all[b] += total[b];
        total[b] = 0;
      }
    };
#pragma omp for schedule(static)
    for (int64_t i = 0; i < list.chunks; ++i) {
      const Chunk c = chunk_at(list, i);
      if (c.tensor != tensor) add(), tensor = c.tensor;
      const T* w = reinterpret_cast<const T*>(list.pointers[tensor]) + c.row;
      uint32_t counts[kTables][2 * kRadix] = {};
      for (int64_t begin = 0; begin < c.n; begin += kStrip)
        count_strip(w + begin, std::min<int64_t>(kStrip, c.n - begin), shift, first, Key<T>(d.prefix[tensor]), counts);
      for (int k = 0; k < kTables; ++k)
        for (int b = 0; b < kRadix; ++b) total[b] += counts[k][b];
    }
    add();
  }
}

void digits(const List& list, const Digits& d, int threads) {
  with_type(list.dtype, [&](auto like) { count_places<decltype(like)>(list, d, threads); });
}

}  // namespace R2_ISA
}  // namespace r2
