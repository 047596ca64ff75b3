// Tensors of 16-bit scalars as their values, of which there are at most 65,536: each with how many weights have it, the
// sum of their gradients, and the way back.
#include "dkm_passes.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

constexpr int64_t kSlice = 1 << 18;  // weights whose gradients are summed together; there are no more than kMostSlices,
                                     // whatever the number of threads
constexpr int kMostSlices = 16;

// The code at a place in the order of values.
inline uint16_t ordered(uint32_t at) { return uint16_t(at & 0x8000 ? at & 0x7fff : ~at); }

inline void count_codes(const uint16_t* w, int64_t n, uint32_t* counts) {
  std::memset(counts, 0, kHalfValues * sizeof(*counts));
  for (int64_t i = 0; i < n; ++i) ++counts[w[i]];
}

template <class T>
void list_values(const uint32_t* counts, int tables, const Values& v, int64_t tensor) {
  const int64_t at = tensor * kHalfValues;
  int64_t slot = 0;
  for (uint32_t i = 0; i < kHalfValues; ++i) {
    const uint16_t code = ordered(i);
    uint32_t n = 0;
    for (int t = 0; t < tables; ++t) n += counts[int64_t(t) * kHalfValues + code];
    if (n == 0) continue;
    v.slots[at + code] = uint16_t(slot), v.values[at + slot] = widen(T{code}), v.counts[at + slot] = float(n);
    ++slot;
  }
  v.sizes[tensor] = slot;
}

template <class T>
void collect(const List& list, const Values& v, int threads) {
  const auto weights = [&](int64_t t) { return address<const uint16_t>(list.pointers, t); };
  const bool many = list.count >= threads;
  const AlignedMemory tables((many ? 1 : threads) * kHalfValues * int64_t(sizeof(uint32_t)));
  if (many) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const AlignedMemory own(kHalfValues * int64_t(sizeof(uint32_t)));
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < list.count; ++t) {
        count_codes(weights(t), tensor_of(list, t).rows, own.as<uint32_t>());
        list_values<T>(own.as<uint32_t>(), 1, v, t);
      }
    }
    return;
  }
  for (int64_t t = 0; t < list.count; ++t) {
    const int64_t n = tensor_of(list, t).rows;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
      const int64_t begin = n * part / threads, end = n * (part + 1) / threads;
      count_codes(weights(t) + begin, end - begin, tables.as<uint32_t>() + int64_t(part) * kHalfValues);
    }
    list_values<T>(tables.as<uint32_t>(), threads, v, t);
  }
}

template <class T>
void sum_gradients(const List& list, const Values& v, int threads) {
  // slice i of all: (tensor, first weight, end), and where its sums lie
  struct Slice {
    int64_t tensor, begin, end, sums;
  };
  const AlignedMemory slices(list.count * kMostSlices * int64_t(sizeof(Slice)));
  int64_t count = 0, room = 0;
  for (int64_t t = 0; t < list.count; ++t) {
    const int64_t n = tensor_of(list, t).rows, wanted = (n + kSlice - 1) / kSlice,
                  parts = wanted < kMostSlices ? wanted : kMostSlices;
    for (int64_t p = 0; p < parts; ++p, room += v.sizes[t])
      slices.as<Slice>()[count++] = {t, n * p / parts, n * (p + 1) / parts, room};
  }
  const AlignedMemory memory(room * int64_t(sizeof(double)));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Slice& s = slices.as<Slice>()[i];
    const uint16_t *w = address<const uint16_t>(list.pointers, s.tensor), *slots = v.slots + s.tensor * kHalfValues;
    const T* g = address<const T>(v.grads, s.tensor);
    double* sums = memory.as<double>() + s.sums;
    for (int64_t j = 0; j < v.sizes[s.tensor]; ++j) sums[j] = 0;
    float block[1024];
    for (int64_t row = s.begin; row < s.end; row += 1024) {
      const int n = s.end - row < 1024 ? int(s.end - row) : 1024;
      const float* gs = widened(g + row, n, block);
      for (int j = 0; j < n; ++j) sums[slots[w[row + j]]] += double(gs[j]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Slice& s = slices.as<Slice>()[i];
    if (s.begin > 0) continue;
    for (int64_t j = 0; j < v.sizes[s.tensor]; ++j) {
      double total = 0;
      for (int64_t p = i; p < count && slices.as<Slice>()[p].tensor == s.tensor; ++p)
        total += memory.as<double>()[slices.as<Slice>()[p].sums + j];
      v.sums[s.tensor * kHalfValues + j] = float(total);
    }
  }
}

// target = shift, or factor g + shift, of the value of each weight
template <class T>
void look_up(const List& list, const Values& v, int threads) {
  for (int64_t t = 0; t < list.count; ++t)
    ask_for_huge_pages(reinterpret_cast<void*>(v.targets[t]), tensor_of(list, t).numel * sizeof(T));
  constexpr int block = 1024;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < list.chunks; ++i) {
    const RowChunk c(list, i);
    const uint16_t *w = address<const uint16_t>(list.pointers, c.tensor) + c.row,
                   *slots = v.slots + c.tensor * kHalfValues;
    const float *shift = address<const float>(v.shift, c.tensor), *factor = address<const float>(v.factor, c.tensor);
    const T* g = factor ? address<const T>(v.grads, c.tensor) + c.row : nullptr;
    T* out = address<T>(v.targets, c.tensor) + c.row;
    float a[block], b[block], gs[block];
    for (int64_t row = 0; row < c.n; row += block) {
      const int n = c.n - row < block ? int(c.n - row) : block;
      for (int j = 0; j < n; ++j) {
        const uint16_t slot = slots[w[row + j]];
        b[j] = shift[slot];
        if (factor) a[j] = factor[slot];
      }
      if (factor) {
        const float* from = widened(g + row, n, gs);
        for (int j = 0; j < n; ++j) b[j] += a[j] * from[j];
      }
      narrowed(b, n, out + row);
    }
  }
}

template <class F>
void with_half(const List& list, F f) {
  list.dtype == Dtype::bf16 ? f(bf16{}) : f(f16{});
}

void ValuePasses::collect(const List& list, const Values& v, int threads) {
  with_half(list, [&](auto half) { r2::R2_ISA::collect<decltype(half)>(list, v, threads); });
}
void ValuePasses::sum(const List& list, const Values& v, int threads) {
  with_half(list, [&](auto half) { sum_gradients<decltype(half)>(list, v, threads); });
}
void ValuePasses::look_up(const List& list, const Values& v, int threads) {
  with_half(list, [&](auto half) { r2::R2_ISA::look_up<decltype(half)>(list, v, threads); });
}

}  // namespace R2_ISA
}  // namespace r2
