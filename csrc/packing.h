// Codes of 1 to 8 bits, packed: the first code is in the lowest bits of the first byte.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace r2::codes {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "eight codes are packed in one 64-bit number");

constexpr int64_t kChunk = 1 << 16;  // codes of a task; a multiple of 8, so that a task starts at a byte

// `rows` codes, each group of `each` of them (the last may have fewer) packed on its own, from a byte on.
struct Groups {
  int64_t rows, each;
  int bits;

  int64_t chunks() const { return (each + kChunk - 1) / kChunk; }  // of a group
  int64_t tasks() const { return (rows + each - 1) / each * chunks(); }
  int64_t bytes(int64_t n) const { return (n * bits + 7) / 8; }

  // run(first code, count, first byte) of task i
  template <class Run>
  void task(int64_t i, Run run) const {
    int64_t group = i / chunks(), within = i % chunks() * kChunk, first = group * each + within,
            end = std::min((group + 1) * each, rows);
    if (first < end) run(first, std::min(end - first, kChunk), group * bytes(each) + within / 8 * bits);
  }

  template <class Run>
  void all(int threads, Run run) const {
    if (rows <= 0) return;
    int64_t count = tasks();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) task(i, run);
  }
};

constexpr uint64_t fields(int width, int bits) {  // `bits` ones at the bottom of every `width` bits
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += width) mask |= ((uint64_t(1) << bits) - 1) << at;
  return mask;
}

// Eight codes, from a byte each to Bits each, and back: neighbours are joined three times.
template <int Bits>
uint64_t joined(uint64_t x) {
  x = (x & fields(16, Bits)) | (x >> (8 - Bits) & fields(16, Bits) << Bits);
  x = (x & fields(32, 2 * Bits)) | (x >> (16 - 2 * Bits) & fields(32, 2 * Bits) << 2 * Bits);
  return (x & fields(64, 4 * Bits)) | (x >> (32 - 4 * Bits) & fields(64, 4 * Bits) << 4 * Bits);
}

template <int Bits>
uint64_t parted(uint64_t x) {
  x = (x & fields(64, 4 * Bits)) | (x & fields(64, 4 * Bits) << 4 * Bits) << (32 - 4 * Bits);
  x = (x & fields(32, 2 * Bits)) | (x & fields(32, 2 * Bits) << 2 * Bits) << (16 - 2 * Bits);
  return (x & fields(16, Bits)) | (x & fields(16, Bits) << Bits) << (8 - Bits);
}

template <int Bits>
void pack_run(const uint8_t* codes, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, out += Bits) {
    uint64_t x;
    std::memcpy(&x, codes + i, 8);
    x = joined<Bits>(x & fields(8, Bits));
    std::memcpy(out, &x, Bits);
  }
  if (i == n) return;
  uint64_t x = 0;
  std::memcpy(&x, codes + i, n - i);
  x = joined<Bits>(x & fields(8, Bits));
  std::memcpy(out, &x, ((n - i) * Bits + 7) / 8);
}

// Calls run(eight codes of Bits, how many of them count) along n packed codes. A load of eight bytes is much faster
// than one of three, where it stays within the codes.
template <int Bits, class Run>
void along(const uint8_t* packed, int64_t n, Run run) {
  const uint8_t* end = packed + (n * Bits + 7) / 8;
  uint64_t x;
  for (; n >= 8 && end - packed >= 8; n -= 8, packed += Bits)
    std::memcpy(&x, packed, 8), run(x, std::integral_constant<int, 8>());
  for (; n > 0; n -= 8, packed += Bits)
    x = 0, std::memcpy(&x, packed, std::min<int64_t>(end - packed, 8)), run(x, int(std::min<int64_t>(n, 8)));
}

template <int Bits>
void unpack_run(const uint8_t* packed, int64_t n, uint8_t* out) {
  along<Bits>(packed, n, [&](uint64_t x, auto count) {
    x = parted<Bits>(x);
    std::memcpy(out, &x, count);
    out += 8;
  });
}

// Rows of a table, of Size bytes each (0: of `size`), in the order of the codes. Bits of a code that `mask` lacks do
// not count.
template <int Bits, int Size>
void look_up_run(const uint8_t* packed, int64_t n, const char* table, uint64_t mask, int64_t size, char* out) {
  const int64_t row = Size ? Size : size;
  along<Bits>(packed, n, [&](uint64_t x, auto count) {
    for (int j = 0; j < count; j++, x >>= Bits, out += row) std::memcpy(out, table + (x & mask) * row, row);
  });
}

// run(std::integral_constant of 1 .. 8)
template <class Run>
void with_bits(int bits, Run run) {
  switch (bits) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
    case 7: return run(std::integral_constant<int, 7>());
    case 8: return run(std::integral_constant<int, 8>());
  }
}

inline void pack(const uint8_t* codes, const Groups& groups, uint8_t* out, int threads) {
  with_bits(groups.bits, [&](auto bits) {
    groups.all(threads, [&](int64_t first, int64_t n, int64_t byte) { pack_run<bits>(codes + first, n, out + byte); });
  });
}

inline void unpack(const uint8_t* packed, const Groups& groups, uint8_t* out, int threads) {
  with_bits(groups.bits, [&](auto bits) {
    groups.all(threads,
               [&](int64_t first, int64_t n, int64_t byte) { unpack_run<bits>(packed + byte, n, out + first); });
  });
}

// tables: for each group 2**index_bits rows of `size` bytes; index_bits <= bits
inline void look_up(const uint8_t* packed, const Groups& groups, const char* tables, int index_bits, int64_t size,
                    char* out, int threads) {
  const uint64_t mask = ((uint64_t(1) << std::min(index_bits, groups.bits)) - 1);
  with_bits(groups.bits, [&](auto bits) {
    auto run = [&](auto known) {
      groups.all(threads, [&](int64_t first, int64_t n, int64_t byte) {
        look_up_run<bits, known>(packed + byte, n, tables + (first / groups.each << index_bits) * size, mask, size,
                                 out + first * size);
      });
    };
    switch (size) {
      case 2: return run(std::integral_constant<int, 2>());
      case 4: return run(std::integral_constant<int, 4>());
      case 8: return run(std::integral_constant<int, 8>());
      case 16: return run(std::integral_constant<int, 16>());
      default: return run(std::integral_constant<int, 0>());
    }
  });
}

}  // namespace r2::codes
