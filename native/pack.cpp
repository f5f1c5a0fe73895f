#include "pack.h"

#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "half.h"

namespace twostroke {
namespace {

constexpr std::array<FormatInfo, 11> kInfos = {{
    {1, 4, 1, 64},           // F32
    {1, 2, 1, 32},           // F16
    {1, 2, 1, 32},           // BF16
    {32, 34, 32, 544},       // Q8_0
    {32, 18, 32, 288},       // Q4_0
    {32, 20, 32, 320},       // Q4_1
    {32, 22, 32, 352},       // Q5_0
    {32, 24, 32, 384},       // Q5_1
    {256, 144, 256, 2368},   // Q4_K
    {256, 176, 256, 2880},   // Q5_K
    {256, 210, 256, 3360},   // Q6_K
}};

struct Layout {  // where the fields of a packed 32-input block lie
  int header;    // bytes before the first block of a unit
  int stride;    // from block to block
  int nibbles;   // offset in the block
  int extra;     // offset of bits or fields, 0 when there are none
};

Layout get_layout(Format format) {
  switch (format) {
    case Format::Q8_0: return {0, 544, 32, 0};
    case Format::Q4_0: return {0, 288, 32, 0};
    case Format::Q4_1: return {0, 320, 64, 0};
    case Format::Q5_0: return {0, 352, 32, 288};
    case Format::Q5_1: return {0, 384, 64, 320};
    case Format::Q4_K: return {64, 288, 32, 0};
    case Format::Q5_K: return {64, 352, 32, 288};
    case Format::Q6_K: return {32, 416, 32, 288};
    default: throw std::logic_error("float formats have no blocks");
  }
}

// Scale and minimum of sub-block j, from the 12 packed bytes of Q4_K and Q5_K.
void read_scale_min(const uint8_t* s, int j, uint8_t& scale, uint8_t& minimum) {
  if (j < 4) {
    scale = s[j] & 63;
    minimum = s[j + 4] & 63;
  } else {
    scale = static_cast<uint8_t>((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4));
    minimum = static_cast<uint8_t>((s[j + 4] >> 4) | ((s[j] >> 6) << 4));
  }
}

// The unsigned quants of one file block, in input order.
void read_quants(Format format, const uint8_t* b, uint8_t* q) {
  const auto split = [&](const uint8_t* nibbles) {
    for (int i = 0; i < 16; ++i) {
      q[i] = nibbles[i] & 15;
      q[i + 16] = nibbles[i] >> 4;
    }
  };
  const auto fifth = [&](const uint8_t* bits) {
    for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(q[i] | (((bits[i / 8] >> (i % 8)) & 1) << 4));
  };
  switch (format) {
    case Format::Q8_0:
      for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(b[2 + i] ^ 0x80);
      return;
    case Format::Q4_0: return split(b + 2);
    case Format::Q4_1: return split(b + 4);
    case Format::Q5_0: split(b + 6); return fifth(b + 2);
    case Format::Q5_1: split(b + 8); return fifth(b + 4);
    case Format::Q4_K:
    case Format::Q5_K: {
      const bool five = format == Format::Q5_K;
      const uint8_t* nibbles = b + (five ? 48 : 16);
      for (int i = 0; i < 256; ++i) {
        const int sub = i / 32, byte = nibbles[sub / 2 * 32 + i % 32];
        q[i] = static_cast<uint8_t>(sub % 2 ? byte >> 4 : byte & 15);
        if (five) q[i] = static_cast<uint8_t>(q[i] | (((b[16 + i % 32] >> sub) & 1) << 4));
      }
      return;
    }
    case Format::Q6_K:
      for (int i = 0; i < 256; ++i) {
        const int half = i / 128, quarter = i / 32 % 4, l = i % 32;
        const int byte = b[64 * half + l + (quarter % 2) * 32];
        const int low = quarter < 2 ? byte & 15 : byte >> 4;
        const int high = (b[128 + 32 * half + l] >> (2 * quarter)) & 3;
        q[i] = static_cast<uint8_t>(low | (high << 4));
      }
      return;
    default: throw std::logic_error("float formats have no quants");
  }
}

uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

void or_word(uint8_t* p, uint32_t word) {
  word |= load_word(p);
  std::memcpy(p, &word, 4);
}

// Puts 32 quants of one lane into a packed block whose quant bytes are still zero in this lane;
// a word is one group of four inputs.
void place_quants(Format format, const Layout& layout, const uint8_t* q, int lane, uint8_t* block) {
  uint8_t* quants = block + layout.nibbles + lane * 4;
  if (format == Format::Q8_0) {
    for (int group = 0; group < 8; ++group) or_word(quants + group * 64, load_word(q + group * 4));
    return;
  }
  constexpr uint32_t kLow = 0x0F0F0F0Fu;
  for (int j = 0; j < 4; ++j) {
    or_word(quants + j * 64, (load_word(q + 4 * j) & kLow) | (load_word(q + 16 + 4 * j) & kLow) << 4);
  }
  if (layout.extra == 0) return;
  uint8_t* extra = block + layout.extra;
  for (int group = 0; group < 8; ++group) {
    const uint32_t high = load_word(q + 4 * group) >> 4;
    if (format == Format::Q6_K) {
      or_word(extra + group / 4 * 64 + lane * 4, (high & 0x03030303u) << (2 * (group % 4)));
    } else {  // the multiplication gathers the low bit of each byte into the top four bits
      const uint32_t four = ((high & 0x01010101u) * 0x10204080u) >> 28;
      uint8_t& bits = extra[group * 8 + lane / 2];
      bits = static_cast<uint8_t>(bits | four << (lane % 2 * 4));
    }
  }
}

// Puts a file block's scales of one lane into the packed unit.
void place_scales(Format format, const Layout& layout, const uint8_t* b, int lane, uint8_t* unit) {
  const auto copy_half = [&](const uint8_t* from, int offset) {
    std::memcpy(unit + offset + 2 * lane, from, 2);
  };
  switch (format) {
    case Format::Q8_0:
    case Format::Q4_0:
    case Format::Q5_0: return copy_half(b, 0);
    case Format::Q4_1:
    case Format::Q5_1: copy_half(b, 0); return copy_half(b + 2, 32);
    case Format::Q4_K:
    case Format::Q5_K:
      copy_half(b, 0);
      copy_half(b + 2, 32);
      for (int j = 0; j < 8; ++j) {
        uint8_t* block = unit + layout.header + j * layout.stride;
        read_scale_min(b + 4, j, block[lane], block[16 + lane]);
      }
      return;
    case Format::Q6_K:
      copy_half(b + 208, 0);
      for (int j = 0; j < 16; ++j) {
        unit[layout.header + j / 2 * layout.stride + j % 2 * 16 + lane] = b[192 + j];
      }
      return;
    default: throw std::logic_error("float formats have no scales");
  }
}

}  // namespace

Format parse_format(const std::string& name) {
  static constexpr std::array<const char*, 11> kNames = {
      "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<Format>(i);
  }
  throw std::invalid_argument("unknown weight format " + name);
}

const FormatInfo& get_info(Format format) { return kInfos[static_cast<size_t>(format)]; }

Matrix::Matrix(Format format, int outputs, int inputs, uint8_t* memory)
    : format(format),
      outputs(outputs),
      inputs(inputs),
      tile_bytes(static_cast<size_t>(inputs) / get_info(format).unit_inputs *
                 get_info(format).unit_bytes),
      bytes(tile_bytes * num_tiles()),
      data_(memory) {
  if (outputs < 1 || inputs < 1 || inputs % get_info(format).unit_inputs != 0) {
    throw std::invalid_argument("matrix inputs must fill whole blocks of its format");
  }
}

void Matrix::pack(const uint8_t* file, int first_tile, int last_tile) {
  const FormatInfo& info = get_info(format);
  const size_t row_bytes = static_cast<size_t>(inputs) / info.file_weights * info.file_bytes;
  uint8_t quants[kSuperBlock];
  for (int t = first_tile; t < last_tile; ++t) {
    uint8_t* tile = data_ + static_cast<size_t>(t) * tile_bytes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int output = t * kLanes + lane;
      if (output >= outputs) continue;  // the memory is zero: weight and scale 0
      const uint8_t* row = file + static_cast<size_t>(output) * row_bytes;
      if (is_float(format)) {
        const size_t size = info.file_bytes;
        for (int k = 0; k < inputs; ++k) {
          std::memcpy(tile + (static_cast<size_t>(k) * kLanes + lane) * size, row + k * size, size);
        }
        continue;
      }
      const Layout layout = get_layout(format);
      for (int u = 0; u < inputs / info.unit_inputs; ++u) {
        const uint8_t* source = row + static_cast<size_t>(u) * info.file_bytes;
        uint8_t* unit = tile + static_cast<size_t>(u) * info.unit_bytes;
        place_scales(format, layout, source, lane, unit);
        read_quants(format, source, quants);
        for (int block = 0; block < info.unit_inputs / kBlock; ++block) {
          place_quants(format, layout, quants + block * kBlock, lane,
                       unit + layout.header + block * layout.stride);
        }
      }
    }
  }
}

void Matrix::read_row(int output, float* out) const {
  const FormatInfo& info = get_info(format);
  const uint8_t* base = tile(output / kLanes);
  const int lane = output % kLanes;
  const auto half_at = [&](const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p + 2 * lane, 2);
    return half_to_float(h);
  };
  if (is_float(format)) {
    for (int k = 0; k < inputs; ++k) {
      const uint8_t* p = base + (static_cast<size_t>(k) * kLanes + lane) * info.file_bytes;
      uint16_t h = 0;
      if (format == Format::F32) {
        std::memcpy(out + k, p, 4);
        continue;
      }
      std::memcpy(&h, p, 2);
      out[k] = format == Format::F16 ? half_to_float(h)
                                     : std::bit_cast<float>(static_cast<uint32_t>(h) << 16);
    }
    return;
  }
  const Layout layout = get_layout(format);
  for (int k = 0; k < inputs; ++k) {
    const uint8_t* unit = base + static_cast<size_t>(k / info.unit_inputs) * info.unit_bytes;
    const uint8_t* block = unit + layout.header + k % info.unit_inputs / kBlock * layout.stride;
    const int group = k % kBlock / 4, byte = lane * 4 + k % 4;
    if (format == Format::Q8_0) {
      out[k] = half_at(unit) * static_cast<float>(block[layout.nibbles + group * 64 + byte] - 128);
      continue;
    }
    int q = (block[layout.nibbles + group % 4 * 64 + byte] >> (group < 4 ? 0 : 4)) & 15;
    if (format == Format::Q6_K) {
      q |= ((block[layout.extra + group / 4 * 64 + byte] >> (2 * (group % 4))) & 3) << 4;
    } else if (layout.extra != 0) {
      q |= ((block[layout.extra + group * 8 + byte / 8] >> (byte % 8)) & 1) << 4;
    }
    const float d = half_at(unit);
    switch (format) {
      case Format::Q4_0: out[k] = d * static_cast<float>(q - 8); break;
      case Format::Q5_0: out[k] = d * static_cast<float>(q - 16); break;
      case Format::Q4_1:
      case Format::Q5_1: out[k] = d * static_cast<float>(q) + half_at(unit + 32); break;
      case Format::Q6_K: {
        const auto scale = static_cast<int8_t>(block[group / 4 * 16 + lane]);
        out[k] = d * static_cast<float>(scale) * static_cast<float>(q - 32);
        break;
      }
      default:  // Q4_K, Q5_K
        out[k] = d * static_cast<float>(block[lane]) * static_cast<float>(q) -
                 half_at(unit + 32) * static_cast<float>(block[16 + lane]);
    }
  }
}

uint64_t get_layout_fingerprint() {
  constexpr int kOutputs = 2 * kLanes + 5, kInputs = 2 * kSuperBlock;
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a, a word at a time
  for (size_t index = 0; index < kInfos.size(); ++index) {
    const FormatInfo& info = kInfos[index];
    std::vector<uint8_t> file(static_cast<size_t>(kOutputs) * kInputs / info.file_weights *
                              info.file_bytes);
    uint32_t state = 1;
    for (uint8_t& byte : file) byte = static_cast<uint8_t>((state = state * 1664525u + 1013904223u) >> 24);
    const auto format = static_cast<Format>(index);
    std::vector<uint8_t> packed(Matrix(format, kOutputs, kInputs, nullptr).bytes);
    Matrix matrix(format, kOutputs, kInputs, packed.data());
    matrix.pack(file.data(), 0, matrix.num_tiles());
    for (size_t at = 0; at + 4 <= packed.size(); at += 4) {
      hash = (hash ^ load_word(packed.data() + at)) * 0x100000001B3u;
    }
    hash = (hash ^ packed.size()) * 0x100000001B3u;
  }
  return hash;
}

}  // namespace twostroke
