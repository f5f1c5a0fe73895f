// The Python face of drawing and scoring: checks arrays, deals rows out to threads.
//
// Owns no arithmetic (native/draw.h does). It must never let a token id or an offset that does not
// fit reach a row, and never divide the work inside a row.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "draw.h"
#include "pool.h"

namespace nb = nanobind;

namespace twostroke::sampling {
namespace {

template <class T, class... Shape>
using Input = nb::ndarray<const T, nb::device::cpu, nb::c_contig, Shape...>;
using Logits = Input<float, nb::ndim<2>>;

// A one-dimensional array (or, with `columns`, a two-dimensional one) of a known number of rows.
template <class T>
Input<T> get_array(nb::handle owner, const char* name, int64_t rows, int64_t columns = 1) {
  auto array = nb::cast<Input<T>>(owner.attr(name));
  if (rows >= 0 && static_cast<int64_t>(array.size()) != rows * columns) {
    throw std::invalid_argument(std::string(name) + " does not fit the number of rows");
  }
  return array;
}

void check_tokens(const int32_t* tokens, int64_t count, int64_t vocab) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab) {
      throw std::invalid_argument("token id " + std::to_string(tokens[i]) +
                                  " is outside the vocabulary of " + std::to_string(vocab));
    }
  }
}

void check_offsets(const int32_t* offsets, int64_t rows, int64_t end) {
  bool rising = offsets[0] == 0 && offsets[rows] == end;
  for (int64_t i = 0; i < rows; ++i) rising = rising && offsets[i] <= offsets[i + 1];
  if (!rising) throw std::invalid_argument("offsets do not rise from 0 to the number of entries");
}

// A new NumPy array that owns its memory.
template <class T>
struct Output {
  explicit Output(std::vector<size_t> extents) : shape(std::move(extents)) {
    size_t size = 1;
    for (size_t extent : shape) size *= extent;
    data = new T[std::max<size_t>(size, 1)];
    owner = nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  }
  nb::object take() const {
    return nb::cast(nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner));
  }
  std::vector<size_t> shape;
  T* data;
  nb::capsule owner;
};

// The four arrays of a `Drawn`, filled row by row.
struct Answer {
  Answer(int64_t rows, int64_t vocab, const int32_t* top)
      : width(std::min<int64_t>(vocab, rows ? std::max(0, *std::max_element(top, top + rows)) : 0)),
        tokens({static_cast<size_t>(rows)}), logprobs({static_cast<size_t>(rows)}),
        top_tokens({static_cast<size_t>(rows), static_cast<size_t>(width)}),
        top_logprobs({static_cast<size_t>(rows), static_cast<size_t>(width)}) {}
  Scored get_row(int64_t row) const {
    return {logprobs.data + row, top_tokens.data + row * width, top_logprobs.data + row * width,
            width};
  }
  nb::tuple take() const {
    return nb::make_tuple(tokens.take(), logprobs.take(), top_tokens.take(), top_logprobs.take());
  }
  int64_t width;
  Output<int32_t> tokens;
  Output<float> logprobs;
  Output<int32_t> top_tokens;
  Output<float> top_logprobs;
};

// Runs fn(row, scratch) for every row, dealt out one by one so that slow rows spread.
template <class Fn>
void for_each_row(ThreadPool* pool, int64_t rows, const Fn& fn) {
  nb::gil_scoped_release release;
  std::atomic<int64_t> next{0};
  auto work = [&](int, int) {
    Scratch scratch;
    for (int64_t row; (row = next.fetch_add(1)) < rows;) fn(row, scratch);
  };
  if (pool != nullptr && rows > 1) {
    pool->parallel(work);
  } else {
    work(0, 1);
  }
}

nb::tuple sample(Logits logits, nb::handle arrays, ThreadPool* pool) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  const auto temperature = get_array<float>(arrays, "temperature", rows);
  const auto top_k = get_array<int32_t>(arrays, "top_k", rows);
  const auto top_p = get_array<float>(arrays, "top_p", rows);
  const auto min_p = get_array<float>(arrays, "min_p", rows);
  const auto repetition = get_array<float>(arrays, "repetition", rows);
  const auto presence = get_array<float>(arrays, "presence", rows);
  const auto frequency = get_array<float>(arrays, "frequency", rows);
  const auto seed = get_array<uint64_t>(arrays, "seed", rows);
  const auto counter = get_array<uint64_t>(arrays, "counter", rows, 2);
  const auto bias_offsets = get_array<int32_t>(arrays, "bias_offsets", rows + 1);
  const auto bias_tokens = get_array<int32_t>(arrays, "bias_tokens", -1);
  const auto bias_values = get_array<float>(arrays, "bias_values", bias_tokens.size());
  const auto history_offsets = get_array<int32_t>(arrays, "history_offsets", rows + 1);
  const auto history = get_array<int32_t>(arrays, "history_tokens", -1);
  const auto prompt = get_array<int32_t>(arrays, "history_prompt", rows);
  const auto top = get_array<int32_t>(arrays, "top", rows);
  check_offsets(bias_offsets.data(), rows, bias_tokens.size());
  check_offsets(history_offsets.data(), rows, history.size());
  check_tokens(bias_tokens.data(), bias_tokens.size(), vocab);
  check_tokens(history.data(), history.size(), vocab);
  if (vocab == 0) throw std::invalid_argument("an empty vocabulary has no token to draw");

  const Answer answer(rows, vocab, top.data());
  for_each_row(pool, rows, [&](int64_t r, Scratch& scratch) {
    const float* x = logits.data() + r * vocab;
    const int32_t known = history_offsets.data()[r], bias = bias_offsets.data()[r];
    const Penalties penalties{
        repetition.data()[r], presence.data()[r], frequency.data()[r],
        history.data() + known, history_offsets.data()[r + 1] - known, prompt.data()[r],
        bias_tokens.data() + bias, bias_values.data() + bias, bias_offsets.data()[r + 1] - bias};
    const RowSpec spec{
        temperature.data()[r], top_p.data()[r], min_p.data()[r], top_k.data()[r],
        get_uniform(seed.data()[r], counter.data()[2 * r], counter.data()[2 * r + 1])};
    const int32_t token = draw_row(adjust_row(x, vocab, penalties, scratch), vocab, spec, scratch);
    answer.tokens.data[r] = token;
    score_row(x, vocab, token, top.data()[r], answer.get_row(r), scratch);
  });
  return answer.take();
}

nb::tuple score(Logits logits, Input<int32_t, nb::ndim<1>> targets,
                Input<int32_t, nb::ndim<1>> top, ThreadPool* pool) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  if (static_cast<int64_t>(targets.size()) != rows || static_cast<int64_t>(top.size()) != rows) {
    throw std::invalid_argument("targets and top need one entry per row of logits");
  }
  check_tokens(targets.data(), rows, vocab);
  const Answer answer(rows, vocab, top.data());
  for_each_row(pool, rows, [&](int64_t r, Scratch& scratch) {
    const int32_t target = targets.data()[r];
    answer.tokens.data[r] = target;
    score_row(logits.data() + r * vocab, vocab, target, top.data()[r], answer.get_row(r), scratch);
  });
  return answer.take();
}

}  // namespace
}  // namespace twostroke::sampling

void bind_sampling(nb::module_& m) {
  m.def("sample", &twostroke::sampling::sample, nb::arg("logits"), nb::arg("arrays"),
        nb::arg("pool").none() = nb::none(),
        "Draw one token per row: logits (L, vocab) float32, a SamplingArrays, a thread pool or "
        "None. Returns the fields of a Drawn.");
  m.def("score", &twostroke::sampling::score, nb::arg("logits"), nb::arg("targets"), nb::arg("top"),
        nb::arg("pool").none() = nb::none(),
        "Log-probability of each row's target (L,) int32 with the `top` (L,) int32 most likely "
        "tokens. Returns the fields of a Drawn.");
}
