// Stores keys and values in their blocks: K transposed, so that a vector is one dimension of sixteen
// keys, and V as it is. Values beyond the range of f16 are clamped to its ends.
#pragma once

namespace twostroke::TS_ISA {

inline F clamp_to_half(F x) { return min(max(x, F::set(-65504.0f)), F::set(65504.0f)); }

// One token's K or V of one head, in slot `slot` of a block.
inline void write_key(const KvPool& kv, uint8_t* keys, const float* k, int slot) {
  alignas(64) uint16_t halves[kLanes];
  for (int d = 0; d < kv.head_dim; d += kLanes) {
    if (kv.half) {
      auto* column = reinterpret_cast<uint16_t*>(keys) + d * kLanes + slot;
      clamp_to_half(F::load(k + d)).store_f16(halves);
      for (int i = 0; i < kLanes; ++i) column[i * kLanes] = halves[i];
    } else {
      auto* column = reinterpret_cast<float*>(keys) + d * kLanes + slot;
      for (int i = 0; i < kLanes; ++i) column[i * kLanes] = k[d + i];
    }
  }
}

inline void write_value(const KvPool& kv, uint8_t* values, const float* v, int slot) {
  const size_t at = static_cast<size_t>(slot) * kv.head_dim;
  for (int d = 0; d < kv.head_dim; d += kLanes) {
    const F x = F::load(v + d);
    if (kv.half) {
      clamp_to_half(x).store_f16(reinterpret_cast<uint16_t*>(values) + at + d);
    } else {
      x.store(reinterpret_cast<float*>(values) + at + d);
    }
  }
}

// The keys of a whole block, whose tokens lie `stride` apart: a dimension at a time.
inline void write_block_keys(const KvPool& kv, uint8_t* keys, const float* k, size_t stride) {
  alignas(64) float column[kLanes];
  for (int d = 0; d < kv.head_dim; ++d) {
    for (int i = 0; i < kLanes; ++i) column[i] = k[i * stride + d];
    const F x = F::load(column);
    if (kv.half) {
      clamp_to_half(x).store_f16(reinterpret_cast<uint16_t*>(keys) + d * kLanes);
    } else {
      x.store(reinterpret_cast<float*>(keys) + d * kLanes);
    }
  }
}

inline void write_kv(const KvPool& kv, int layer, const float* k, const float* v, size_t stride,
                     const int32_t* block, const int32_t* slot, int first, int last) {
  for (int row = first; row < last;) {
    const int end = row + kLanes;
    const bool whole =
        slot[row] == 0 && end <= last && block[end - 1] == block[row] && slot[end - 1] == kLanes - 1;
    const int rows = whole ? kLanes : 1;
    for (int head = 0; head < kv.num_kv_heads; ++head) {
      uint8_t* keys = kv.keys(layer, block[row], head);
      uint8_t* values = kv.values(layer, block[row], head);
      const size_t at = row * stride + static_cast<size_t>(head) * kv.head_dim;
      if (whole) {
        write_block_keys(kv, keys, k + at, stride);
      } else {
        write_key(kv, keys, k + at, slot[row]);
      }
      for (int i = 0; i < rows; ++i) write_value(kv, values, v + at + i * stride, slot[row + i]);
    }
    row += rows;
  }
}

}  // namespace twostroke::TS_ISA
