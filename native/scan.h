// Passes over one row of logits: largest, sum of exponentials, the tokens above a threshold.
//
// Everything here gives the same bits whatever the array's alignment: lanes are fixed, a short tail
// is padded, and nothing is left to the compiler's choice of vector width. NaN counts as -inf.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace twostroke::sampling {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kLanes = 32;
constexpr int64_t kBlock = 1024;  // logits scanned between two looks at the result

struct Candidate {
  float value;  // adjusted logit
  int32_t token;
  double weight;  // exp((value - max) / temperature)
};

inline bool better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}

inline float clean(float x) { return x == x ? x : -kInfinity; }

// Four doubles at once (GNU vector types: any instruction set, lane by lane the same result).
constexpr int kWidth = 4;
typedef double Doubles __attribute__((vector_size(32)));
typedef uint64_t Words __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(16)));

// exp(x) for x <= 0; 0 for NaN and below -708; relative error below 1e-9.
inline Doubles exp_nonpositive(const Doubles& x) {
  constexpr double kShift = 0x1.8p52;  // adding it rounds to an integer held in the low bits
  const Doubles zero{};
  const Doubles clamped = x > -708.0 ? x : zero - 708.0;
  const Doubles shifted = clamped * 1.4426950408889634 + kShift;
  const Doubles n = shifted - kShift;
  const Doubles r = clamped - n * 0.6931471805599453;
  Doubles sum = r * (1.0 / 40320) + 1.0 / 5040;  // Taylor to r^8, |r| <= ln2 / 2
  sum = sum * r + 1.0 / 720;
  sum = sum * r + 1.0 / 120;
  sum = sum * r + 1.0 / 24;
  sum = sum * r + 1.0 / 6;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  const Words exponent = (std::bit_cast<Words>(shifted) + 1023) << 52;
  return x >= -708.0 ? sum * std::bit_cast<Doubles>(exponent) : zero;
}

inline double get_shifted(float x, float largest) {
  return x == largest ? 0.0 : static_cast<double>(x) - static_cast<double>(largest);
}

// Largest of `count` logits; NaN is passed over, -inf when there is nothing else.
inline float find_max(const float* x, int64_t count) {
  float lane[kLanes];
  std::fill_n(lane, kLanes, -kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
  }
  float best = -kInfinity;
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  for (int j = 0; j < kLanes; ++j) best = lane[j] > best ? lane[j] : best;
  return best;
}

// Smallest id of the largest logit.
inline int32_t find_argmax(const float* x, int64_t count) {
  float best = -kInfinity;
  int64_t start = 0;
  for (int64_t i = 0; i < count; i += kBlock) {
    const float block = find_max(x + i, std::min(kBlock, count - i));
    if (block > best) best = block, start = i;
  }
  if (best == -kInfinity) return 0;
  while (x[start] != best) ++start;
  return static_cast<int32_t>(start);
}

// Sum of exp((x - largest) * scale) in fixed lanes; the last block is padded with zero weights.
inline double sum_exp(const float* x, int64_t count, float largest, double scale) {
  constexpr int kVectors = 4, kBlockLanes = kVectors * kWidth;
  if (largest == kInfinity) return static_cast<double>(std::count(x, x + count, largest));
  Doubles lanes[kVectors] = {};
  auto add = [&](const float* block) {
    for (int j = 0; j < kVectors; ++j) {
      Floats values;
      std::memcpy(&values, block + j * kWidth, sizeof(values));
      const Doubles shifted = __builtin_convertvector(values, Doubles) - largest;
      lanes[j] += exp_nonpositive(shifted * scale);
    }
  };
  int64_t i = 0;
  for (; i + kBlockLanes <= count; i += kBlockLanes) add(x + i);
  if (i < count) {
    float tail[kBlockLanes];
    std::fill_n(tail, kBlockLanes, -kInfinity);
    std::copy(x + i, x + count, tail);
    add(tail);
  }
  const Doubles all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  double sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += all[j];
  return sum;
}

// Appends to `out` the tokens whose logit is at least `low`, ids rising.
inline void collect_near(const float* x, int64_t count, float low, std::vector<Candidate>& out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t end = std::min<int64_t>(i + kLanes, count);
    if (!(find_max(x + i, end - i) >= low)) continue;
    for (int64_t token = i; token < end; ++token) {
      if (x[token] >= low) out.push_back({x[token], static_cast<int32_t>(token), 0.0});
    }
  }
}

// Appends to `out` the finite logits below `low`, ids rising.
inline void collect_far(const float* x, int64_t count, float low, std::vector<Candidate>& out) {
  for (int64_t token = 0; token < count; ++token) {
    if (x[token] < low && x[token] > -kInfinity) {
      out.push_back({x[token], static_cast<int32_t>(token), 0.0});
    }
  }
}

// The `k` best tokens in descending order (fewer only when the row is shorter; NaN as -inf).
inline void collect_top(const float* x, int64_t count, int64_t k, std::vector<Candidate>& out) {
  out.clear();
  k = std::min(k, count);
  if (k <= 0) return;
  const size_t full = static_cast<size_t>(std::max<int64_t>(2 * k, k + 256));
  float threshold = -kInfinity;  // ids rise, so an equal value that comes later never gets in
  bool open = true;              // until k are known, everything gets in
  auto shrink = [&] {
    if (static_cast<int64_t>(out.size()) <= k) return;
    std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), better);
    out.resize(static_cast<size_t>(k));
    threshold = out.back().value;
    open = false;
  };
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t end = std::min<int64_t>(i + kLanes, count);
    if (!open && !(find_max(x + i, end - i) > threshold)) continue;
    for (int64_t token = i; token < end; ++token) {
      const float value = clean(x[token]);
      if (open || value > threshold) out.push_back({value, static_cast<int32_t>(token), 0.0});
    }
    if (out.size() >= full) shrink();
  }
  shrink();
  std::sort(out.begin(), out.end(), better);
}

}  // namespace twostroke::sampling
