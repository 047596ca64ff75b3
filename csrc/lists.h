// Where the tensors of a list are told of, and where they lie.
#pragma once
#include "arithmetic.h"

namespace r2 {
inline namespace R2_ISA {

R2_HD int64_t owner_of(const List& list, int64_t chunk) { return list.count == 1 ? 0 : list.owner[chunk]; }
// By value: the address of a kernel's argument would have it copied to local memory.
R2_HD Tensor tensor_of(const List& list, int64_t t) { return list.count == 1 ? list.alone : list.tensors[t]; }

}  // namespace R2_ISA
}  // namespace r2
