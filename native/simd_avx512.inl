// AVX-512 with VNNI. Included inside namespace twostroke::TS_ISA by simd.h.

struct F {
  __m512 v;
  static F set(float x) { return {_mm512_set1_ps(x)}; }
  static F load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // Each of eight floats twice.
  static F load_twice(const float* p) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return {_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p)))};
  }
  static F load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static F load_bf16(const uint16_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static F load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static F load_i8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  F swap_pairs() const { return {_mm512_permute_ps(v, 0xB1)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Rounds to nearest even and stores as signed bytes; |x| must be at most 127.
  void store_rounded_i8(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
};

inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
// Lanes 0, 2, 4 … with the other sign.
inline F negate_even(F a) {
  return {_mm512_xor_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000)))};
}
inline F select_greater(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
// Lanes first <= lane < last are kept, the others become -infinity.
inline F keep_lanes(F a, int first, int last) {
  const uint32_t mask = ((1u << last) - 1u) & ~((1u << first) - 1u);
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask),
                               _mm512_set1_ps(-std::numeric_limits<float>::infinity()), a.v)};
}
// p * 2^n, where `shifted` holds n in its low mantissa bits (see exp16).
inline F scale_by_power(F p, F shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), n))};
}

inline float reduce_max(F x) { return _mm512_reduce_max_ps(x.v); }
// Adds lanes 8 apart, then 4, 2 and 1 apart.
inline float reduce_add(F x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Sum of sixteen signed bytes.
inline int32_t sum_bytes(const int8_t* p) {
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_reduce_add_epi32(wide);
}

struct B {
  __m512i v;
  static B load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
};

inline B low_nibbles(B x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline B high_nibbles(B x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
// Adds 16 to byte i where bit i of the 64 bits at `bits` is set.
inline B add_bit_16(B x, const uint8_t* bits) {
  uint64_t mask;
  std::memcpy(&mask, bits, 8);
  return {_mm512_mask_add_epi8(x.v, mask, x.v, _mm512_set1_epi8(16))};
}
// Adds 16 times the two-bit field at bit 2*I of each byte of `high`.
template <int I>
inline B add_field_16(B x, B high) {
  const __m512i field = I < 2 ? _mm512_slli_epi16(high.v, I < 2 ? 4 - 2 * I : 0)
                              : _mm512_srli_epi16(high.v, I < 2 ? 0 : 2 * I - 4);
  return {_mm512_or_si512(x.v, _mm512_and_si512(field, _mm512_set1_epi8(0x30)))};
}

// BITS: width of the unsigned weights; 8 means weight + 128.
template <int BITS>
struct Dot {
  __m512i sum;
  void start() { sum = _mm512_setzero_si512(); }
  void add(B w, uint32_t four) {
    sum = _mm512_dpbusd_epi32(sum, w.v, _mm512_set1_epi32(static_cast<int>(four)));
  }
  // Sum of (weight - zero) * a, given the sum of a.
  F finish(int zero, int a_sum) const {
    const int offset = (BITS == 8 ? 128 : zero) * a_sum;
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(offset)))};
  }
};

constexpr int kUnpackTiles = 2;  // tiles of a block that are unpacked once for many rows
constexpr int kColumns = 4;  // columns whose sums for six rows fit the registers
