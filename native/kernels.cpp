#include "kernels.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace twostroke {

KvElement parse_kv_element(const std::string& name) {
  if (name == "f32") return KvElement::f32;
  if (name == "f16") return KvElement::f16;
  if (name == "int8") return KvElement::int8;
  throw std::invalid_argument("unknown KV element '" + name + "': there are f32, f16, int8");
}

const Kernels& get_kernels(const char* name) {
  const std::string wanted = name;
  std::string known = "auto, portable";
#if defined(TWOSTROKE_X86)
  known += ", avx2";
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
  if (has_avx512) {
    known += ", avx512";
    if (wanted == "avx512" || wanted == "auto") return get_avx512_kernels();
  }
  if (wanted == "avx2" || wanted == "auto") return get_avx2_kernels();
#endif
  if (wanted == "portable" || wanted == "auto") return get_portable_kernels();
  throw std::invalid_argument("unknown kernels '" + wanted + "': this processor has " + known);
}

}  // namespace twostroke
