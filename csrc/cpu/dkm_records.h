// What a weight adds to the sums of its interval: a record of a few numbers, added by scalar code that vectors have
// laid out for it.
#pragma once
#include "dkm_intervals.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int kMostRecord = 8;

// What one thread works in.
template <class A>
struct Room {
  alignas(64) A w[kBlock], g[kBlock], count[kBlock], out[kBlock], records[kBlock * kMostRecord];
  alignas(64) Index<A> k[kBlock], order[kBlock];
};

// Records of R numbers lie in parts: of four, and at last of R % 4.
R2_HD constexpr int part_width(int R, int first) { return R - first < 4 ? R - first : 4; }

// Where weight i of a vector lies in each part, as `put_records` leaves them.
template <int R, class A>
R2_HD constexpr int place(int i) {
#if defined(__AVX2__)
  constexpr int n = lanes<Vec<A>>;
  if (sizeof(A) == 4) return R == 2 ? n / 2 * (i / 2 % 2) + i / 4 * 2 + i % 2 : n / 4 * (i % 4) + i / 4;
#endif
  return i;
}

#if defined(__AVX2__)
R2_HD Vec<float> permuted(Vec<float> v, Indices<float> from) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_permutexvar_ps(bit_cast<__m512i>(from), bit_cast<__m512>(v)));
#else
  return bit_cast<Vec<float>>(_mm256_permutevar8x32_ps(bit_cast<__m256>(v), bit_cast<__m256i>(from)));
#endif
}
#endif

// A vector of each of the numbers of the records of weights i, i + 1, ... of the block; `order` are their intervals.
template <int R, class A>
R2_HD void put_records(Vec<A>* v, int i, Room<A>& room) {
  constexpr int n = lanes<Vec<A>>;
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    Indices<A> from = {};
    for (int j = 0; j < n; ++j) from[place<R, A>(j)] = j;
    for (int first = 0; first < R; first += 4) {
      A* to = room.records + first * kBlock + i * part_width(R, first);
      if (R - first >= 4) {
        transpose_4x4(v + first);
        for (int m = 0; m < 4; ++m) store(to + m * n, v[first + m]);
      } else if (R == 2) {
        store(to, interleave_low(v[0], v[1])), store(to + n, interleave_high(v[0], v[1]));
      } else {
        store(to, permuted(v[first], from));
      }
    }
    store(reinterpret_cast<A*>(room.order) + i, permuted(load<Vec<A>>(reinterpret_cast<const A*>(room.k) + i), from));
    return;
  }
#endif
  for (int j = 0; j < n; ++j) {
    room.order[i + j] = room.k[i + j];
    for (int m = 0; m < R; ++m) room.records[m / 4 * 4 * kBlock + (i + j) * part_width(R, m / 4 * 4) + m % 4] = v[m][j];
  }
}

template <int kWidth, class A>
R2_HD void add_part(const A* from, double* to) {
  typedef A Few __attribute__((vector_size(kWidth * sizeof(A))));
  typedef double Wide __attribute__((vector_size(kWidth * 8)));
  if constexpr (kWidth == 1) {
    *to += double(*from);
  } else {
    Few x;
    Wide sum;
    std::memcpy(&x, from, sizeof(x)), std::memcpy(&sum, to, sizeof(sum));
    sum += __builtin_convertvector(x, Wide);
    std::memcpy(to, &sum, sizeof(sum));
  }
}

// Adds the records to the sums of their intervals, (room, kTurns, width) for each part. Neighbours take turns with
// kTurns copies, so that an addition need not wait for the last one.
template <int R, int kTurns, class A>
void add_records(const Room<A>& room, int n, double* sums, int64_t intervals) {
  for (int i = 0; i < n; i += kTurns)
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t at = int64_t(room.order[i + turn]) * kTurns + turn;
      add_part<part_width(R, 0)>(room.records + (i + turn) * part_width(R, 0), sums + at * part_width(R, 0));
      if constexpr (R > 4)
        add_part<part_width(R, 4)>(room.records + 4 * kBlock + (i + turn) * part_width(R, 4),
                                   sums + 4 * intervals * kTurns + at * part_width(R, 4));
    }
}

}  // namespace R2_ISA
}  // namespace r2
