// Sixteen lanes of float, int32 or packed bytes, for one instruction set at a time.
//
// Included by each isa_*.cpp after it defines TS_AVX512, TS_AVX2 or neither, and TS_ISA, the
// namespace everything lives in. All three versions round alike, operation for operation, so a
// kernel written against these types gives the same bits on every machine:
//   F   16 floats       fma is always fused
//   B   64 bytes        weights: 16 lanes of 4 consecutive inputs, unsigned
//   Dot 16 int32 sums   of weight bytes times four broadcast signed bytes; exact
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "half.h"

#if defined(TS_AVX512) || defined(TS_AVX2)
#include <immintrin.h>
#endif

namespace twostroke::TS_ISA {

inline uint32_t load_u32(const void* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

#if defined(TS_AVX512)
#include "simd_avx512.inl"
#elif defined(TS_AVX2)
#include "simd_avx2.inl"
#else
#include "simd_portable.inl"
#endif

// e^x to about one unit in the last place (Cody-Waite reduction, degree-6 polynomial). Below -87
// the answer is 0, above 88 it is e^88; NaN gives 0.
inline F exp16(F x) {
  const F low = F::set(-87.0f);
  const F clamped = min(max(x, low), F::set(88.0f));
  const F magic = F::set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = fma(clamped, F::set(1.44269504088896341f), magic);
  const F n = shifted - magic;
  F r = fma(n, F::set(-0.693359375f), clamped);
  r = fma(n, F::set(2.12194440e-4f), r);
  F p = F::set(1.9875691500e-4f);
  p = fma(p, r, F::set(1.3981999507e-3f));
  p = fma(p, r, F::set(8.3334519073e-3f));
  p = fma(p, r, F::set(4.1665795894e-2f));
  p = fma(p, r, F::set(1.6666665459e-1f));
  p = fma(p, r, F::set(5.0000001201e-1f));
  p = fma(p, r * r, r) + F::set(1.0f);
  return select_greater(x, low, scale_by_power(p, shifted), F::set(0.0f));
}

// 2^x for x <= 0 to about two units in the last place (degree-5 polynomial, exact at integers).
// Below -126 the answer is between 0 and 2^-126, at -127 and below it is 0; NaN gives 0.
inline F exp2_16(F x) {
  const F clamped = max(x, F::set(-127.0f));
  const F magic = F::set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = clamped + magic;
  const F r = clamped - (shifted - magic);
  F p = F::set(1.326472731307149e-3f);
  p = fma(p, r, F::set(9.671512991189957e-3f));
  p = fma(p, r, F::set(5.550733581185341e-2f));
  p = fma(p, r, F::set(2.402224242687225e-1f));
  p = fma(p, r, F::set(6.931470036506653e-1f));
  return scale_by_power(fma(p, r, F::set(1.0f)), shifted);
}

}  // namespace twostroke::TS_ISA
