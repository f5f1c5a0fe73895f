// Python bindings of matrices, threads and recorded programs. Arrays are checked here, once, so
// that nothing a caller passes can make a kernel read or write outside its buffers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "program.h"
#include "sample_job.h"

namespace nb = nanobind;
using namespace twostroke;

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatTable = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const int32_t> as_span(const Ints& array) { return {array.data(), array.size()}; }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A program together with what it borrows, so that Python's lifetimes keep them alive.
struct BoundProgram {
  Program program;
  KvPool kv;
  int max_tokens, max_logit_rows;
  int vocab = 1 << 30, max_positions = 1 << 30;  // until an embedding or a rope says less

  BoundProgram(ThreadPool& pool, const std::string& kernels, Bytes memory, nb::tuple kv_shape,
               const std::string& element, int max_tokens, int max_logit_rows)
      : program(pool, get_kernels(kernels.c_str()), make_pool(memory, kv_shape, element), max_tokens,
                max_logit_rows),
        kv(make_pool(memory, kv_shape, element)),
        max_tokens(max_tokens),
        max_logit_rows(max_logit_rows) {}
  BoundProgram(const BoundProgram&) = delete;
  BoundProgram& operator=(const BoundProgram&) = delete;

  // kv_shape is (layers, blocks, kv_heads, head_dim); element as in kernels/ops.py: KVShape.
  static KvPool make_pool(const Bytes& memory, const nb::tuple& shape, const std::string& element) {
    KvPool pool{memory.data(),          nb::cast<int>(shape[0]), nb::cast<int>(shape[1]),
                nb::cast<int>(shape[2]), nb::cast<int>(shape[3]), parse_kv_element(element)};
    require(memory.size() == pool.bytes(), "the KV memory has not the size of its shape");
    return pool;
  }

  void check_step(const Ints& tokens, const Ints& positions, const Ints& offsets,
                  const IntTable& tables) const {
    const auto count = static_cast<int>(tokens.size());
    require(count > 0 && count <= max_tokens, "a step must hold 1 to max_tokens tokens");
    require(positions.size() == tokens.size(), "positions and tokens differ in length");
    require(offsets.size() == tables.shape(0) + 1, "row_offsets and block_tables differ in rows");
    require(offsets(0) == 0 && offsets(offsets.size() - 1) == count,
            "row_offsets must run from 0 to the number of tokens");
    for (int t = 0; t < count; ++t) {
      require(tokens(t) >= 0 && tokens(t) < vocab, "a token id is outside the vocabulary");
    }
    for (size_t r = 0; r + 1 < offsets.size(); ++r) {
      const int begin = offsets(r), end = offsets(r + 1);
      require(begin < end, "row_offsets must ascend");
      const int last = positions(begin) + (end - begin) - 1;
      require(positions(begin) >= 0 && last < max_positions, "a position is out of range");
      for (int t = begin; t < end; ++t) {
        require(positions(t) == positions(begin) + t - begin, "positions of a row must be consecutive");
      }
      const int blocks = last / kLanes + 1;
      require(blocks <= static_cast<int>(tables.shape(1)), "a block table is too short");
      for (int b = 0; b < blocks; ++b) {
        require(tables(r, b) >= 0 && tables(r, b) < kv.num_blocks, "a block id is outside the pool");
      }
    }
  }

  // The arrays of a StepArrays (kernels/ops.py), checked.
  StepView view_step(const Ints& tokens, const Ints& positions, const Ints& offsets,
                     const IntTable& tables) const {
    check_step(tokens, positions, offsets, tables);
    return {as_span(tokens), as_span(positions), as_span(offsets),
            {tables.data(), tables.size()}, static_cast<int>(tables.shape(1))};
  }

  void run_body(Ints tokens, Ints positions, Ints offsets, IntTable tables) {
    const StepView step = view_step(tokens, positions, offsets, tables);
    nb::gil_scoped_release release;
    program.run_body(step);
  }

  // A whole step in one call: layers, the logits of `step.logit_rows` into buffer `logits`, and a
  // token drawn from each as `arrays`, a SamplingArrays, says. Returns the fields of a Drawn.
  nb::tuple run_step(nb::handle step, int logits, nb::handle arrays) {
    const auto tokens = nb::cast<Ints>(step.attr("tokens"));
    const auto positions = nb::cast<Ints>(step.attr("positions"));
    const auto offsets = nb::cast<Ints>(step.attr("row_offsets"));
    const auto tables = nb::cast<IntTable>(step.attr("block_tables"));
    const auto rows = nb::cast<Ints>(step.attr("logit_rows"));
    const StepView view = view_step(tokens, positions, offsets, tables);
    require(static_cast<int>(rows.size()) <= max_logit_rows, "more logit rows than max_logit_rows");
    for (size_t i = 0; i < rows.size(); ++i) {
      require(rows(i) >= 0 && rows(i) < static_cast<int>(tokens.size()),
              "a logit row is outside the step");
    }
    sampling::SampleJob job({program.row(logits, 0), program.stride(logits),
                             static_cast<int64_t>(rows.size()), program.width(logits)},
                            arrays);
    {
      nb::gil_scoped_release release;
      program.run_step(view, as_span(rows), [&](int, int) { job.run(); });
    }
    return job.take();
  }

  void run_head(Ints rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
      require(rows(i) >= 0 && rows(i) < max_tokens, "a logit row is outside the step");
    }
    nb::gil_scoped_release release;
    program.run_head(as_span(rows));
  }

  // A view of `rows` rows of a buffer; valid until the next run.
  nb::ndarray<nb::numpy, float, nb::ndim<2>> view(nb::handle self, int buffer, int rows) {
    require(rows >= 0 && rows <= std::max(max_tokens, max_logit_rows), "too many rows");
    const size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(program.width(buffer))};
    const int64_t strides[2] = {static_cast<int64_t>(program.stride(buffer)), 1};
    return {program.row(buffer, 0), 2, shape, self, strides};
  }
};

size_t get_packed_bytes(Format format, int outputs, int inputs) {
  return Matrix(format, outputs, inputs, nullptr).bytes;
}

void require_packed(Format format, int outputs, int inputs, const uint8_t* memory, size_t bytes) {
  require(bytes == get_packed_bytes(format, outputs, inputs),
          "the memory has not the size of the packed matrix");
  require(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "packed memory must be aligned to 64");
}

std::vector<float> to_vector(const Floats& values) {
  return {values.data(), values.data() + values.size()};
}

void bind_recording(nb::class_<BoundProgram>& cls) {
  using P = BoundProgram;
  cls.def_static("row_stride", &Program::get_row_stride);
  cls.def("add_buffer", [](P& p, int width, int place) { return p.program.add_buffer(width, place); })
      .def("add_quantised",
           [](P& p, int width, int place) { return p.program.add_quantised(width, place); })
      .def("allocate", [](P& p) { p.program.allocate(); })
      .def("start_head", [](P& p) { p.program.start_head(); })
      .def("start_body", [](P& p) { p.program.start_body(); })
      .def("embed",
           [](P& p, const Matrix& table, int out, float scale, bool barrier) {
             p.vocab = table.outputs;
             p.program.embed(table, out, scale, barrier);
           },
           nb::keep_alive<1, 2>())
      .def("quantise",
           [](P& p, int in, int out, bool barrier) { p.program.quantise(in, out, barrier); })
      .def("linear",
           [](P& p, const Matrix& weight, int in, int out, Floats bias, bool barrier,
              const std::string& name) {
             p.program.linear(weight, in, out, to_vector(bias), barrier, name);
           },
           nb::keep_alive<1, 2>())
      .def("gated_linear",
           [](P& p, const Matrix& gate, const Matrix& up, int in, int out, Floats gate_bias,
              Floats up_bias, bool gelu, bool barrier, const std::string& name) {
             p.program.gated_linear(gate, up, in, out, to_vector(gate_bias), to_vector(up_bias),
                                    gelu, barrier, name);
           },
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("rms_norm",
           [](P& p, int in, int out, Floats weight, int groups, float eps, bool barrier) {
             p.program.rms_norm(in, out, to_vector(weight), groups, eps, barrier);
           })
      .def("rope",
           [](P& p, int buffer, int heads, FloatTable cos, FloatTable sin, bool interleaved,
              bool barrier) {
             require(static_cast<int>(cos.shape(1)) * 2 == p.kv.head_dim &&
                         cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1),
                     "rope tables must be (positions, head_dim / 2)");
             p.max_positions = std::min(p.max_positions, static_cast<int>(cos.shape(0)));
             p.program.rope(buffer, heads, {cos.data(), cos.size()}, {sin.data(), sin.size()},
                            interleaved, barrier);
           },
           nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("write_kv", [](P& p, int layer, int k, int v,
                          bool barrier) { p.program.write_kv(layer, k, v, barrier); })
      .def("attention",
           [](P& p, int layer, int q, int out, float scale, int window, bool barrier) {
             p.program.attention(layer, q, out, scale, window, barrier);
           })
      .def("gated", [](P& p, int gate, int up, int out, bool gelu,
                       bool barrier) { p.program.gated(gate, up, out, gelu, barrier); })
      .def("add", [](P& p, int a, int b, int out, bool barrier) { p.program.add(a, b, out, barrier); })
      .def("take_rows",
           [](P& p, int in, int out, bool barrier) { p.program.take_rows(in, out, barrier); });
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>())
      .def_prop_ro("size", &ThreadPool::size);

  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, const std::string& format, ConstBytes memory, int outputs, int inputs) {
             const Format parsed = parse_format(format);
             require_packed(parsed, outputs, inputs, memory.data(), memory.size());
             // Const in fact: nothing packs into a matrix that Python made.
             new (self) Matrix(parsed, outputs, inputs, const_cast<uint8_t*>(memory.data()));
           },
           nb::keep_alive<1, 3>())
      .def_ro("outputs", &Matrix::outputs)
      .def_ro("inputs", &Matrix::inputs)
      .def_ro("bytes", &Matrix::bytes)
      .def("read_row", [](const Matrix& matrix, int output) {
        require(output >= 0 && output < matrix.outputs, "no such output");
        std::vector<float> values(matrix.inputs);
        matrix.read_row(output, values.data());
        return values;
      });

  nb::class_<BoundProgram> cls(m, "Program");
  cls.def(nb::init<ThreadPool&, const std::string&, Bytes, nb::tuple, const std::string&, int, int>(),
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>())
      .def("run_body", &BoundProgram::run_body)
      .def("run_head", &BoundProgram::run_head)
      .def("run_step", &BoundProgram::run_step)
      .def("view", [](nb::handle_t<BoundProgram> self, int buffer,
                      int rows) { return nb::cast<BoundProgram&>(self).view(self, buffer, rows); })
      .def("take_times", [](BoundProgram& p) { return p.program.take_times(); })
      .def("number_parts", [](BoundProgram& p,
                              const std::vector<int>& parts) { p.program.number_parts(parts); })
      .def("take_part_times", [](BoundProgram& p) { return p.program.take_part_times(); })
      .def_prop_ro("arena_bytes", [](BoundProgram& p) { return p.program.arena_bytes(); });
  bind_recording(cls);

  m.def("pack", [](ThreadPool& pool, const std::string& format, ConstBytes file, Bytes memory,
                   int outputs, int inputs) {
    const Format parsed = parse_format(format);
    const FormatInfo& info = get_info(parsed);
    require_packed(parsed, outputs, inputs, memory.data(), memory.size());
    require(file.size() == static_cast<size_t>(outputs) * inputs / info.file_weights *
                               info.file_bytes,
            "the bytes given are not a matrix of this shape and format");
    Matrix matrix(parsed, outputs, inputs, memory.data());
    nb::gil_scoped_release release;
    pool.parallel([&](int thread, int threads) {
      const int tiles = matrix.num_tiles();
      matrix.pack(file.data(), tiles * thread / threads, tiles * (thread + 1) / threads);
    });
  });
  m.def("packed_bytes", [](const std::string& format, int outputs, int inputs) {
    return get_packed_bytes(parse_format(format), outputs, inputs);
  });
  m.def("layout_fingerprint", &get_layout_fingerprint);
  m.def("kernels_name", [](const std::string& name) { return get_kernels(name.c_str()).name; });
}
