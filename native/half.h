// Half-precision to float and back on any processor, rounding to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace twostroke {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {
    const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return std::bit_cast<float>(std::bit_cast<uint32_t>(tiny) | sign);
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(x);
  if (!(magnitude < 65520.0f)) {  // infinity, NaN, or rounds to infinity
    return static_cast<uint16_t>(sign | (magnitude != magnitude ? 0x7E00u : 0x7C00u));
  }
  if (magnitude < 6.103515625e-5f) {  // subnormal half: adding 0.5 rounds at 2^-24
    const uint32_t shifted = std::bit_cast<uint32_t>(magnitude + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3F000000u));
  }
  const uint32_t absolute = bits & 0x7FFFFFFFu;
  const uint32_t rounded = absolute + 0xFFFu + ((absolute >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace twostroke
