// Operations on rows of activations: each row's result depends on that row alone.
//
// Rows have a stride that is a multiple of 16 and zeros in the padded lanes, so the elementwise
// operations run over whole vectors.
#pragma once

namespace twostroke::TS_ISA {

// Block number `at` of quantised rows: scale = max |x| / 127, q = round to nearest even of
// x / scale.
inline void quantise_block(F lo, F hi, const QuantisedRows& out, size_t at) {
  const float largest = reduce_max(max(abs(lo), abs(hi)));
  const float scale = largest * (1.0f / 127.0f);
  const float inverse = scale > 0.0f ? 127.0f / largest : 0.0f;
  int8_t* q = out.q + at * kBlock;
  (lo * F::set(inverse)).store_rounded_i8(q);
  (hi * F::set(inverse)).store_rounded_i8(q + 16);
  const int32_t sums[2] = {sum_bytes(q), sum_bytes(q + 16)};
  out.scale[at] = scale;
  out.offset[at] = scale * static_cast<float>(sums[0] + sums[1]);
  out.sum16[2 * at] = sums[0];
  out.sum16[2 * at + 1] = sums[1];
}

inline void quantise(const float* x, size_t stride, int inputs, const QuantisedRows& out, int first,
                     int last) {
  const int blocks = inputs / kBlock;
  for (int row = first; row < last; ++row) {
    for (int b = 0; b < blocks; ++b) {
      const float* source = x + row * stride + b * kBlock;
      quantise_block(F::load(source), F::load(source + 16), out,
                     static_cast<size_t>(row) * blocks + b);
    }
  }
}

// y = x / sqrt(mean(x^2) + eps) * weight for `groups` consecutive groups of `width` in each row.
// width need not be a multiple of 16 when there is one group.
inline void rms_norm(const float* x, float* y, size_t stride, const float* weight, int width,
                     int groups, float eps, int first, int last) {
  const int vectors = (width + kLanes - 1) / kLanes;
  for (int row = first; row < last; ++row) {
    for (int g = 0; g < groups; ++g) {
      const float* source = x + row * stride + static_cast<size_t>(g) * width;
      float* target = y + row * stride + static_cast<size_t>(g) * width;
      F squares = F::set(0.0f);
      for (int i = 0; i < vectors; ++i) {
        const F v = F::load(source + i * kLanes);
        squares = fma(v, v, squares);
      }
      const float mean = reduce_add(squares) / static_cast<float>(width);
      const F inverse = F::set(1.0f / std::sqrt(mean + eps));
      for (int i = 0; i < vectors; ++i) {
        (F::load(source + i * kLanes) * inverse * F::load(weight + i * kLanes))
            .store(target + i * kLanes);
      }
    }
  }
}

inline F sigmoid(F x) { return F::set(1.0f) / (F::set(1.0f) + exp16(F::set(0.0f) - x)); }

// activation(gate) * up; silu(g) = g sigmoid(g); gelu by its tanh form (Hendrycks & Gimpel 2016),
// where (1 + tanh(u)) / 2 = sigmoid(2u).
inline F apply_gate(F gate, F up, bool gelu) {
  F u = gate;
  if (gelu) {
    u = fma(gate * gate * gate, F::set(0.044715f), gate) *
        F::set(1.5957691216057308f);  // 2 sqrt(2 / pi)
  }
  return gate * sigmoid(u) * up;
}

inline void gated(const float* gate, const float* up, float* y, size_t stride, bool gelu, int first,
                  int last) {
  for (size_t i = first * stride; i < last * stride; i += kLanes) {
    apply_gate(F::load(gate + i), F::load(up + i), gelu).store(y + i);
  }
}

inline void add(const float* a, const float* b, float* y, size_t stride, int first, int last) {
  for (size_t i = first * stride; i < last * stride; i += kLanes) {
    (F::load(a + i) + F::load(b + i)).store(y + i);
  }
}

// Rotates each head in place; cos and sin are (positions, head_dim / 2).
inline void rope(float* x, size_t stride, int heads, int head_dim, const float* cos,
                 const float* sin, bool interleaved, const int32_t* positions, int first,
                 int last) {
  const int half = head_dim / 2;
  for (int row = first; row < last; ++row) {
    const float* c = cos + static_cast<size_t>(positions[row]) * half;
    const float* s = sin + static_cast<size_t>(positions[row]) * half;
    for (int head = 0; head < heads; ++head) {
      float* values = x + row * stride + static_cast<size_t>(head) * head_dim;
      if (interleaved) {
        for (int i = 0; i < half; i += kLanes / 2) {  // head_dim is a multiple of 16
          const F pairs = F::load(values + 2 * i);
          fma(pairs, F::load_twice(c + i), negate_even(pairs.swap_pairs() * F::load_twice(s + i)))
              .store(values + 2 * i);
        }
        continue;
      }
      int i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        const F a = F::load(values + i), b = F::load(values + half + i);
        const F ci = F::load(c + i), si = F::load(s + i);
        fma(a, ci, b * si * F::set(-1.0f)).store(values + i);
        fma(b, ci, a * si).store(values + half + i);
      }
      for (; i < half; ++i) {
        const float a = values[i], b = values[half + i];
        values[i] = __builtin_fmaf(a, c[i], -(b * s[i]));
        values[half + i] = __builtin_fmaf(b, c[i], a * s[i]);
      }
    }
  }
}

}  // namespace twostroke::TS_ISA
