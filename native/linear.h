// y = x W^T + bias for every weight format, on tiles of 16 outputs.
//
// Quantised formats: the input is quantised to signed bytes in blocks of 32 (once a row, before),
// products are summed exactly in integers over a block (16 inputs for Q6_K, whose scales change
// there), and the blocks are summed in float in order of input:
//     y += d_w * (d_x * sum (w - zero) q)   and, for formats with a minimum,   y += m_w * d_x sum q
// Float formats: four partial sums over inputs k mod 4, added in a fixed tree.
// One unpacking of the weights serves kRowTile rows; each row's arithmetic is the same for any
// number of rows.
#pragma once

namespace twostroke::TS_ISA {

constexpr int kPrefetchBytes = 4096;

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

template <Format FORMAT, int J, int ROWS>
inline void add_groups(const uint8_t* block, const int8_t* q, size_t inputs,
                       Dot<Traits<FORMAT>::BITS>* first, Dot<Traits<FORMAT>::BITS>* second) {
  B low, high;
  load_groups<FORMAT, J>(block, low, high);
  for (int r = 0; r < ROWS; ++r) {
    first[r].add(low, load_u32(q + r * inputs + 4 * J));
    second[r].add(high, load_u32(q + r * inputs + 16 + 4 * J));
  }
}

// With one row the weights stream from memory once: asks for the block a few blocks on, beyond the
// reach of the processor's own prefetching.
template <int STRIDE>
inline void prefetch_ahead(const uint8_t* block) {
  for (int line = 0; line < STRIDE; line += 64) __builtin_prefetch(block + kPrefetchBytes + line);
}

// One tile of 16 outputs for ROWS rows from `row` on.
template <Format FORMAT, int ROWS>
inline void multiply_tile(const LinearArgs& args, const uint8_t* tile, int tile_index, int row) {
  using T = Traits<FORMAT>;
  const size_t inputs = args.weight->inputs, blocks = inputs / kBlock;
  const QuantisedRows& x = args.quantised;
  F y[ROWS];
  for (int r = 0; r < ROWS; ++r) y[r] = F::set(0.0f);
  for (size_t b = 0; b < blocks; ++b) {
    const uint8_t* unit = tile + b / T::SUPER * T::UNIT;
    const uint8_t* block = unit + T::HEADER + b % T::SUPER * T::STRIDE;
    if constexpr (ROWS == 1) prefetch_ahead<T::STRIDE>(block);
    const Scales scales = load_scales<FORMAT>(unit, block);
    const int8_t* q = x.q + row * inputs + b * kBlock;
    // With one scale a block both halves go to the same sums.
    Dot<T::BITS> dots[T::HALVES][ROWS];
    for (int h = 0; h < T::HALVES; ++h) {
      for (int r = 0; r < ROWS; ++r) dots[h][r].start();
    }
    Dot<T::BITS>* second = dots[T::HALVES - 1];
    add_groups<FORMAT, 0, ROWS>(block, q, inputs, dots[0], second);
    add_groups<FORMAT, 1, ROWS>(block, q, inputs, dots[0], second);
    add_groups<FORMAT, 2, ROWS>(block, q, inputs, dots[0], second);
    add_groups<FORMAT, 3, ROWS>(block, q, inputs, dots[0], second);
    for (int r = 0; r < ROWS; ++r) {
      const size_t at = (row + r) * blocks + b;
      const F d = F::set(x.scale[at]);
      const int32_t* sums = x.sum16 + 2 * at;
      if constexpr (T::HALVES == 2) {
        y[r] = fma(dots[0][r].finish(T::ZERO, sums[0]) * d, scales.d[0], y[r]);
        y[r] = fma(dots[1][r].finish(T::ZERO, sums[1]) * d, scales.d[1], y[r]);
      } else {
        y[r] = fma(dots[0][r].finish(T::ZERO, sums[0] + sums[1]) * d, scales.d[0], y[r]);
      }
      if constexpr (T::MIN) y[r] = fma(F::set(x.offset[at]), scales.m, y[r]);
    }
  }
  const size_t column = static_cast<size_t>(tile_index) * kLanes;
  for (int r = 0; r < ROWS; ++r) {
    if (args.bias != nullptr) y[r] = y[r] + F::load(args.bias + column);
    y[r].store(args.y + (row + r) * args.y_stride + column);
  }
}

template <Format FORMAT>
inline F load_float_weights(const uint8_t* p) {
  if constexpr (FORMAT == Format::F32) return F::load(reinterpret_cast<const float*>(p));
  if constexpr (FORMAT == Format::F16) return F::load_f16(reinterpret_cast<const uint16_t*>(p));
  return F::load_bf16(reinterpret_cast<const uint16_t*>(p));
}

template <Format FORMAT, int ROWS>
inline void multiply_float_tile(const LinearArgs& args, const uint8_t* tile, int tile_index,
                                int row) {
  constexpr size_t size = FORMAT == Format::F32 ? 4 * kLanes : 2 * kLanes;
  const size_t inputs = args.weight->inputs;
  const float* x = args.x + row * args.x_stride;
  F sums[ROWS][4];
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < 4; ++j) sums[r][j] = F::set(0.0f);
  }
  size_t k = 0;
  for (; k + 4 <= inputs; k += 4) {
    for (int j = 0; j < 4; ++j) {
      const F w = load_float_weights<FORMAT>(tile + (k + j) * size);
      for (int r = 0; r < ROWS; ++r) {
        sums[r][j] = fma(F::set(x[r * args.x_stride + k + j]), w, sums[r][j]);
      }
    }
  }
  for (int j = 0; k < inputs; ++k, ++j) {
    const F w = load_float_weights<FORMAT>(tile + k * size);
    for (int r = 0; r < ROWS; ++r) {
      sums[r][j] = fma(F::set(x[r * args.x_stride + k]), w, sums[r][j]);
    }
  }
  const size_t column = static_cast<size_t>(tile_index) * kLanes;
  for (int r = 0; r < ROWS; ++r) {
    F y = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
    if (args.bias != nullptr) y = y + F::load(args.bias + column);
    y.store(args.y + (row + r) * args.y_stride + column);
  }
}

template <Format FORMAT, int ROWS>
inline void multiply_any(const LinearArgs& args, const uint8_t* tile, int index, int row) {
  if constexpr (is_float(FORMAT)) {
    multiply_float_tile<FORMAT, ROWS>(args, tile, index, row);
  } else {
    multiply_tile<FORMAT, ROWS>(args, tile, index, row);
  }
}

template <Format FORMAT>
void multiply_tiles(const LinearArgs& args, int first, int last) {
  for (int index = first; index < last; ++index) {
    const uint8_t* tile = args.weight->tile(index);
    int row = 0;
    for (; row + kRowTile <= args.rows; row += kRowTile) {
      multiply_any<FORMAT, kRowTile>(args, tile, index, row);
    }
    for (; row + 2 <= args.rows; row += 2) multiply_any<FORMAT, 2>(args, tile, index, row);
    for (; row < args.rows; ++row) multiply_any<FORMAT, 1>(args, tile, index, row);
  }
}

void linear(const LinearArgs& args, int first, int last) {
  switch (args.weight->format) {
    case Format::F32: return multiply_tiles<Format::F32>(args, first, last);
    case Format::F16: return multiply_tiles<Format::F16>(args, first, last);
    case Format::BF16: return multiply_tiles<Format::BF16>(args, first, last);
    case Format::Q8_0: return multiply_tiles<Format::Q8_0>(args, first, last);
    case Format::Q4_0: return multiply_tiles<Format::Q4_0>(args, first, last);
    case Format::Q4_1: return multiply_tiles<Format::Q4_1>(args, first, last);
    case Format::Q5_0: return multiply_tiles<Format::Q5_0>(args, first, last);
    case Format::Q5_1: return multiply_tiles<Format::Q5_1>(args, first, last);
    case Format::Q4_K: return multiply_tiles<Format::Q4_K>(args, first, last);
    case Format::Q5_K: return multiply_tiles<Format::Q5_K>(args, first, last);
    case Format::Q6_K: return multiply_tiles<Format::Q6_K>(args, first, last);
  }
}

}  // namespace twostroke::TS_ISA
