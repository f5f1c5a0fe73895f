// The Python face of drawing and scoring: checks arrays, deals rows out to threads.
//
// Owns no arithmetic (native/draw.h does). It must never let a token id or an offset that does not
// fit reach a row, and never divide the work inside a row.
#include "sample_job.h"

#include <algorithm>
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
struct RowAnswers {
  RowAnswers(int64_t rows, int64_t vocab, const int32_t* top)
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

}  // namespace

// The fields of a SamplingArrays.
struct SampleJob::Arrays {
  Arrays(nb::handle arrays, int64_t rows)
      : temperature(get_array<float>(arrays, "temperature", rows)),
        top_p(get_array<float>(arrays, "top_p", rows)),
        min_p(get_array<float>(arrays, "min_p", rows)),
        repetition(get_array<float>(arrays, "repetition", rows)),
        presence(get_array<float>(arrays, "presence", rows)),
        frequency(get_array<float>(arrays, "frequency", rows)),
        bias_values(get_array<float>(arrays, "bias_values", -1)),
        top_k(get_array<int32_t>(arrays, "top_k", rows)),
        bias_offsets(get_array<int32_t>(arrays, "bias_offsets", rows + 1)),
        bias_tokens(get_array<int32_t>(arrays, "bias_tokens", bias_values.size())),
        history_offsets(get_array<int32_t>(arrays, "history_offsets", rows + 1)),
        history(get_array<int32_t>(arrays, "history_tokens", -1)),
        prompt(get_array<int32_t>(arrays, "history_prompt", rows)),
        mask_offsets(get_array<int32_t>(arrays, "mask_offsets", rows + 1)),
        mask(get_array<uint8_t>(arrays, "mask_bytes", -1)),
        top(get_array<int32_t>(arrays, "top", rows)),
        seed(get_array<uint64_t>(arrays, "seed", rows)),
        counter(get_array<uint64_t>(arrays, "counter", rows, 2)) {}

  Input<float> temperature, top_p, min_p, repetition, presence, frequency, bias_values;
  Input<int32_t> top_k, bias_offsets, bias_tokens, history_offsets, history, prompt, mask_offsets, top;
  Input<uint8_t> mask;
  Input<uint64_t> seed, counter;
};

struct SampleJob::Answer : RowAnswers {
  using RowAnswers::RowAnswers;
};

SampleJob::SampleJob(const LogitRows& logits, nb::handle arrays)
    : logits_(logits), arrays_(std::make_unique<Arrays>(arrays, logits.rows)) {
  const Arrays& a = *arrays_;
  const int64_t rows = logits.rows, vocab = logits.vocab;
  check_offsets(a.bias_offsets.data(), rows, a.bias_tokens.size());
  check_offsets(a.history_offsets.data(), rows, a.history.size());
  check_offsets(a.mask_offsets.data(), rows, a.mask.size());
  check_tokens(a.bias_tokens.data(), a.bias_tokens.size(), vocab);
  check_tokens(a.history.data(), a.history.size(), vocab);
  if (vocab == 0) throw std::invalid_argument("an empty vocabulary has no token to draw");
  answer_ = std::make_unique<Answer>(rows, vocab, a.top.data());
}

SampleJob::~SampleJob() = default;

nb::tuple SampleJob::take() const { return answer_->take(); }

void SampleJob::run() {
  Scratch scratch;
  for (int64_t row; (row = next_.fetch_add(1)) < logits_.rows;) draw(row, scratch);
}

void SampleJob::draw(int64_t r, Scratch& scratch) {
  const Arrays& a = *arrays_;
  const int64_t vocab = logits_.vocab;
  const float* x = logits_.data + r * logits_.stride;
  const int32_t known = a.history_offsets.data()[r], bias = a.bias_offsets.data()[r];
  const int32_t mask = a.mask_offsets.data()[r];
  const Adjustments adjustments{
      a.repetition.data()[r], a.presence.data()[r], a.frequency.data()[r],
      a.history.data() + known, a.history_offsets.data()[r + 1] - known, a.prompt.data()[r],
      a.bias_tokens.data() + bias, a.bias_values.data() + bias,
      a.bias_offsets.data()[r + 1] - bias,
      a.mask.data() + mask, a.mask_offsets.data()[r + 1] - mask};
  const RowSpec spec{
      a.temperature.data()[r], a.top_p.data()[r], a.min_p.data()[r], a.top_k.data()[r],
      get_uniform(a.seed.data()[r], a.counter.data()[2 * r], a.counter.data()[2 * r + 1])};
  const int32_t token = draw_row(adjust_row(x, vocab, adjustments, scratch), vocab, spec, scratch);
  answer_->tokens.data[r] = token;
  score_row(x, vocab, token, a.top.data()[r], answer_->get_row(r), scratch);
}

namespace {

nb::tuple sample(Logits logits, nb::handle arrays, ThreadPool* pool) {
  const auto rows = static_cast<int64_t>(logits.shape(0));
  const auto vocab = static_cast<int64_t>(logits.shape(1));
  SampleJob job({logits.data(), logits.shape(1), rows, vocab}, arrays);
  {
    nb::gil_scoped_release release;
    if (pool != nullptr && rows > 1) {
      pool->parallel([&](int, int) { job.run(); });
    } else {
      job.run();
    }
  }
  return job.take();
}

nb::tuple score(Logits logits, Input<int32_t, nb::ndim<1>> targets,
                Input<int32_t, nb::ndim<1>> top, ThreadPool* pool) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  if (static_cast<int64_t>(targets.size()) != rows || static_cast<int64_t>(top.size()) != rows) {
    throw std::invalid_argument("targets and top need one entry per row of logits");
  }
  check_tokens(targets.data(), rows, vocab);
  const RowAnswers answer(rows, vocab, top.data());
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
