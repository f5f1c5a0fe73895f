// The kernels for one instruction set: see kernels_impl.h.
#define TS_ISA isa_portable
#include "kernels_impl.h"

namespace twostroke {

const Kernels& get_portable_kernels() {
  static const Kernels table = TS_ISA::make_kernels("portable");
  return table;
}

}  // namespace twostroke
