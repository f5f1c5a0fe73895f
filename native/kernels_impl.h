// All kernels of one instruction set; included once by each isa_*.cpp.
#pragma once

#include "kernels.h"
#include "simd.h"

#include "rotate.h"
#include "attention.h"
#include "blocks.h"
#include "rows.h"
#include "write_kv.h"

#include "linear.h"

namespace twostroke::TS_ISA {

inline Kernels make_kernels(const char* name) {
  return {name, linear, gated_linear, quantise, rms_norm, gated,
          add,  rope,   write_kv,     attention, merge};
}

}  // namespace twostroke::TS_ISA
