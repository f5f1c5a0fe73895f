// Stores keys and values in their blocks: K transposed, so that a vector is one dimension of sixteen
// keys, and V as it is (see KvPool). Values beyond the range of f16 are clamped to its ends, but for
// f32. A token's int8 elements are round(x * 127 / max |x|) to nearest even, its scale max |x| / 127;
// keys are rotated first.
#pragma once

namespace twostroke::TS_ISA {

inline F clamp_to_half(F x) { return min(max(x, F::set(-65504.0f)), F::set(65504.0f)); }

// A token's K or V of one head as it is quantised: clamped, and K rotated.
struct Int8Source {
  alignas(64) float x[kMostInt8Dims];

  Int8Source(const float* from, int head_dim, bool is_key) {
    for (int d = 0; d < head_dim; d += kLanes) clamp_to_half(F::load(from + d)).store(x + d);
    if (is_key) rotate(x, head_dim);
  }
};

// The scale of such values, and the factor that makes elements of them.
struct KvScale {
  float scale, inverse;

  KvScale(const float* x, int head_dim) {
    F most = F::set(0.0f);
    for (int d = 0; d < head_dim; d += kLanes) most = max(abs(F::load(x + d)), most);
    const float largest = reduce_max(most);
    scale = largest / 127.0f;
    inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;  // finite: else all elements are 0
  }
};

// Sixteen values as elements, one after another at `out`.
template <KvElement E>
inline void store_elements(F x, F inverse, uint8_t* out) {
  if constexpr (E == KvElement::f32) x.store(reinterpret_cast<float*>(out));
  if constexpr (E == KvElement::f16) clamp_to_half(x).store_f16(reinterpret_cast<uint16_t*>(out));
  if constexpr (E == KvElement::int8) {
    (x * inverse).store_rounded_i8(reinterpret_cast<int8_t*>(out));
  }
}

// One token's K of one head, in slot `slot` of a block.
template <KvElement E>
inline void write_key(const KvPool& kv, uint8_t* keys, const float* k, F inverse, int slot) {
  constexpr size_t BYTES = get_bytes(E);
  alignas(64) uint8_t elements[kLanes * BYTES];
  for (int d = 0; d < kv.head_dim; d += kLanes) {
    store_elements<E>(F::load(k + d), inverse, elements);
    uint8_t* column = keys + (d * kLanes + slot) * BYTES;
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(column + i * kLanes * BYTES, elements + i * BYTES, BYTES);
    }
  }
}

template <KvElement E>
inline void write_value(const KvPool& kv, uint8_t* values, const float* v, F inverse, int slot) {
  uint8_t* row = values + static_cast<size_t>(slot) * kv.head_dim * get_bytes(E);
  for (int d = 0; d < kv.head_dim; d += kLanes) {
    store_elements<E>(F::load(v + d), inverse, row + d * get_bytes(E));
  }
}

// One token's K and V of one head with their scales.
inline void write_int8(const KvPool& kv, uint8_t* keys, uint8_t* values, const float* k,
                       const float* v, int slot) {
  float* scales = kv.scales(keys) + slot;
  const Int8Source key(k, kv.head_dim, true), value(v, kv.head_dim, false);
  const KvScale key_scale(key.x, kv.head_dim), value_scale(value.x, kv.head_dim);
  scales[0] = key_scale.scale;
  scales[kLanes] = value_scale.scale;
  write_key<KvElement::int8>(kv, keys, key.x, F::set(key_scale.inverse), slot);
  write_value<KvElement::int8>(kv, values, value.x, F::set(value_scale.inverse), slot);
}

// The keys of a whole block, whose tokens lie `stride` apart: a dimension at a time.
template <KvElement E>
inline void write_block_keys(const KvPool& kv, uint8_t* keys, const float* k, size_t stride) {
  alignas(64) float column[kLanes];
  for (int d = 0; d < kv.head_dim; ++d) {
    for (int i = 0; i < kLanes; ++i) column[i] = k[i * stride + d];
    store_elements<E>(F::load(column), F::set(1.0f), keys + d * kLanes * get_bytes(E));
  }
}

template <KvElement E>
inline void write_rows(const KvPool& kv, int layer, const float* k, const float* v, size_t stride,
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
      if (E == KvElement::int8) {
        for (int i = 0; i < rows; ++i) {
          write_int8(kv, keys, values, k + at + i * stride, v + at + i * stride, slot[row + i]);
        }
        continue;
      }
      if (whole) {
        write_block_keys<E>(kv, keys, k + at, stride);
      } else {
        write_key<E>(kv, keys, k + at, F::set(1.0f), slot[row]);
      }
      for (int i = 0; i < rows; ++i) {
        write_value<E>(kv, values, v + at + i * stride, F::set(1.0f), slot[row + i]);
      }
    }
    row += rows;
  }
}

inline void write_kv(const KvPool& kv, int layer, const float* k, const float* v, size_t stride,
                     const int32_t* block, const int32_t* slot, int first, int last) {
  const auto write = kv.element == KvElement::f32   ? write_rows<KvElement::f32>
                     : kv.element == KvElement::f16 ? write_rows<KvElement::f16>
                                                    : write_rows<KvElement::int8>;
  write(kv, layer, k, v, stride, block, slot, first, last);
}

}  // namespace twostroke::TS_ISA
