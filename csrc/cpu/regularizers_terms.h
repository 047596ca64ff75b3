// Several regularizers from one read, the rank of a magnitude, and a sample: cpu/regularizers_terms.cpp,
// cpu/regularizers_rank.cpp and cpu/regularizers_sample.cpp.
#pragma once
#include "../losses.h"

namespace r2 {
inline namespace R2_ISA {

void terms_forward(const List& list, const Terms<Forward>& terms, int threads);
void terms_backward(const List& list, const Terms<Backward>& terms, int threads);
void rank(const List& list, const Rank& r, int threads);
void digits(const List& list, const Digits& d, int threads);
void sampled_std(const List& list, const Forward& f, int threads);

}  // namespace R2_ISA
}  // namespace r2
