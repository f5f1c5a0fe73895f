// How a packed block of 16 outputs and 32 inputs is taken apart, format by format (see pack.h).
#pragma once

namespace twostroke::TS_ISA {

template <Format FORMAT>
struct Traits;

// stride and header as in pack.h; BITS of an unsigned weight; ZERO is subtracted from it; HALVES:
// scales a block of 32; MIN: whether a minimum is added; SUPER: blocks that share outer scales.
template <int BITS_, int ZERO_, bool MIN_, int HEADER_, int STRIDE_, int QUANTS_, int SUPER_>
struct BlockTraits {
  static constexpr int BITS = BITS_, ZERO = ZERO_, HEADER = HEADER_, STRIDE = STRIDE_;
  static constexpr int QUANTS = QUANTS_, SUPER = SUPER_, UNIT = HEADER_ + SUPER_ * STRIDE_;
  static constexpr bool MIN = MIN_;
  static constexpr int HALVES = BITS_ == 6 ? 2 : 1;
};
template <> struct Traits<Format::Q8_0> : BlockTraits<8, 0, false, 0, 544, 32, 1> {};
template <> struct Traits<Format::Q4_0> : BlockTraits<4, 8, false, 0, 288, 32, 1> {};
template <> struct Traits<Format::Q4_1> : BlockTraits<4, 0, true, 0, 320, 64, 1> {};
template <> struct Traits<Format::Q5_0> : BlockTraits<5, 16, false, 0, 352, 32, 1> {};
template <> struct Traits<Format::Q5_1> : BlockTraits<5, 0, true, 0, 384, 64, 1> {};
template <> struct Traits<Format::Q4_K> : BlockTraits<4, 0, true, 64, 288, 32, 8> {};
template <> struct Traits<Format::Q5_K> : BlockTraits<5, 0, true, 64, 352, 32, 8> {};
template <> struct Traits<Format::Q6_K> : BlockTraits<6, 32, false, 32, 416, 32, 8> {};

struct Scales {
  F d[2];
  F m;
};

// Scales of the block at `block` inside `unit` (the same for formats without outer scales).
template <Format FORMAT>
inline Scales load_scales(const uint8_t* unit, const uint8_t* block) {
  using T = Traits<FORMAT>;
  Scales s{};
  const F d = F::load_f16(reinterpret_cast<const uint16_t*>(unit));
  if constexpr (T::SUPER == 1) {
    s.d[0] = d;
    if constexpr (T::MIN) s.m = F::load_f16(reinterpret_cast<const uint16_t*>(unit + 32));
  } else if constexpr (T::HALVES == 2) {
    s.d[0] = d * F::load_i8(block);
    s.d[1] = d * F::load_i8(block + 16);
  } else {
    s.d[0] = d * F::load_u8(block);
    const F dmin = F::load_f16(reinterpret_cast<const uint16_t*>(unit + 32));
    s.m = F::set(0.0f) - dmin * F::load_u8(block + 16);
  }
  return s;
}

// The weights of groups J (low nibbles) and J + 4 (high nibbles), J < 4.
template <Format FORMAT, int J>
inline void load_groups(const uint8_t* block, B& low, B& high) {
  using T = Traits<FORMAT>;
  if constexpr (T::BITS == 8) {
    low = B::load(block + T::QUANTS + J * 64);
    high = B::load(block + T::QUANTS + (J + 4) * 64);
    return;
  } else {
    const B packed = B::load(block + T::QUANTS + J * 64);
    low = low_nibbles(packed);
    high = high_nibbles(packed);
    const uint8_t* extra = block + T::QUANTS + 256;
    if constexpr (T::BITS == 5) {
      low = add_bit_16(low, extra + J * 8);
      high = add_bit_16(high, extra + (J + 4) * 8);
    } else if constexpr (T::BITS == 6) {
      low = add_field_16<J>(low, B::load(extra));
      high = add_field_16<J>(high, B::load(extra + 64));
    }
  }
}

}  // namespace twostroke::TS_ISA
