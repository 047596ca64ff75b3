// Several regularizers from one read, and the rank of a magnitude: cpu/regularizers_terms.cpp and
// cpu/regularizers_rank.cpp.
#pragma once
#include "../losses.h"

namespace r2 {
inline namespace R2_ISA {

void terms_forward(const List& list, const Terms<Forward>& terms, int threads);
void terms_backward(const List& list, const Terms<Backward>& terms, int threads);
void rank(const List& list, const Rank& r, int threads);

}  // namespace R2_ISA
}  // namespace r2
