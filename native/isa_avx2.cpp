// The kernels for one instruction set: see kernels_impl.h.
#define TS_AVX2 1
#define TS_ISA isa_avx2
#include "kernels_impl.h"

namespace twostroke {

const Kernels& get_avx2_kernels() {
  static const Kernels table = TS_ISA::make_kernels("avx2");
  return table;
}

}  // namespace twostroke
