// The kernels for one instruction set: see kernels_impl.h.
#define TS_AVX512 1
#define TS_ISA isa_avx512
#include "kernels_impl.h"

namespace twostroke {

const Kernels& get_avx512_kernels() {
  static const Kernels table = TS_ISA::make_kernels("avx512");
  return table;
}

}  // namespace twostroke
