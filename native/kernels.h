// The kernels as a table of functions, one table for each instruction set.
//
// Every function computes a share of its operation, so that threads call it side by side: linear
// takes a range of output tiles, the row-wise ones a range of rows, attention one unit. All give
// the same bits on every instruction set, for any split and any number of rows.
//
// Activations are float32 rows whose stride is a multiple of 16, padded lanes zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "pack.h"

namespace twostroke {

// Rows of activations quantised to signed bytes in blocks of 32 inputs:
// value = scale * q, with sum16 the sums of q over 16 inputs and offset = scale * (sum over 32).
struct QuantisedRows {
  int8_t* q;        // [row][inputs]
  float* scale;     // [row][inputs / 32]
  float* offset;    // [row][inputs / 32]
  int32_t* sum16;   // [row][inputs / 16]
};

struct LinearArgs {
  const Matrix* weight;
  const float* bias;  // or null; padded to whole tiles
  const float* x;     // float input (float formats), stride x_stride
  size_t x_stride;
  QuantisedRows quantised;  // input of the quantised formats
  float* y;
  size_t y_stride;
  int rows;
};

// act(x Wg^T + bg) * (x Wu^T + bu), quantised: the middle of a gated layer in one go. The outputs
// fill whole blocks of 32; `y` of both products is unused.
struct GatedLinearArgs {
  LinearArgs gate, up;
  bool gelu;
  QuantisedRows out;
};

enum class KvElement { f32, f16, int8 };

constexpr size_t get_bytes(KvElement element) {
  return element == KvElement::f32 ? 4 : element == KvElement::f16 ? 2 : 1;
}

// The element of this name, as in spec/kv.py. Throws std::invalid_argument naming what there is.
KvElement parse_kv_element(const std::string& name);

// One KV pool. A block holds all layers one after another, so that a sequence's first tokens touch
// little memory and a block moves in one piece. A layer of it is, for each KV head, K as
// [head_dim][16] (a vector is one dimension of sixteen keys), then for each head V as [16][head_dim]:
//
//   f32, f16  K head 0 | K head 1 … | V head 0 | V head 1 …
//   int8      K head 0 | its K scales [16] | its V scales [16] | K head 1 … | V head 0 | V head 1 …
//
// with float32 scales, one a token: value = scale * element. int8 keys are rotated (rotate.h).
struct KvPool {
  uint8_t* data;
  int num_layers, num_blocks, num_kv_heads, head_dim;
  KvElement element;
  size_t value_bytes, key_bytes, layer_bytes;  // of a head's values and keys, of a block's layer

  KvPool(uint8_t* data, int num_layers, int num_blocks, int num_kv_heads, int head_dim,
         KvElement element)
      : data(data),
        num_layers(num_layers),
        num_blocks(num_blocks),
        num_kv_heads(num_kv_heads),
        head_dim(head_dim),
        element(element),
        value_bytes(static_cast<size_t>(head_dim) * kLanes * get_bytes(element)),
        key_bytes(value_bytes + (element == KvElement::int8 ? 2 * kLanes * sizeof(float) : 0)),
        layer_bytes(num_kv_heads * (key_bytes + value_bytes)) {}

  size_t bytes() const { return layer_bytes * num_layers * num_blocks; }
  uint8_t* block(int layer, int block) const {
    return data + (static_cast<size_t>(block) * num_layers + layer) * layer_bytes;
  }
  uint8_t* keys(int layer, int b, int head) const { return block(layer, b) + head * key_bytes; }
  uint8_t* values(int layer, int b, int head) const {
    return block(layer, b) + num_kv_heads * key_bytes + head * value_bytes;
  }
  // The scales of sixteen keys, then of the sixteen values, given where a head's keys lie.
  float* scales(uint8_t* keys) const { return reinterpret_cast<float*>(keys + value_bytes); }
  const float* scales(const uint8_t* keys) const {
    return reinterpret_cast<const float*>(keys + value_bytes);
  }
};

constexpr int kMostInt8Dims = 1024;  // largest head_dim of an int8 pool

constexpr int kSegmentKeys = 256;  // keys a softmax, at absolute positions
constexpr int kQueryTile = 16;     // tokens of one row a unit handles
constexpr int kTogether = 6;       // query vectors one pass over a segment serves
constexpr int kAheadBlocks = 4;    // how far ahead KV blocks are fetched

// A unit of attention: `tokens` consecutive queries of one row at one KV head, over the key
// segments first_segment <= s < last_segment.
struct AttentionArgs {
  const KvPool* kv;
  const int32_t* blocks;  // the row's block table
  const float* q;         // first query token, head 0 of this KV head's group
  float* y;               // likewise
  size_t stride;          // floats between tokens of q and of y
  int layer, kv_head, group;
  int position;  // of the first query token
  int tokens;
  int window;    // 0: none
  float scale;
  int first_segment, last_segment;
  float* scratch;  // attention_scratch_floats() floats
  // Not null: write (o, m, l) of every segment here instead of y, the next segment's so many floats
  // further on.
  float* partial;
  size_t partial_stride;
  const uint8_t* next[kAheadBlocks];  // or null: the keys this thread will read next
};

// Floats of scratch a unit needs.
inline size_t attention_scratch_floats(int group, int head_dim) {
  return static_cast<size_t>(group) * kQueryTile * (2 * head_dim + 2) + 2 * kLanes +
         kTogether * kSegmentKeys;
}
// Floats of one partial result: o, then m and l.
inline size_t partial_floats(int head_dim) { return static_cast<size_t>(head_dim) + kLanes; }

struct Kernels {
  const char* name;
  void (*linear)(const LinearArgs& args, int first_tile, int last_tile);
  void (*gated_linear)(const GatedLinearArgs& args, int first_block, int last_block);
  void (*quantise)(const float* x, size_t stride, int inputs, const QuantisedRows& out, int first,
                   int last);
  void (*rms_norm)(const float* x, float* y, size_t stride, const float* weight, int width,
                   int groups, float eps, int first, int last);
  void (*gated)(const float* gate, const float* up, float* y, size_t stride, bool gelu, int first,
                int last);
  void (*add)(const float* a, const float* b, float* y, size_t stride, int first, int last);
  void (*rope)(float* x, size_t stride, int heads, int head_dim, const float* cos, const float* sin,
               bool interleaved, const int32_t* positions, int first, int last);
  void (*write_kv)(const KvPool& kv, int layer, const float* k, const float* v, size_t stride,
                   const int32_t* block, const int32_t* slot, int first, int last);
  void (*attention)(const AttentionArgs& args);
  void (*merge)(const float* partials, size_t stride, int segments, int head_dim, float* y);
};

const Kernels& get_portable_kernels();
#if defined(TWOSTROKE_X86)
const Kernels& get_avx2_kernels();
const Kernels& get_avx512_kernels();
#endif

// The table of this name ("auto" takes the widest this processor runs). Throws
// std::invalid_argument naming what there is.
const Kernels& get_kernels(const char* name);

}  // namespace twostroke
