// Drawing a token from one row of logits, and scoring a given one.
//
// Owns the native twin of kernels/reference/sampling.py, which defines every step: same order, same
// random numbers, same rounding of adjusted logits. A row's answer depends on its own inputs only:
// no work is divided inside a row, so neither the other rows nor the number of threads can change
// a bit.
//
// No full sort. Whatever is kept (top-k, top-p, min-p) is a prefix of the descending order, and so
// is what the draw passes over; a prefix is found by its mass, narrowing by value step by step.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "scan.h"

namespace twostroke::sampling {

// Tokens this much less likely than the best are looked at only when the draw reaches them.
constexpr double kFarWeight = 1e-4;

// ---- random numbers ----------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (position, sequence index), all low
// word first; the first two words give 53 bits.
inline double get_uniform(uint64_t seed, uint64_t position, uint64_t index) {
  auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  std::array<uint32_t, 4> c{low(position), high(position), low(index), high(index)};
  uint32_t key0 = low(seed), key1 = high(seed);
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53} * c[0], odd = uint64_t{0xCD9E8D57} * c[2];
    c = {high(odd) ^ c[1] ^ key0, low(odd), high(even) ^ c[3] ^ key1, low(even)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return static_cast<double>((c[0] | uint64_t{c[1]} << 32) >> 11) * 0x1.0p-53;
}

// ---- prefixes of the descending order, by mass -------------------------------------------------

struct Prefix {
  size_t count;  // candidates in the prefix, now the first ones of the array
  double mass;   // their weights' sum
};

// A search for the item where the running mass of the descending order crosses `target` (reaches
// it; with `beyond`, exceeds it). It is among items[first, last); `mass` stands before them.
struct Crossing {
  double target;
  bool beyond;
  size_t first, last;
  double mass = 0;
  bool is_met(double sum) const { return beyond ? sum > target : sum >= target; }
};

// Splits the searched items by value into equal steps from `high` down to `low`, finds the step of
// the crossing by the steps' masses, moves what is better before it and what is worse behind it,
// each in its old order, and narrows the search to it.
inline void narrow(std::vector<Candidate>& items, std::vector<Candidate>& spare, Crossing& search,
                   double low, double high) {
  constexpr int kSteps = 256;
  const double per_value = (kSteps - 1) / (high - low);
  auto get_step = [=](const Candidate& c) {
    return static_cast<int>((high - static_cast<double>(c.value)) * per_value);
  };
  spare.assign(items.begin() + search.first, items.begin() + search.last);
  std::array<double, kSteps> masses{};
  for (const auto& item : spare) masses[get_step(item)] += item.weight;
  int hit = 0;
  for (; hit < kSteps - 1 && !search.is_met(search.mass + masses[hit]); ++hit) {
    search.mass += masses[hit];
  }
  auto get_side = [=](const Candidate& c) {
    const int step = get_step(c);
    return (step >= hit) + (step > hit);
  };
  std::array<size_t, 3> counts{};
  for (const auto& item : spare) ++counts[get_side(item)];
  const size_t start = search.first;
  std::array<size_t, 3> next{start, start + counts[0], start + counts[0] + counts[1]};
  search.first = next[1];
  search.last = next[2];
  for (const auto& item : spare) items[next[get_side(item)]++] = item;
}

// Reorders the items so that the shortest prefix of the descending order whose mass meets the
// target comes first: all of them where rounding leaves the total short. Weights are positive,
// equal values stand in order of rising id, and there is at least one item.
inline Prefix find_prefix(std::vector<Candidate>& items, std::vector<Candidate>& spare,
                          double target, bool beyond) {
  constexpr size_t kSmall = 64;
  Crossing search{target, beyond, 0, items.size()};
  auto begin = [&] { return items.begin() + search.first; };
  auto end = [&] { return items.begin() + search.last; };
  while (search.last - search.first > kSmall) {
    const auto [low, high] = std::minmax_element(
        begin(), end(), [](const Candidate& a, const Candidate& b) { return a.value < b.value; });
    if (low->value == high->value) break;
    narrow(items, spare, search, low->value, high->value);
  }
  if (search.last - search.first <= kSmall) std::sort(begin(), end(), better);
  for (size_t i = search.first; i < search.last; ++i) {
    search.mass += items[i].weight;
    if (search.is_met(search.mass)) return {i + 1, search.mass};
  }
  return {search.last, search.mass};
}

inline double weigh(std::vector<Candidate>& items, float largest, double scale) {
  double mass = 0;
  for (size_t i = 0; i < items.size(); i += kWidth) {
    const size_t width = std::min<size_t>(kWidth, items.size() - i);
    Doubles x{};
    for (size_t j = 0; j < width; ++j) x[j] = get_shifted(items[i + j].value, largest) * scale;
    x = exp_nonpositive(x);
    for (size_t j = 0; j < width; ++j) mass += items[i + j].weight = x[j];
  }
  return mass;
}

// Drops candidates lighter than `least`, and weightless ones; returns the mass that stays.
inline double drop_lighter(std::vector<Candidate>& items, double least) {
  std::erase_if(items, [=](const Candidate& c) { return c.weight < least || c.weight <= 0; });
  double mass = 0;
  for (const auto& item : items) mass += item.weight;
  return mass;
}

// Lowest logit whose weight may reach `weight`, a little low, so that rounding loses none.
inline float get_threshold(float largest, double weight, double temperature) {
  if (largest == kInfinity) return largest;
  const double exact = largest + std::log(weight) * temperature;
  const double slack = 1e-6 * (std::abs(exact) + std::abs(static_cast<double>(largest)));
  return static_cast<float>(
      std::max(exact - slack, -static_cast<double>(std::numeric_limits<float>::max())));
}

// ---- one row ------------------------------------------------------------------------------------

struct RowSpec {
  double temperature, top_p, min_p;
  int64_t top_k;
  double uniform;
};

// What is needed again for the next row of the same thread; holds nothing between rows.
struct Scratch {
  std::vector<float> adjusted;
  std::vector<uint32_t> counts;  // all zero between rows
  std::vector<Candidate> near, far, spare;
};

// The tokens that may be drawn: `near` ones, and `far` ones collected only when reached.
class Distribution {
 public:
  Distribution(const float* x, int64_t vocab, float largest, const RowSpec& spec, Scratch& scratch)
      : x_(x), vocab_(vocab), largest_(largest), scale_(1 / spec.temperature),
        near_(scratch.near), far_(scratch.far), spare_(scratch.spare) {
    near_.clear();
    far_.clear();
    const double min_p = std::min(spec.min_p, 1.0);
    const bool few = spec.top_k > 0 && spec.top_k < vocab;
    if (few) {
      collect_top(x, vocab, spec.top_k, near_);
    } else {
      threshold_ = get_threshold(largest, min_p > 0 ? min_p : kFarWeight, spec.temperature);
      collect_near(x, vocab, threshold_, near_);
      has_far_ = min_p <= 0;
    }
    total_ = weigh(near_, largest, scale_);
    near_mass_ = drop_lighter(near_, min_p);
    if (!few && (has_far_ || spec.top_p < 1)) total_ = sum_exp(x, vocab, largest, scale_);
    mass_ = has_far_ ? total_ : near_mass_;
  }

  // Keeps the smallest set of most likely tokens with mass >= top_p of all before min-p.
  void keep_mass(double top_p) {
    const double target = top_p * total_;
    if (!is_far(target, false)) {
      const Prefix kept = find_prefix(near_, spare_, target, false);
      near_.resize(kept.count);
      mass_ = near_mass_ = kept.mass;
      has_far_ = false;
    } else if (has_far_) {
      const Prefix kept = find_prefix(far_, spare_, target - near_mass_, false);
      far_.resize(kept.count);
      mass_ = near_mass_ + kept.mass;
    }
  }

  int32_t draw(double uniform) {
    const double target = uniform * mass_;
    const bool far = is_far(target, true) && has_far_;
    auto& items = far ? far_ : near_;
    const Prefix drawn = find_prefix(items, spare_, far ? target - near_mass_ : target, true);
    return items[drawn.count - 1].token;
  }

 private:
  // Whether `target` lies behind the near tokens; collects the far ones, unless there are none.
  bool is_far(double target, bool beyond) {
    if (beyond ? target < near_mass_ : target <= near_mass_) return false;
    if (has_far_ && far_.empty()) {
      collect_far(x_, vocab_, threshold_, far_);
      weigh(far_, largest_, scale_);
      drop_lighter(far_, 0);
      has_far_ = !far_.empty();
    }
    return true;
  }

  const float* x_;
  int64_t vocab_;
  float largest_;
  double scale_;
  float threshold_ = 0;
  std::vector<Candidate>&near_, &far_, &spare_;
  bool has_far_ = false;
  double total_ = 0, near_mass_ = 0, mass_ = 0;
};

inline int32_t draw_row(const float* x, int64_t vocab, const RowSpec& spec, Scratch& scratch) {
  if (spec.temperature <= 0) return find_argmax(x, vocab);
  const float largest = find_max(x, vocab);
  if (largest == -kInfinity) return 0;
  Distribution distribution(x, vocab, largest, spec, scratch);
  if (spec.top_p < 1) distribution.keep_mass(spec.top_p);
  return distribution.draw(spec.uniform);
}

struct Adjustments {
  double repetition, presence, frequency;
  const int32_t* history;
  int64_t known, prompt;  // tokens of the history, and how many of those are prompt
  const int32_t* bias_tokens;
  const float* bias_values;
  int64_t biases;
  const uint8_t* mask;
  int64_t mask_bytes;  // 0 where every token may be drawn
};

// Leaves -inf where bit t % 8 of byte t / 8 is not set, and behind the last byte.
inline void apply_mask(float* x, int64_t vocab, const uint8_t* mask, int64_t bytes) {
  const int64_t covered = std::min(vocab, 8 * bytes);
  for (int64_t start = 0; start < covered; start += 8) {
    const uint8_t bits = mask[start / 8];
    if (bits == 0xFF) continue;
    const int64_t end = std::min(covered, start + 8);
    for (int64_t t = start; t < end; ++t) {
      if (!(bits >> (t - start) & 1)) x[t] = -kInfinity;
    }
  }
  std::fill(x + covered, x + vocab, -kInfinity);
}

// Copies the row and applies penalties, bias and mask (kernels/reference/sampling.py
// adjust_logits).
inline const float* adjust_row(const float* x, int64_t vocab, const Adjustments& p,
                               Scratch& scratch) {
  if (p.known == 0 && p.biases == 0 && p.mask_bytes == 0) return x;
  constexpr uint32_t kSeen = 1u << 31;  // beside the count of a token's occurrences in the output
  scratch.adjusted.assign(x, x + vocab);
  scratch.counts.resize(static_cast<size_t>(vocab));
  float* out = scratch.adjusted.data();
  uint32_t* counts = scratch.counts.data();
  for (int64_t i = 0; i < p.known; ++i) {
    uint32_t& count = counts[p.history[i]];
    count = (count | kSeen) + (i >= p.prompt ? 1 : 0);
  }
  for (int64_t i = 0; i < p.known; ++i) {
    const int32_t token = p.history[i];
    if (counts[token] == 0) continue;
    const uint32_t drawn = counts[token] & ~kSeen;
    counts[token] = 0;
    double value = clean(out[token]);
    value = value > 0 ? value / p.repetition : value * p.repetition;
    if (drawn > 0) value -= p.presence + p.frequency * drawn;
    out[token] = static_cast<float>(value);
  }
  for (int64_t i = 0; i < p.biases; ++i) {
    float& value = out[p.bias_tokens[i]];
    value = clean(value) + p.bias_values[i];
  }
  if (p.mask_bytes > 0) apply_mask(out, vocab, p.mask, p.mask_bytes);
  return out;
}

// Where one row's log-probabilities go: its own and `width` places for the most likely tokens.
struct Scored {
  float* logprob;
  int32_t* top_tokens;
  float* top_logprobs;
  int64_t width;
};

inline void score_row(const float* x, int64_t vocab, int32_t target, int32_t top, const Scored& out,
               Scratch& scratch) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  *out.logprob = kNan;
  std::fill_n(out.top_tokens, out.width, -1);
  std::fill_n(out.top_logprobs, out.width, kNan);
  if (top < 0) return;
  const float largest = find_max(x, vocab);
  const double log_mass =
      largest == -kInfinity ? kInfinity : std::log(sum_exp(x, vocab, largest, 1.0));
  auto get_logprob = [&](float value) {
    return static_cast<float>(get_shifted(clean(value), largest) - log_mass);
  };
  *out.logprob = get_logprob(x[target]);
  collect_top(x, vocab, std::min<int64_t>(top, out.width), scratch.near);
  for (size_t i = 0; i < scratch.near.size(); ++i) {
    out.top_tokens[i] = scratch.near[i].token;
    out.top_logprobs[i] = get_logprob(scratch.near[i].value);
  }
}

}  // namespace twostroke::sampling
