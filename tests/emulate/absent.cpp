// csrc/bindings.cpp binds both halves of the extension; the CPU's is not built here.
#include "cpu/kernels.h"

namespace r2::cpu {

#define R2_ABSENT(isa)                  \
  namespace isa {                       \
  const RangeLosses range_losses = {};  \
  const Regularizers regularizers = {}; \
  const Quantizers quantizers = {};     \
  const Dkm dkm = {};                   \
  const KMeans kmeans = {};             \
  const TablePasses tables = {};        \
  }
R2_ABSENT(portable)
#if defined(__x86_64__)
R2_ABSENT(avx2)
R2_ABSENT(avx512)
#endif

}  // namespace r2::cpu
