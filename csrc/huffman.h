// Huffman codes in blocks that are coded on their own, each from a byte on; the first bit is the lowest of the first
// byte. The code words and the table for decoding are made in r2kernels/files/huffman.py.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace r2::codes {

constexpr int kLongest = 11;  // bits of a code word: the table of all that can come next fits the fastest cache
constexpr int kAtOnce = 5;    // symbols of an entry of that table

// What was wrong with the input. Nothing is read or written outside of the arrays in any case.
enum Status : int { kFine, kBadCode, kBadOffset, kTooShort, kTooLong };

// A symbol's code word, its first bit lowest, and its length; length 0: the symbol has none.
struct Words {
  const uint16_t* words;   // (256,)
  const uint8_t* lengths;  // (256,)
};

// A stream of codes cut into blocks of `block` (the last may have fewer). offsets: (blocks + 1,), the byte at which
// each block starts and ends.
struct Blocks {
  int64_t rows, block;
  int64_t count() const { return (rows + block - 1) / block; }
  int64_t first(int64_t b) const { return b * block; }
  int64_t size(int64_t b) const { return std::min(block, rows - b * block); }

  // The first thing wrong that run(block) reports of any block.
  template <class Run>
  int all(int threads, Run run) const {
    std::atomic<int> status{kFine};
    int64_t blocks = count();
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++)
      if (int found = run(b)) status.store(found, std::memory_order_relaxed);
    return status.load();
  }
};

// lengths: (256,); bytes: (blocks,), what each will take
inline int coded_sizes(const uint8_t* codes, const Blocks& blocks, const uint8_t* lengths, int32_t* bytes,
                       int threads) {
  return blocks.all(threads, [&](int64_t b) -> int {
    const uint8_t* from = codes + blocks.first(b);
    int64_t bits = 0, n = blocks.size(b);
    bool missing = false;
    for (int64_t i = 0; i < n; i++) bits += lengths[from[i]], missing |= !lengths[from[i]];
    bytes[b] = int32_t((bits + 7) / 8);
    return missing ? kBadCode : kFine;
  });
}

inline int encode(const uint8_t* codes, const Blocks& blocks, const Words& words, const int64_t* offsets, uint8_t* out,
                  int threads) {
  return blocks.all(threads, [&](int64_t b) -> int {
    const uint8_t *from = codes + blocks.first(b), *last = from + blocks.size(b);
    uint8_t *to = out + offsets[b], *end = out + offsets[b + 1];
    uint64_t pending = 0;
    int held = 0;
    auto take = [&](uint8_t code) { pending |= uint64_t(words.words[code]) << held, held += words.lengths[code]; };
    while (last - from >= 4 && end - to >= 8) {
      for (int j = 0; j < 4; j++) take(*from++);
      std::memcpy(to, &pending, 8);
      to += held >> 3, pending >>= held & ~7, held &= 7;
    }
    while (from < last || held > 0) {
      if (from < last) take(*from++);
      while (held >= 8 || (held > 0 && from == last)) {
        if (to == end) return kTooShort;
        *to++ = uint8_t(pending);
        pending >>= 8, held -= 8;
      }
    }
    return to == end ? kFine : kTooLong;
  });
}

// table: (2**kLongest,), by the next bits of the stream, from the lowest byte: up to kAtOnce symbols, the length of the
// first one's word, the length of all of them, their count; 0 where no word begins so. The stream has `bytes` bytes.
inline int decode(const uint8_t* stream, int64_t bytes, const int64_t* offsets, const Blocks& blocks,
                  const uint64_t* table, uint8_t* out, int threads) {
  constexpr uint64_t mask = (uint64_t(1) << kLongest) - 1;
  return blocks.all(threads, [&](int64_t b) -> int {
    if (offsets[b] < 0 || offsets[b + 1] < offsets[b] || offsets[b + 1] > bytes) return kBadOffset;
    const uint8_t *from = stream + offsets[b], *end = stream + offsets[b + 1];
    uint8_t *to = out + blocks.first(b), *last = to + blocks.size(b);
    int used = 0;  // bits of *from that are spent
    while (last - to >= 5 * 8 && end - from >= 8) {
      uint64_t next;
      std::memcpy(&next, from, 8);
      next >>= used;
      const uint8_t* before = to;
      for (int j = 0; j < 5; j++) {
        uint64_t entry = table[next & mask];
        std::memcpy(to, &entry, 8);
        int length = entry >> 48 & 15;
        to += std::min<int>(entry >> 56, kAtOnce), next >>= length, used += length;
      }
      if (to == before) return kBadCode;
      from += used >> 3, used &= 7;
    }
    while (to < last) {
      uint64_t next = 0;
      std::memcpy(&next, from, std::min<int64_t>(end - from, 8));
      uint64_t entry = table[next >> used & mask];
      if (!entry) return kBadCode;
      *to++ = uint8_t(entry);
      used += entry >> 40 & 15;
      if (used > 8 * (end - from)) return kTooShort;
      from += used >> 3, used &= 7;
    }
    return from + (used > 0) == end ? kFine : kTooLong;
  });
}

}  // namespace r2::codes
