// A forward pass, recorded once as a list of operations on numbered buffers and replayed for any
// step.
//
// Owns the activations (one arena), the step's inputs and the list. Weights, KV pool and threads
// are borrowed and must outlive it. Operations live in two sections: the body runs over all T
// tokens of a step, the head over up to `max_logit_rows` of its positions at a time. All threads
// walk the list together; an operation recorded with `barrier` waits until the earlier ones are
// complete. Row-wise operations that follow each other without a barrier are done a few rows at a
// time, all of them, so that what one writes is still near when the next reads it. Not safe to run from two threads at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "schedule.h"

namespace twostroke {

class Program {
 public:
  Program(ThreadPool& pool, const Kernels& kernels, KvPool kv, int max_tokens, int max_logit_rows);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // Floats from one row of a buffer to the next: an odd number of cache lines, so that the same
  // column of many rows does not meet in a few sets of a cache.
  static size_t get_row_stride(size_t width);
  // A float buffer of `width` values a row, in the arena of the section being recorded. `place` is
  // where it starts there, in floats a row: buffers whose lives do not overlap may share a place.
  int add_buffer(int width, int place);
  // A buffer of quantised rows of `width` values.
  int add_quantised(int width, int place);
  // Buffers and operations added from here on belong to the head, or to the body.
  void start_head() { recording_head_ = true; }
  void start_body() { recording_head_ = false; }
  // Allocates the arenas; to be called once, after the last buffer was added.
  void allocate();

  void embed(const Matrix& table, int out, float scale, bool barrier);
  void quantise(int in, int out, bool barrier);
  void linear(const Matrix& weight, int in, int out, std::vector<float> bias, bool barrier,
              const std::string& name);
  // quantised act(in * gate) * (in * up); `in` and `out` are quantised buffers.
  void gated_linear(const Matrix& gate, const Matrix& up, int in, int out,
                    std::vector<float> gate_bias, std::vector<float> up_bias, bool gelu,
                    bool barrier, const std::string& name);
  void rms_norm(int in, int out, std::vector<float> weight, int groups, float eps, bool barrier);
  void rope(int buffer, int heads, std::span<const float> cos, std::span<const float> sin,
            bool interleaved, bool barrier);
  void write_kv(int layer, int k, int v, bool barrier);
  void attention(int layer, int q, int out, float scale, int window, bool barrier);
  void gated(int gate, int up, int out, bool gelu, bool barrier);
  void add(int a, int b, int out, bool barrier);
  void take_rows(int in, int out, bool barrier);

  void run_body(const StepView& step);
  // Runs the head for these positions of the last body; at most max_logit_rows of them.
  void run_head(std::span<const int32_t> logit_rows);
  // Both without a pause, then `finish` on every thread over the finished logits. Without logit
  // rows it runs the body only.
  void run_step(const StepView& step, std::span<const int32_t> logit_rows,
                const std::function<void(int, int)>& finish);

  float* row(int buffer, int index);
  int width(int buffer) const { return buffers_[buffer].width; }
  size_t stride(int buffer) const { return buffers_[buffer].stride; }
  size_t arena_bytes() const { return body_arena_.bytes() + head_arena_.bytes(); }

  // Nanoseconds spent in each operation (waiting at its barrier included) since the last call,
  // with its name, and as "draw" in what `run_step` did with the logits; counted on thread 0.
  std::vector<std::pair<std::string, int64_t>> take_times();
  // Operations are added up by part, too: a number for each, in the order of `take_times`.
  void number_parts(const std::vector<int>& parts);
  // Nanoseconds of each numbered part since the last call.
  std::vector<int64_t> take_part_times();

 private:
  struct Buffer {
    int width;
    size_t stride, place;
    bool head;
  };
  // One section's activations; memory is taken from the system zeroed and only when touched.
  struct Arena {
    template <class T>
    using Values = std::unique_ptr<T[], decltype(&std::free)>;
    size_t rows = 0, width = 0, quantised_width = 0;
    Values<float> floats{nullptr, &std::free}, scale{nullptr, &std::free},
        offset{nullptr, &std::free};
    Values<int8_t> q{nullptr, &std::free};
    Values<int32_t> sum16{nullptr, &std::free};

    void allocate();
    size_t bytes() const;
  };
  // Either `rows`, which does its rows first <= row < last whatever the others do, or `run`, which
  // is told thread and threads and divides the work itself.
  struct Op {
    std::string name;
    std::function<void(int, int)> run, rows;
    bool barrier;
    int64_t time_ns = 0;
    int part = 0;
  };
  void record(std::string name, bool barrier, std::function<void(int, int)> run);
  void prepare_body(const StepView& step);
  void prepare_head(std::span<const int32_t> logit_rows);
  void record_rows(std::string name, bool barrier, std::function<void(int, int)> rows);
  void walk(std::vector<Op>& ops, int thread, int threads);
  std::atomic<int>& add_counter();
  void attend(const AttentionArgs& shape, int q, int out, std::atomic<int>& next, int thread);
  void merge(const Schedule& schedule, int group, int out, int thread, int threads);
  // Where the partial results of this number begin; each is a vector for every head of a group.
  float* partial(int number) {
    return partials_.data() + static_cast<size_t>(number) * max_group_ * partial_floats(kv_.head_dim);
  }
  QuantisedRows quantised(int buffer) const;
  int rows() const { return in_head_ ? num_logit_rows_ : num_tokens_; }
  const Arena& arena(const Buffer& buffer) const { return buffer.head ? head_arena_ : body_arena_; }

  ThreadPool& pool_;
  const Kernels& kernels_;
  KvPool kv_;
  int max_tokens_, max_logit_rows_, max_group_ = 1;
  std::vector<Buffer> buffers_, quantised_buffers_;
  Arena body_arena_, head_arena_;
  bool recording_head_ = false, in_head_ = false;
  std::vector<Op> body_, head_;
  std::vector<std::unique_ptr<std::atomic<int>>> counters_;  // of attention ops
  std::map<int, Schedule> schedules_;  // by window: how this step's attention is divided

  int64_t finish_ns_ = 0;
  int finish_part_ = 0;
  std::vector<int64_t> part_ns_{0};
  int num_tokens_ = 0, num_logit_rows_ = 0;
  StepView step_{};
  std::vector<int32_t> kv_block_, kv_slot_, token_row_, logit_rows_;
  std::vector<float> partials_;
  std::vector<std::vector<float>> scratch_;  // by thread
};

}  // namespace twostroke
