// AVX2 with FMA and F16C. Included inside namespace twostroke::TS_ISA by simd.h.

struct F {
  __m256 lo, hi;
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  // Each of eight floats twice.
  static F load_twice(const float* p) {
    const __m256 x = _mm256_loadu_ps(p);
    return {_mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
            _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
  }
  static F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static F load_bf16(const uint16_t* p) {
    const auto widen = [](const uint16_t* q) {
      const __m256i wide =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
      return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {widen(p), widen(p + 8)};
  }
  static F load_u8(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
  }
  static F load_i8(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
  }
  F swap_pairs() const { return {_mm256_permute_ps(lo, 0xB1), _mm256_permute_ps(hi, 0xB1)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store_f16(uint16_t* p) const {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(lo, mode));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(hi, mode));
  }
  // Rounds to nearest even and stores as signed bytes; |x| must be at most 127.
  void store_rounded_i8(int8_t* p) const {
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(lo), _mm256_cvtps_epi32(hi)), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words),
                                     _mm256_extracti128_si256(words, 1)));
  }
};

inline F operator+(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F abs(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
// Lanes 0, 2, 4 … with the other sign.
inline F negate_even(F a) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
inline F select_greater(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
// Lanes first <= lane < last are kept, the others become -infinity.
inline F keep_lanes(F a, int first, int last) {
  const __m256 minus = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  const auto keep = [&](__m256 x, __m256i lane) {
    const __m256i inside =
        _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1)),
                         _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
    return _mm256_blendv_ps(minus, x, _mm256_castsi256_ps(inside));
  };
  return {keep(a.lo, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          keep(a.hi, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
// p * 2^n, where `shifted` holds n in its low mantissa bits (see exp16).
inline F scale_by_power(F p, F shifted) {
  const auto scale = [](__m256 x, __m256 s) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(s), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n));
  };
  return {scale(p.lo, shifted.lo), scale(p.hi, shifted.hi)};
}

inline float reduce_max(F x) {
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// Adds lanes 8 apart, then 4, 2 and 1 apart.
inline float reduce_add(F x) {
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Sum of sixteen signed bytes.
inline int32_t sum_bytes(const int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i biased = _mm_sad_epu8(_mm_xor_si128(x, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(biased) + _mm_extract_epi16(biased, 4) - 16 * 128;
}

struct B {
  __m256i lo, hi;
  static B load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
};

inline B low_nibbles(B x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.lo, mask), _mm256_and_si256(x.hi, mask)};
}
inline B high_nibbles(B x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.lo, 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(x.hi, 4), mask)};
}
// Adds 16 to byte i where bit i of the 64 bits at `bits` is set.
inline B add_bit_16(B x, const uint8_t* bits) {
  const auto spread = [](uint32_t mask) {
    const __m256i bytes = _mm256_shuffle_epi8(
        _mm256_set1_epi32(static_cast<int>(mask)),
        _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                         2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return _mm256_and_si256(set, _mm256_set1_epi8(16));
  };
  return {_mm256_or_si256(x.lo, spread(load_u32(bits))),
          _mm256_or_si256(x.hi, spread(load_u32(bits + 4)))};
}
// Adds 16 times the two-bit field at bit 2*I of each byte of `high`.
template <int I>
inline B add_field_16(B x, B high) {
  const auto field = [](__m256i h) {
    const __m256i moved = I < 2 ? _mm256_slli_epi16(h, I < 2 ? 4 - 2 * I : 0)
                                : _mm256_srli_epi16(h, I < 2 ? 0 : 2 * I - 4);
    return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
  };
  return {_mm256_or_si256(x.lo, field(high.lo)), _mm256_or_si256(x.hi, field(high.hi))};
}

// BITS: width of the unsigned weights; 8 means weight + 128. Products of narrow weights stay in
// 16 bits for as many additions as cannot overflow (pairs are at most 2 * (2^BITS - 1) * 127).
template <int BITS>
struct Dot {
  static constexpr int kAdds = 32767 / (2 * ((1 << BITS) - 1) * 127);
  __m256i sum_lo, sum_hi;      // 32 bits
  __m256i pairs_lo, pairs_hi;  // 16 bits
  int pending;
  void start() {
    sum_lo = sum_hi = pairs_lo = pairs_hi = _mm256_setzero_si256();
    pending = 0;
  }
  void widen() {
    const __m256i ones = _mm256_set1_epi16(1);
    sum_lo = _mm256_add_epi32(sum_lo, _mm256_madd_epi16(pairs_lo, ones));
    sum_hi = _mm256_add_epi32(sum_hi, _mm256_madd_epi16(pairs_hi, ones));
    pairs_lo = pairs_hi = _mm256_setzero_si256();
    pending = 0;
  }
  void add(B w, uint32_t four) {
    const __m256i a = _mm256_set1_epi32(static_cast<int>(four));
    if constexpr (BITS == 8) {  // a pair may not fit: move the sign to a, so |w| <= 128
      const __m256i bias = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
      const __m256i lo = _mm256_xor_si256(w.lo, bias), hi = _mm256_xor_si256(w.hi, bias);
      const __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(lo), _mm256_sign_epi8(a, lo));
      const __m256i q = _mm256_maddubs_epi16(_mm256_abs_epi8(hi), _mm256_sign_epi8(a, hi));
      sum_lo = _mm256_add_epi32(sum_lo, _mm256_madd_epi16(p, ones));
      sum_hi = _mm256_add_epi32(sum_hi, _mm256_madd_epi16(q, ones));
    } else {
      if (pending == kAdds) widen();
      pairs_lo = _mm256_add_epi16(pairs_lo, _mm256_maddubs_epi16(w.lo, a));
      pairs_hi = _mm256_add_epi16(pairs_hi, _mm256_maddubs_epi16(w.hi, a));
      ++pending;
    }
  }
  // Sum of (weight - zero) * a, given the sum of a.
  F finish(int zero, int a_sum) {
    if constexpr (BITS == 8) {
      return {_mm256_cvtepi32_ps(sum_lo), _mm256_cvtepi32_ps(sum_hi)};
    } else {
      widen();
      const __m256i offset = _mm256_set1_epi32(zero * a_sum);
      return {_mm256_cvtepi32_ps(_mm256_sub_epi32(sum_lo, offset)),
              _mm256_cvtepi32_ps(_mm256_sub_epi32(sum_hi, offset))};
    }
  }
};

constexpr int kUnpackTiles = 0;  // too few registers to unpack a block once for many rows
constexpr int kColumns = 1;  // columns whose sums for six rows fit the registers
