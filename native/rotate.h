// The rotation that int8 keys are stored in: a Walsh-Hadamard transform spreads a dimension that is
// far larger than the rest over all, so that one scale a token serves them (Ashkboos et al. 2024,
// QuaRot, §3). H is symmetric, of ±1, and H H = n, so q . k = (H q) . (H k) / n: queries are rotated
// too, and nothing has to be turned back.
#pragma once

#include <array>

namespace twostroke::TS_ISA {

// Row j of the transform of sixteen lanes: -1 where i and j share an odd number of bits.
constexpr std::array<std::array<float, kLanes>, kLanes> make_signs() {
  std::array<std::array<float, kLanes>, kLanes> signs{};
  for (unsigned j = 0; j < kLanes; ++j) {
    for (unsigned i = 0; i < kLanes; ++i) signs[j][i] = std::popcount(i & j) % 2 ? -1.0f : 1.0f;
  }
  return signs;
}
alignas(64) constexpr auto kSigns = make_signs();

// n: how many dimensions are rotated together, the largest power of two that divides head_dim.
constexpr int rotated_dims(int head_dim) { return head_dim & -head_dim; }

// x = H x for each n of its head_dim values: sixteen lanes as one sum in order, then pairs of
// vectors 1, 2, 4 … apart (kernels/reference/ops.py: rotate has the same order).
inline void rotate(float* x, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) {
    F sum = F::set(x[d]);
    for (int j = 1; j < kLanes; ++j) sum = fma(F::set(x[d + j]), F::load(kSigns[j].data()), sum);
    sum.store(x + d);
  }
  for (int apart = kLanes; apart < rotated_dims(head_dim); apart *= 2) {
    for (int d = 0; d < head_dim; d += kLanes) {
      if (d & apart) continue;
      const F a = F::load(x + d), b = F::load(x + d + apart);
      (a + b).store(x + d);
      (a - b).store(x + d + apart);
    }
  }
}

}  // namespace twostroke::TS_ISA
