#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace twostroke {
namespace {

constexpr int kStripRows = 16;  // rows that consecutive row-wise operations do together

size_t pad(size_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

std::vector<float> pad_values(std::vector<float> values) {
  values.resize(pad(values.size()), 0.0f);
  return values;
}

// This thread's share of `count` equal pieces; a single piece is thread 0's.
std::pair<int, int> get_share(int count, int thread, int threads) {
  const auto cut = [&](int t) {
    return static_cast<int>((static_cast<int64_t>(count) * t + threads - 1) / threads);
  };
  return {cut(thread), cut(thread + 1)};
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

Program::Program(ThreadPool& pool, const Kernels& kernels, KvPool kv, int max_tokens,
                 int max_logit_rows)
    : pool_(pool),
      kernels_(kernels),
      kv_(kv),
      max_tokens_(max_tokens),
      max_logit_rows_(max_logit_rows),
      scratch_(pool.size()) {
  if (kv.head_dim % kLanes != 0) throw std::invalid_argument("head_dim must be a multiple of 16");
  if (kv.element == KvElement::int8 && kv.head_dim > kMostInt8Dims) {
    throw std::invalid_argument("head_dim must be at most 1024 for int8 keys and values");
  }
}

size_t Program::get_row_stride(size_t width) {
  const size_t lines = (width + kLanes - 1) / kLanes;
  return (lines | 1) * kLanes;
}

int Program::add_buffer(int width, int place) {
  Arena& arena = recording_head_ ? head_arena_ : body_arena_;
  const size_t stride = get_row_stride(width);
  buffers_.push_back({width, stride, static_cast<size_t>(place), recording_head_});
  arena.width = std::max(arena.width, place + stride);
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::add_quantised(int width, int place) {
  if (width % kBlock != 0) throw std::invalid_argument("quantised rows hold whole blocks of 32");
  Arena& arena = recording_head_ ? head_arena_ : body_arena_;
  const auto size = static_cast<size_t>(width), start = static_cast<size_t>(place);
  quantised_buffers_.push_back({width, size, start, recording_head_});
  arena.quantised_width = std::max(arena.quantised_width, start + size);
  return static_cast<int>(quantised_buffers_.size()) - 1;
}

void Program::allocate() {
  body_arena_.rows = max_tokens_;
  head_arena_.rows = max_logit_rows_;
  body_arena_.allocate();
  head_arena_.allocate();
}

void Program::Arena::allocate() {
  const auto take = [](auto& values, size_t count) {
    using T = std::remove_reference_t<decltype(values[0])>;
    values.reset(static_cast<T*>(std::calloc(count + kLanes, sizeof(T))));
    if (values == nullptr) throw std::bad_alloc();
  };
  take(floats, rows * width);
  take(q, rows * quantised_width);
  take(scale, rows * quantised_width / kBlock);
  take(offset, rows * quantised_width / kBlock);
  take(sum16, rows * quantised_width / 16);
}

size_t Program::Arena::bytes() const {
  return rows * (width * sizeof(float) + quantised_width * (1 + 8.0 / kBlock + 4.0 / 16));
}

float* Program::row(int buffer, int index) {
  const Buffer& b = buffers_[buffer];
  const Arena& home = arena(b);
  return home.floats.get() + b.place * home.rows + static_cast<size_t>(index) * b.stride;
}

QuantisedRows Program::quantised(int buffer) const {
  const Buffer& b = quantised_buffers_[buffer];
  const Arena& home = arena(b);
  const size_t at = b.place * home.rows;
  return {home.q.get() + at, home.scale.get() + at / kBlock, home.offset.get() + at / kBlock,
          home.sum16.get() + at / 16};
}

void Program::record(std::string name, bool barrier, std::function<void(int, int)> run) {
  (recording_head_ ? head_ : body_).push_back({std::move(name), std::move(run), nullptr, barrier});
}

void Program::record_rows(std::string name, bool barrier, std::function<void(int, int)> rows) {
  (recording_head_ ? head_ : body_).push_back({std::move(name), nullptr, std::move(rows), barrier});
}

std::atomic<int>& Program::add_counter() {
  counters_.push_back(std::make_unique<std::atomic<int>>(0));
  return *counters_.back();
}

void Program::embed(const Matrix& table, int out, float scale, bool barrier) {
  record_rows("embed", barrier, [this, &table, out, scale](int first, int last) {
    for (int t = first; t < last; ++t) {
      float* target = row(out, t);
      table.read_row(step_.tokens[t], target);
      for (int i = 0; i < table.inputs; ++i) target[i] *= scale;
      std::fill(target + table.inputs, target + stride(out), 0.0f);
    }
  });
}

void Program::quantise(int in, int out, bool barrier) {
  record_rows("quantise", barrier, [this, in, out](int first, int last) {
    kernels_.quantise(row(in, 0), stride(in), width(in), quantised(out), first, last);
  });
}

void Program::linear(const Matrix& weight, int in, int out, std::vector<float> bias,
                     bool barrier, const std::string& name) {
  bias = pad_values(std::move(bias));
  record(name, barrier, [this, &weight, in, out, bias](int thread, int threads) {
    LinearArgs args{};
    args.weight = &weight;
    args.bias = bias.empty() ? nullptr : bias.data();
    if (is_float(weight.format)) {
      args.x = row(in, 0);
      args.x_stride = stride(in);
    } else {
      args.quantised = quantised(in);
    }
    args.y = row(out, 0);
    args.y_stride = stride(out);
    args.rows = rows();
    // Pairs of tiles, the width of a panel.
    const auto [first, last] = get_share((weight.num_tiles() + 1) / 2, thread, threads);
    kernels_.linear(args, 2 * first, std::min(2 * last, weight.num_tiles()));
  });
}

void Program::gated_linear(const Matrix& gate, const Matrix& up, int in, int out,
                           std::vector<float> gate_bias, std::vector<float> up_bias, bool gelu,
                           bool barrier, const std::string& name) {
  if (gate.outputs != up.outputs || gate.outputs % kBlock != 0) {
    throw std::invalid_argument("gate and up must have as many outputs, in whole blocks of 32");
  }
  if (is_float(gate.format) || is_float(up.format)) {
    throw std::invalid_argument("a gated product needs quantised weights");
  }
  gate_bias = pad_values(std::move(gate_bias));
  up_bias = pad_values(std::move(up_bias));
  record(name, barrier,
         [this, &gate, &up, in, out, gate_bias, up_bias, gelu](int thread, int threads) {
           GatedLinearArgs args{};
           args.gate.weight = &gate;
           args.gate.bias = gate_bias.empty() ? nullptr : gate_bias.data();
           args.gate.quantised = quantised(in);
           args.gate.rows = rows();
           args.up = args.gate;
           args.up.weight = &up;
           args.up.bias = up_bias.empty() ? nullptr : up_bias.data();
           args.gelu = gelu;
           args.out = quantised(out);
           const auto [first, last] = get_share(gate.outputs / kBlock, thread, threads);
           kernels_.gated_linear(args, first, last);
         });
}

void Program::rms_norm(int in, int out, std::vector<float> weight, int groups, float eps,
                       bool barrier) {
  const int width = static_cast<int>(weight.size());
  if (groups > 1 && width % kLanes != 0) {
    throw std::invalid_argument("grouped norms need a width that is a multiple of 16");
  }
  weight = pad_values(std::move(weight));
  record_rows("rms_norm", barrier, [this, in, out, weight, width, groups, eps](int first, int last) {
    kernels_.rms_norm(row(in, 0), row(out, 0), stride(in), weight.data(), width, groups, eps, first,
                      last);
  });
}

void Program::rope(int buffer, int heads, std::span<const float> cos, std::span<const float> sin,
                   bool interleaved, bool barrier) {
  record_rows("rope", barrier, [=, this](int first, int last) {
    kernels_.rope(row(buffer, 0), stride(buffer), heads, kv_.head_dim, cos.data(), sin.data(),
                  interleaved, step_.positions.data(), first, last);
  });
}

void Program::write_kv(int layer, int k, int v, bool barrier) {
  record_rows("write_kv", barrier, [this, layer, k, v](int first, int last) {
    kernels_.write_kv(kv_, layer, row(k, 0), row(v, 0), stride(k), kv_block_.data(),
                      kv_slot_.data(), first, last);
  });
}

void Program::attention(int layer, int q, int out, float scale, int window, bool barrier) {
  std::atomic<int>& next = add_counter();
  const int group = width(q) / (kv_.num_kv_heads * kv_.head_dim);
  max_group_ = std::max(max_group_, group);
  schedules_[window];
  AttentionArgs shape{};
  shape.kv = &kv_;
  shape.stride = stride(q);
  shape.layer = layer;
  shape.group = group;
  shape.window = window;
  shape.scale = scale;
  record("attention", barrier, [this, shape, q, out, &next](int thread, int) {
    attend(shape, q, out, next, thread);
  });
  record("merge", true, [this, group, window, out](int thread, int threads) {
    merge(schedules_[window], group, out, thread, threads);
  });
}

void Program::attend(const AttentionArgs& shape, int q, int out, std::atomic<int>& next,
                     int thread) {
  const Schedule& schedule = schedules_[shape.window];
  const int pieces = static_cast<int>(schedule.pieces.size()) - 1;
  const auto get_table = [&](const AttentionUnit& unit) {
    return step_.block_tables.data() + static_cast<size_t>(unit.row) * step_.max_blocks;
  };
  for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
    for (int u = schedule.pieces[i]; u < schedule.pieces[i + 1]; ++u) {
      const AttentionUnit& unit = schedule.units[u];
      AttentionArgs args = shape;
      const size_t head = static_cast<size_t>(unit.kv_head) * shape.group * kv_.head_dim;
      args.blocks = get_table(unit);
      args.q = row(q, unit.first_token) + head;
      args.y = row(out, unit.first_token) + head;
      args.kv_head = unit.kv_head;
      args.position = step_.positions[unit.first_token];
      args.tokens = unit.tokens;
      args.first_segment = unit.first_segment;
      args.last_segment = unit.last_segment;
      args.scratch = scratch_[thread].data();
      if (unit.partial >= 0) args.partial = partial(unit.partial);
      args.partial_stride = partial(unit.tokens) - partial(0);
      if (u + 1 < schedule.pieces[i + 1]) {  // what this thread will read next
        const AttentionUnit& after = schedule.units[u + 1];
        const int position = step_.positions[after.first_token];
        const int first = std::max(after.first_segment * kSegmentKeys / kLanes,
                                   get_first_block(position, shape.window));
        for (int b = 0; b < kAheadBlocks; ++b) {
          const int at = std::min(first + b, (position + after.tokens - 1) / kLanes);
          args.next[b] = kv_.keys(shape.layer, get_table(after)[at], after.kv_head);
        }
      }
      kernels_.attention(args);
    }
  }
}

void Program::merge(const Schedule& schedule, int group, int out, int thread, int threads) {
  int count = 0;
  for (const AttentionMerge& job : schedule.merges) count += job.tokens * group;
  const auto [first, last] = get_share(count, thread, threads);
  const int dim = kv_.head_dim;
  int done = 0;
  for (const AttentionMerge& job : schedule.merges) {
    const int vectors = job.tokens * group;
    const int end = std::min(vectors, last - done);
    for (int v = std::max(0, first - done); v < end; ++v) {
      kernels_.merge(partial(job.partial) + v * partial_floats(dim),
                     partial(job.tokens) - partial(0), job.segments, dim,
                     row(out, job.first_token + v / group) +
                         (static_cast<size_t>(job.kv_head) * group + v % group) * dim);
    }
    done += vectors;
  }
}

void Program::gated(int gate, int up, int out, bool gelu, bool barrier) {
  record_rows("gated", barrier, [this, gate, up, out, gelu](int first, int last) {
    kernels_.gated(row(gate, 0), row(up, 0), row(out, 0), stride(out), gelu, first, last);
  });
}

void Program::add(int a, int b, int out, bool barrier) {
  record_rows("add", barrier, [this, a, b, out](int first, int last) {
    kernels_.add(row(a, 0), row(b, 0), row(out, 0), stride(out), first, last);
  });
}

void Program::take_rows(int in, int out, bool barrier) {
  record_rows("take_rows", barrier, [this, in, out](int first, int last) {
    for (int i = first; i < last; ++i) {
      std::memcpy(row(out, i), row(in, logit_rows_[i]), stride(in) * sizeof(float));
    }
  });
}

void Program::prepare_body(const StepView& step) {
  for (auto& counter : counters_) counter->store(0, std::memory_order_relaxed);
  step_ = step;
  num_tokens_ = static_cast<int>(step.tokens.size());
  in_head_ = false;
  kv_block_.resize(num_tokens_);
  kv_slot_.resize(num_tokens_);
  for (size_t r = 0; r + 1 < step.row_offsets.size(); ++r) {
    for (int t = step.row_offsets[r]; t < step.row_offsets[r + 1]; ++t) {
      kv_block_[t] = step.block_tables[r * step.max_blocks + step.positions[t] / kLanes];
      kv_slot_[t] = step.positions[t] % kLanes;
    }
  }
  int partials = 0;
  for (auto& [window, schedule] : schedules_) {
    build_schedule(step, window, kv_.num_kv_heads, pool_.size(), schedule);
    partials = std::max(partials, schedule.partials);
  }
  const size_t floats = partial(partials) - partial(0);
  partials_.resize(std::max(partials_.size(), floats));
  const size_t scratch = attention_scratch_floats(max_group_, kv_.head_dim);
  for (auto& buffer : scratch_) buffer.resize(std::max(buffer.size(), scratch));
}

void Program::prepare_head(std::span<const int32_t> logit_rows) {
  if (static_cast<int>(logit_rows.size()) > max_logit_rows_) {
    throw std::invalid_argument("more logit rows than the program was made for");
  }
  logit_rows_.assign(logit_rows.begin(), logit_rows.end());
  num_logit_rows_ = static_cast<int>(logit_rows.size());
}

void Program::run_body(const StepView& step) {
  prepare_body(step);
  pool_.parallel([&](int thread, int threads) { walk(body_, thread, threads); });
}

void Program::run_head(std::span<const int32_t> logit_rows) {
  prepare_head(logit_rows);
  in_head_ = true;
  pool_.parallel([&](int thread, int threads) { walk(head_, thread, threads); });
}

void Program::run_step(const StepView& step, std::span<const int32_t> logit_rows,
                       const std::function<void(int, int)>& finish) {
  prepare_body(step);
  prepare_head(logit_rows);
  pool_.parallel([&](int thread, int threads) {
    walk(body_, thread, threads);
    if (logit_rows.empty()) return;
    pool_.barrier();
    if (thread == 0) in_head_ = true;
    pool_.barrier();
    walk(head_, thread, threads);
    const int64_t before = thread == 0 ? now_ns() : 0;
    pool_.barrier();
    finish(thread, threads);
    if (thread != 0) return;
    const int64_t taken = now_ns() - before;
    finish_ns_ += taken;
    part_ns_[finish_part_] += taken;
  });
}

void Program::walk(std::vector<Op>& ops, int thread, int threads) {
  int64_t before = thread == 0 ? now_ns() : 0;
  const auto take_time = [&](Op& op) {
    if (thread != 0) return;
    const int64_t now = now_ns();
    op.time_ns += now - before;
    part_ns_[op.part] += now - before;
    before = now;
  };
  const auto [first_row, last_row] = get_share(rows(), thread, threads);
  for (size_t i = 0; i < ops.size();) {
    if (ops[i].barrier) pool_.barrier();
    if (ops[i].run) {
      ops[i].run(thread, threads);
      take_time(ops[i++]);
      continue;
    }
    size_t end = i + 1;
    while (end < ops.size() && ops[end].rows && !ops[end].barrier) ++end;
    for (int row = first_row; row < last_row; row += kStripRows) {
      for (size_t j = i; j < end; ++j) {
        ops[j].rows(row, std::min(row + kStripRows, last_row));
        take_time(ops[j]);
      }
    }
    i = end;
  }
}

std::vector<std::pair<std::string, int64_t>> Program::take_times() {
  std::vector<std::pair<std::string, int64_t>> times;
  for (auto* ops : {&body_, &head_}) {
    for (Op& op : *ops) {
      times.emplace_back(op.name, op.time_ns);
      op.time_ns = 0;
    }
  }
  times.emplace_back("draw", std::exchange(finish_ns_, 0));
  return times;
}

void Program::number_parts(const std::vector<int>& parts) {
  if (parts.size() != body_.size() + head_.size() + 1) {
    throw std::invalid_argument("one part for each operation, and one for draws");
  }
  if (*std::min_element(parts.begin(), parts.end()) < 0) {
    throw std::invalid_argument("parts are numbered from 0");
  }
  size_t next = 0;
  for (auto* ops : {&body_, &head_}) {
    for (Op& op : *ops) op.part = parts[next++];
  }
  finish_part_ = parts[next];
  part_ns_.assign(*std::max_element(parts.begin(), parts.end()) + 1, 0);
}

std::vector<int64_t> Program::take_part_times() {
  std::vector<int64_t> times(part_ns_.size(), 0);
  times.swap(part_ns_);
  return times;
}

}  // namespace twostroke
