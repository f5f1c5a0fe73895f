// Rows of logits to draw tokens from, given as Python arrays: checked once, then drawn by any number
// of threads side by side.
//
// Owns the answer's arrays. The logits are borrowed and need not be there before `run`; the arrays
// are kept alive. It must never let a token id or an offset that does not fit reach a row, and
// never divide the work inside a row.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <cstdint>
#include <memory>

namespace twostroke::sampling {

struct LogitRows {  // row r begins at data + r * stride
  const float* data;
  size_t stride;
  int64_t rows, vocab;
};

class SampleJob {
 public:
  // `arrays` is a SamplingArrays (kernels/ops.py). Throws std::invalid_argument. Needs the GIL, as
  // do `take` and the destructor.
  SampleJob(const LogitRows& logits, nanobind::handle arrays);
  ~SampleJob();
  SampleJob(const SampleJob&) = delete;
  SampleJob& operator=(const SampleJob&) = delete;

  // Draws rows until none is left; to be called on every thread that shall help.
  void run();
  // The fields of a Drawn, once every `run` has returned.
  nanobind::tuple take() const;

 private:
  struct Arrays;
  struct Answer;
  void draw(int64_t row, struct Scratch& scratch);

  LogitRows logits_;
  std::unique_ptr<Arrays> arrays_;
  std::unique_ptr<Answer> answer_;
  std::atomic<int64_t> next_{0};
};

}  // namespace twostroke::sampling
