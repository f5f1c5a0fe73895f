// Weight matrices repacked so that sixteen outputs are sixteen vector lanes.
//
// A matrix (outputs, inputs) is cut into tiles of 16 outputs; a tile runs through all its inputs in
// blocks of 32, each block complete with its scales:
//
//   Q4_0  d[16]f16            nibbles[256]                      288 bytes a block of 16 x 32
//   Q4_1  d[16]f16 m[16]f16   nibbles[256]                      320
//   Q5_0  d[16]f16            nibbles[256] bits[64]             352
//   Q5_1  d[16]f16 m[16]f16   nibbles[256] bits[64]             384
//   Q8_0  d[16]f16            bytes[512] (weight + 128)         544
//   Q4_K  d[16]f16 dmin[16]f16, then 8 x (scale[16]u8 min[16]u8 nibbles[256])            2368 / 256
//   Q5_K  d[16]f16 dmin[16]f16, then 8 x (scale[16]u8 min[16]u8 nibbles[256] bits[64])   2880 / 256
//   Q6_K  d[16]f16, then 8 x (scale[2][16]i8 nibbles[256] fields[128])                   3360 / 256
//   F32, F16, BF16   value[input][16 lanes]
//
// Within a block, group g (of 8) holds inputs 4g .. 4g+3 of every lane: byte lane*4 + input%4.
// Groups 0-3 are the low nibbles of four 64-byte vectors, 4-7 the high nibbles; `bits` has a
// 64-bit word a group (the fifth bit); `fields` has two 64-byte vectors with two bits a group.
// Nothing is rounded: the packed weights are the file's weights. Because a lane is an output,
// every output sums its inputs in the same order whatever the number of rows or threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace twostroke {

constexpr int kLanes = 16;
constexpr int kBlock = 32;       // inputs a block
constexpr int kSuperBlock = 256;  // inputs that share the outer scales of a K format

enum class Format { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

// Throws std::invalid_argument on an unknown name.
Format parse_format(const std::string& name);

struct FormatInfo {
  int file_weights;    // weights of one block in the file
  int file_bytes;      // and its bytes
  int unit_inputs;     // inputs of one packed unit (1, 32 or 256)
  int unit_bytes;      // bytes of that unit for 16 lanes
};
const FormatInfo& get_info(Format format);

constexpr bool is_float(Format format) {
  return format == Format::F32 || format == Format::F16 || format == Format::BF16;
}

// A packed weight matrix in memory it borrows: `bytes` of it, aligned to 64, which outlive it. Only
// `pack` writes there; a matrix that is never packed may lie in read-only memory.
class Matrix {
 public:
  Matrix(Format format, int outputs, int inputs, uint8_t* memory);
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  // Fills tiles first <= tile < last, zero so far, from the file's bytes (row-major blocks).
  void pack(const uint8_t* file, int first_tile, int last_tile);

  // Writes the `inputs` float32 weights of one output (an embedding).
  void read_row(int output, float* out) const;

  int num_tiles() const { return (outputs + kLanes - 1) / kLanes; }
  const uint8_t* tile(int index) const { return data_ + static_cast<size_t>(index) * tile_bytes; }

  const Format format;
  const int outputs;
  const int inputs;
  const size_t tile_bytes;
  const size_t bytes;

 private:
  uint8_t* data_;
};

// A number that differs, all but surely, between builds that pack differently: a hash of what a few
// made-up rows of every format become. Packed bytes kept from another build are told apart by it.
uint64_t get_layout_fingerprint();

}  // namespace twostroke
