// The standard deviation of a sample of a tensor: the unit that an exponent is measured in.
#pragma once
#include "arithmetic.h"

namespace r2 {
inline namespace R2_ISA {

// A small tensor whole, or one run of neighbours out of each of as many parts, at a place that wanders by the golden
// ratio: at equal distances a matrix would give some of its columns. Elements are counted in memory.
struct Sample {
  static constexpr int64_t kNumbers = 16384, kRun = 16, kRuns = kNumbers / kRun;
  int64_t size, part;  // numbers; runs in a part

  R2_HD explicit Sample(int64_t numel)
      : size(numel < 2 * kNumbers ? numel : kNumbers), part(size == numel ? 0 : numel / kRun / kRuns) {}
  // the element where run i begins
  R2_HD int64_t run(int64_t i) const {
    return part ? (i * part + ((i * 40503 & 0xffff) * part >> 16)) * kRun : i * kRun;
  }

  // from the sums of what the numbers are above one of them, and of its squares
  R2_HD double deviation(double sum, double squares) const {
    if (size < 2) return sum;  // 0, or NaN
    const double variance = (squares - sum * sum / size) / (size - 1);
    return variance <= 0 ? 0 : sqrt(variance);
  }
};

}  // namespace R2_ISA
}  // namespace r2
