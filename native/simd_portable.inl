// Plain C++, any processor. Included inside namespace twostroke::TS_ISA by simd.h.

struct F {
  float v[16];
  template <class Get>
  static F make(Get get) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = get(i);
    return r;
  }
  static F set(float x) {
    return make([x](int) { return x; });
  }
  static F load(const float* p) {
    return make([p](int i) { return p[i]; });
  }
  // Each of eight floats twice.
  static F load_twice(const float* p) {
    return make([p](int i) { return p[i / 2]; });
  }
  static F load_f16(const uint16_t* p) {
    return make([p](int i) { return half_to_float(p[i]); });
  }
  static F load_bf16(const uint16_t* p) {
    return make([p](int i) { return std::bit_cast<float>(static_cast<uint32_t>(p[i]) << 16); });
  }
  static F load_u8(const uint8_t* p) {
    return make([p](int i) { return static_cast<float>(p[i]); });
  }
  static F load_i8(const uint8_t* p) {
    return make([p](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
  }
  F swap_pairs() const {
    return make([this](int i) { return v[i ^ 1]; });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(v[i]);
  }
  // Rounds to nearest even and stores as signed bytes; |x| must be at most 127.
  void store_rounded_i8(int8_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(std::nearbyint(v[i]));
  }
};

inline F operator+(F a, F b) {
  return F::make([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(F a, F b) {
  return F::make([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(F a, F b) {
  return F::make([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(F a, F b) {
  return F::make([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(F a, F b, F c) {
  return F::make([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline F max(F a, F b) {
  return F::make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
  return F::make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F abs(F a) {
  return F::make([&](int i) { return std::fabs(a.v[i]); });
}
// Lanes 0, 2, 4 … with the other sign.
inline F negate_even(F a) {
  return F::make([&](int i) { return i % 2 == 0 ? -a.v[i] : a.v[i]; });
}
inline F select_greater(F a, F b, F yes, F no) {
  return F::make([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
}
// Lanes first <= lane < last are kept, the others become -infinity.
inline F keep_lanes(F a, int first, int last) {
  return F::make([&](int i) {
    return i >= first && i < last ? a.v[i] : -std::numeric_limits<float>::infinity();
  });
}
// p * 2^n, where `shifted` holds n in its low mantissa bits (see exp16).
inline F scale_by_power(F p, F shifted) {
  return F::make([&](int i) {
    const uint32_t n = std::bit_cast<uint32_t>(shifted.v[i]) << 23;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(p.v[i]) + n);
  });
}

inline float reduce_max(F x) {
  float best = x.v[0];
  for (int i = 1; i < 16; ++i) best = x.v[i] > best ? x.v[i] : best;
  return best;
}
// Adds lanes 8 apart, then 4, 2 and 1 apart.
inline float reduce_add(F x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  }
  return x.v[0];
}
// Sum of sixteen signed bytes.
inline int32_t sum_bytes(const int8_t* p) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += p[i];
  return sum;
}

struct B {
  uint8_t v[64];
  static B load(const uint8_t* p) {
    B r;
    std::memcpy(r.v, p, 64);
    return r;
  }
};

inline B low_nibbles(B x) {
  for (auto& byte : x.v) byte &= 15;
  return x;
}
inline B high_nibbles(B x) {
  for (auto& byte : x.v) byte >>= 4;
  return x;
}
// Adds 16 to byte i where bit i of the 64 bits at `bits` is set.
inline B add_bit_16(B x, const uint8_t* bits) {
  for (int i = 0; i < 64; ++i) {
    x.v[i] = static_cast<uint8_t>(x.v[i] | (((bits[i / 8] >> (i % 8)) & 1) << 4));
  }
  return x;
}
// Adds 16 times the two-bit field at bit 2*I of each byte of `high`.
template <int I>
inline B add_field_16(B x, B high) {
  for (int i = 0; i < 64; ++i) {
    x.v[i] = static_cast<uint8_t>(x.v[i] | (((high.v[i] >> (2 * I)) & 3) << 4));
  }
  return x;
}

// BITS: width of the unsigned weights; 8 means weight + 128.
template <int BITS>
struct Dot {
  int32_t sum[16];
  void start() { std::memset(sum, 0, sizeof sum); }
  void add(B w, uint32_t four) {
    int8_t a[4];
    std::memcpy(a, &four, 4);
    for (int i = 0; i < 64; ++i) sum[i / 4] += w.v[i] * a[i % 4];
  }
  // Sum of (weight - zero) * a, given the sum of a.
  F finish(int zero, int a_sum) const {
    const int offset = (BITS == 8 ? 128 : zero) * a_sum;
    return F::make([&](int i) { return static_cast<float>(sum[i] - offset); });
  }
};

constexpr int kUnpackTiles = 0;  // too few registers to unpack a block once for many rows
constexpr int kColumns = 1;  // columns whose sums for six rows fit the registers
