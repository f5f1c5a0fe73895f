// y = x W^T + bias for every weight format, in panels of up to 64 rows and 32 outputs.
//
// Quantised formats: the input is quantised to signed bytes in blocks of 32 (once a row, before),
// products are summed exactly in integers over a block (16 inputs for Q6_K, whose scales change
// there), and the blocks are summed in float in order of input:
//     y += d_w * (d_x * sum (w - zero) q)   and, for formats with a minimum,   y += m_w * d_x sum q
// Float formats: four partial sums over inputs k mod 4, added in a fixed tree.
//
// A panel is summed in a small buffer, [row][tile][16], and leaves it through an epilogue: stored
// with its bias, or, for the gated layer, joined with the other product's panel and quantised.
// Every way to sum a panel does the same arithmetic for each of its values, so a value never
// depends on the number of rows, on the panel it falls into, or on the instruction set.
#pragma once

namespace twostroke::TS_ISA {

constexpr int kPrefetchBytes = 8192;
constexpr int kPanelRows = 64;
constexpr int kPanelTiles = 2;
constexpr int kPanelWidth = kPanelTiles * kLanes;

// Ask for the weights some way on, beyond the reach of the processor's own prefetching, where they
// stream from memory for few rows: a single row wants them soon, a panel with its next tiles. Asked
// for past the caches they would be read from memory in every step, also where the last-level cache
// holds a whole model.
constexpr int kRead = 0, kIntoSecondLevel = 2;
template <int STRIDE>
inline void prefetch_weights(const uint8_t* block) {
  for (int line = 0; line < STRIDE; line += 64) {
    __builtin_prefetch(block + line, kRead, kIntoSecondLevel);
  }
}

template <Format FORMAT>
inline const uint8_t* get_unit(const uint8_t* tile, size_t b) {
  return tile + b / Traits<FORMAT>::SUPER * Traits<FORMAT>::UNIT;
}
template <Format FORMAT>
inline const uint8_t* get_block(const uint8_t* unit, size_t b) {
  using T = Traits<FORMAT>;
  return unit + T::HEADER + b % T::SUPER * T::STRIDE;
}

// y plus one block's part, given its integer sums (one, or one for each half).
template <Format FORMAT>
inline F add_block(const Dot<Traits<FORMAT>::BITS>* dots, const Scales& scales,
                   const QuantisedRows& x, size_t at, F y) {
  using T = Traits<FORMAT>;
  const F d = F::set(x.scale[at]);
  const int32_t* sums = x.sum16 + 2 * at;
  if constexpr (T::HALVES == 2) {
    auto first = dots[0], second = dots[1];
    y = fma(first.finish(T::ZERO, sums[0]) * d, scales.d[0], y);
    y = fma(second.finish(T::ZERO, sums[1]) * d, scales.d[1], y);
  } else {
    auto whole = dots[0];
    y = fma(whole.finish(T::ZERO, sums[0] + sums[1]) * d, scales.d[0], y);
  }
  if constexpr (T::MIN) y = fma(F::set(x.offset[at]), scales.m, y);
  return y;
}

template <Format FORMAT, int J, int ROWS>
inline void add_groups(const uint8_t* block, const int8_t* q, size_t inputs,
                       Dot<Traits<FORMAT>::BITS> (*dots)[Traits<FORMAT>::HALVES]) {
  constexpr int SECOND = Traits<FORMAT>::HALVES - 1;
  B low, high;
  load_groups<FORMAT, J>(block, low, high);
  for (int r = 0; r < ROWS; ++r) {
    dots[r][0].add(low, load_u32(q + r * inputs + 4 * J));
    dots[r][SECOND].add(high, load_u32(q + r * inputs + 16 + 4 * J));
  }
}

// ROWS rows of one tile, their sums in registers: for processors with few registers, and where an
// unpacked block would be waited for.
template <Format FORMAT, int ROWS>
inline void sum_rows(const LinearArgs& args, const uint8_t* tile, int row, float* panel) {
  using T = Traits<FORMAT>;
  const size_t inputs = args.weight->inputs, blocks = inputs / kBlock;
  const QuantisedRows& x = args.quantised;
  F y[ROWS];
  for (int r = 0; r < ROWS; ++r) y[r] = F::set(0.0f);
  for (size_t b = 0; b < blocks; ++b) {
    const uint8_t* unit = get_unit<FORMAT>(tile, b);
    const uint8_t* block = get_block<FORMAT>(unit, b);
    if constexpr (ROWS <= 2) prefetch_weights<T::STRIDE>(block + kPrefetchBytes);
    const Scales scales = load_scales<FORMAT>(unit, block);
    const int8_t* q = x.q + row * inputs + b * kBlock;
    Dot<T::BITS> dots[ROWS][T::HALVES];
    for (int r = 0; r < ROWS; ++r) {
      for (int h = 0; h < T::HALVES; ++h) dots[r][h].start();
    }
    add_groups<FORMAT, 0, ROWS>(block, q, inputs, dots);
    add_groups<FORMAT, 1, ROWS>(block, q, inputs, dots);
    add_groups<FORMAT, 2, ROWS>(block, q, inputs, dots);
    add_groups<FORMAT, 3, ROWS>(block, q, inputs, dots);
    for (int r = 0; r < ROWS; ++r) {
      y[r] = add_block<FORMAT>(dots[r], scales, x, (row + r) * blocks + b, y[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) y[r].store(panel + r * kPanelWidth);
}

// One block of TILES tiles for ROWS rows of a panel. Inlined always: a call would put the unpacked
// weights back into memory.
template <Format FORMAT, int TILES, int ROWS>
[[gnu::always_inline]] inline void sum_unpacked_rows(const QuantisedRows& x, size_t inputs,
                                                     const B (&weights)[TILES][8],
                                                     const Scales (&scales)[TILES], size_t b,
                                                     size_t row, float* panel) {
  using T = Traits<FORMAT>;
  const int8_t* q = x.q + row * inputs + b * kBlock;
  const size_t blocks = inputs / kBlock, at = row * blocks + b;
  Dot<T::BITS> dots[ROWS][TILES][T::HALVES];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
#pragma GCC unroll 2
      for (int h = 0; h < T::HALVES; ++h) dots[r][t][h].start();
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const uint32_t four = load_u32(q + r * inputs + 4 * g);
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) {
        dots[r][t][g < 4 ? 0 : T::HALVES - 1].add(weights[t][g], four);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
      float* y = panel + r * kPanelWidth + t * kLanes;
      add_block<FORMAT>(dots[r][t], scales[t], x, at + r * blocks, F::load(y)).store(y);
    }
  }
}

// `rows` rows of TILES tiles, block by block: a block is unpacked once into sixteen registers and
// meets all rows, whose sums wait in the panel. For processors with 32 registers.
template <Format FORMAT, int TILES>
inline void sum_unpacked(const LinearArgs& args, int tile_index, int first, int rows,
                         float* panel) {
  using T = Traits<FORMAT>;
  // Copies, because a store of a float could change what the arguments point to.
  const QuantisedRows x = args.quantised;
  const size_t inputs = args.weight->inputs, blocks = inputs / kBlock;
  const uint8_t* const tile = args.weight->tile(tile_index);
  const size_t tile_bytes = args.weight->tile_bytes;
  const bool streams = args.rows <= kPanelRows;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < TILES; ++t) F::set(0.0f).store(panel + r * kPanelWidth + t * kLanes);
  }
  for (size_t b = 0; b < blocks; ++b) {
    Scales scales[TILES];
    B weights[TILES][8];
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
      const uint8_t* unit = get_unit<FORMAT>(tile + t * tile_bytes, b);
      const uint8_t* block = get_block<FORMAT>(unit, b);
      if (streams) prefetch_weights<T::STRIDE>(block + TILES * tile_bytes);
      scales[t] = load_scales<FORMAT>(unit, block);
      load_groups<FORMAT, 0>(block, weights[t][0], weights[t][4]);
      load_groups<FORMAT, 1>(block, weights[t][1], weights[t][5]);
      load_groups<FORMAT, 2>(block, weights[t][2], weights[t][6]);
      load_groups<FORMAT, 3>(block, weights[t][3], weights[t][7]);
    }
    int r = 0;
    float* y = panel;
    for (; r + 4 <= rows; r += 4, y += 4 * kPanelWidth) {
      sum_unpacked_rows<FORMAT, TILES, 4>(x, inputs, weights, scales, b, first + r, y);
    }
    if (rows - r >= 2) {
      sum_unpacked_rows<FORMAT, TILES, 2>(x, inputs, weights, scales, b, first + r, y);
      r += 2, y += 2 * kPanelWidth;
    }
    if (rows > r) {
      sum_unpacked_rows<FORMAT, TILES, 1>(x, inputs, weights, scales, b, first + r, y);
    }
  }
}

template <Format FORMAT>
inline F load_float_weights(const uint8_t* p) {
  if constexpr (FORMAT == Format::F32) return F::load(reinterpret_cast<const float*>(p));
  if constexpr (FORMAT == Format::F16) return F::load_f16(reinterpret_cast<const uint16_t*>(p));
  return F::load_bf16(reinterpret_cast<const uint16_t*>(p));
}

template <Format FORMAT, int ROWS>
inline void sum_float_rows(const LinearArgs& args, const uint8_t* tile, int row, float* panel) {
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
  for (int r = 0; r < ROWS; ++r) {
    ((sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3])).store(panel + r * kPanelWidth);
  }
}

template <Format FORMAT, int ROWS>
inline void sum_any_rows(const LinearArgs& args, const uint8_t* tile, int row, float* panel) {
  if constexpr (is_float(FORMAT)) {
    sum_float_rows<FORMAT, ROWS>(args, tile, row, panel);
  } else {
    sum_rows<FORMAT, ROWS>(args, tile, row, panel);
  }
}

// Sums rows first … first + rows - 1 of `tiles` tiles into a panel.
template <Format FORMAT>
inline void sum_panel(const LinearArgs& args, int tile_index, int tiles, int first, int rows,
                      float* panel) {
  if constexpr (kUnpackTiles > 0 && !is_float(FORMAT)) {
    constexpr int TOGETHER = Traits<FORMAT>::HALVES == 1 ? kUnpackTiles : 1;
    // A single tile of few rows would wait for its block to be unpacked.
    if (TOGETHER > 1 || args.rows >= 4) {
      int t = 0;
      for (; t + TOGETHER <= tiles; t += TOGETHER) {
        sum_unpacked<FORMAT, TOGETHER>(args, tile_index + t, first, rows, panel + t * kLanes);
      }
      if (t < tiles) sum_unpacked<FORMAT, 1>(args, tile_index + t, first, rows, panel + t * kLanes);
      return;
    }
  }
  for (int t = 0; t < tiles; ++t) {
    const uint8_t* tile = args.weight->tile(tile_index + t);
    float* y = panel + t * kLanes;
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      sum_any_rows<FORMAT, 4>(args, tile, first + r, y + r * kPanelWidth);
    }
    for (; r + 2 <= rows; r += 2) {
      sum_any_rows<FORMAT, 2>(args, tile, first + r, y + r * kPanelWidth);
    }
    for (; r < rows; ++r) sum_any_rows<FORMAT, 1>(args, tile, first + r, y + r * kPanelWidth);
  }
}

using SumPanel = void (*)(const LinearArgs&, int, int, int, int, float*);

inline SumPanel get_sum_panel(Format format) {
  switch (format) {
    case Format::F32: return sum_panel<Format::F32>;
    case Format::F16: return sum_panel<Format::F16>;
    case Format::BF16: return sum_panel<Format::BF16>;
    case Format::Q8_0: return sum_panel<Format::Q8_0>;
    case Format::Q4_0: return sum_panel<Format::Q4_0>;
    case Format::Q4_1: return sum_panel<Format::Q4_1>;
    case Format::Q5_0: return sum_panel<Format::Q5_0>;
    case Format::Q5_1: return sum_panel<Format::Q5_1>;
    case Format::Q4_K: return sum_panel<Format::Q4_K>;
    case Format::Q5_K: return sum_panel<Format::Q5_K>;
    case Format::Q6_K: return sum_panel<Format::Q6_K>;
  }
  return nullptr;
}

inline F add_bias(F y, const float* bias, size_t column) {
  return bias == nullptr ? y : y + F::load(bias + column);
}

void linear(const LinearArgs& args, int first, int last) {
  const SumPanel sum = get_sum_panel(args.weight->format);
  alignas(64) float panel[kPanelRows * kPanelWidth];
  for (int tile = first; tile < last; tile += kPanelTiles) {
    const int tiles = last - tile < kPanelTiles ? last - tile : kPanelTiles;
    for (int start = 0; start < args.rows; start += kPanelRows) {
      const int rows = args.rows - start < kPanelRows ? args.rows - start : kPanelRows;
      sum(args, tile, tiles, start, rows, panel);
      for (int r = 0; r < rows; ++r) {
        for (int t = 0; t < tiles; ++t) {
          const size_t column = static_cast<size_t>(tile + t) * kLanes;
          add_bias(F::load(panel + r * kPanelWidth + t * kLanes), args.bias, column)
              .store(args.y + (start + r) * args.y_stride + column);
        }
      }
    }
  }
}

// A panel of both products is as wide as a block of the quantised result.
void gated_linear(const GatedLinearArgs& args, int first_block, int last_block) {
  const LinearArgs& gate = args.gate;
  const SumPanel sum_gate = get_sum_panel(gate.weight->format);
  const SumPanel sum_up = get_sum_panel(args.up.weight->format);
  alignas(64) float gates[kPanelRows * kPanelWidth], ups[kPanelRows * kPanelWidth];
  static_assert(kPanelWidth == kBlock);
  const size_t blocks = gate.weight->outputs / kBlock;
  for (int block = first_block; block < last_block; ++block) {
    const int tile = block * kPanelTiles;
    for (int start = 0; start < gate.rows; start += kPanelRows) {
      const int rows = gate.rows - start < kPanelRows ? gate.rows - start : kPanelRows;
      sum_gate(gate, tile, kPanelTiles, start, rows, gates);
      sum_up(args.up, tile, kPanelTiles, start, rows, ups);
      for (int r = 0; r < rows; ++r) {
        F h[kPanelTiles];
        for (int t = 0; t < kPanelTiles; ++t) {
          const size_t column = static_cast<size_t>(tile + t) * kLanes;
          const int at = r * kPanelWidth + t * kLanes;
          const F g = add_bias(F::load(gates + at), gate.bias, column);
          const F u = add_bias(F::load(ups + at), args.up.bias, column);
          h[t] = apply_gate(g, u, args.gelu);
        }
        quantise_block(h[0], h[1], args.out, (start + r) * blocks + block);
      }
    }
  }
}

}  // namespace twostroke::TS_ISA
