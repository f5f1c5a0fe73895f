// What this machine can do at most: bytes read from memory, float32 and int8 arithmetic.
//
// Owns three short measurements that everything reported as "share of the limit" divides by. Each
// runs in windows of a few milliseconds on all its threads, which start and end a window together,
// and answers (sustained, best): the median window and the fastest one. The loops do nothing but
// the work measured, on the widest instructions this processor has.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(TWOSTROKE_X86)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nb = nanobind;

namespace twostroke::limits {
namespace {

using Clock = std::chrono::steady_clock;
using Rates = std::pair<double, double>;  // sustained, best

constexpr double kWindowSeconds = 0.008;
constexpr size_t kHugePage = size_t{2} << 20;

double get_seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs work(thread, repeats) on all threads, window after window, for `seconds`. `units` is what
// one repeat does on all threads together. The first windows double `repeats` until a window is
// long enough for the clock; they also warm the machine up and are not counted.
Rates measure(int threads, double seconds, double units,
              const std::function<void(int, int64_t)>& work) {
  std::vector<double> rates;
  std::barrier gate(threads);
  int64_t repeats = 1;
  bool running = true;  // written by thread 0 between two gates, read by all after the second
  auto run = [&](int thread) {
    const Clock::time_point begin = Clock::now();
    while (running) {
      gate.arrive_and_wait();
      const Clock::time_point start = Clock::now();
      work(thread, repeats);
      gate.arrive_and_wait();
      if (thread == 0) {
        const double elapsed = get_seconds_since(start);
        if (elapsed < kWindowSeconds && rates.empty()) {
          repeats *= 2;
        } else {
          rates.push_back(units * static_cast<double>(repeats) / elapsed);
        }
        running = rates.size() < 3 || get_seconds_since(begin) < seconds;
      }
      gate.arrive_and_wait();
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (auto& other : others) other.join();
  std::sort(rates.begin(), rates.end());
  return {rates[rates.size() / 2], rates.back()};
}

// ---- memory -------------------------------------------------------------------------------------

// A buffer in huge pages where the system gives them, so that page walks are not what is measured.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{kHugePage}));
#if defined(__linux__)
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{kHugePage}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  size_t bytes_;
};

// Keeps a result alive without storing it.
template <class T>
inline void keep(const T& value) {
  asm volatile("" : : "m"(value) : "memory");
}

// Reads `bytes` (a multiple of 512) once, one stream forward.
void read_all(const uint8_t* data, size_t bytes) {
  typedef uint64_t Line __attribute__((vector_size(32)));
  Line sums[8] = {};
  for (size_t at = 0; at < bytes; at += sizeof(sums)) {
    for (int j = 0; j < 8; ++j) {
      Line line;
      std::memcpy(&line, data + at + j * sizeof(Line), sizeof(Line));
      sums[j] ^= line;
    }
  }
  for (const auto& sum : sums) keep(sum);
}

Rates measure_read_bandwidth(int threads, size_t bytes, double seconds) {
  const size_t part = bytes / static_cast<size_t>(threads) / 4096 * 4096;
  if (part == 0) throw std::invalid_argument("bytes: fewer than a page for each thread");
  const Buffer buffer(part * static_cast<size_t>(threads));
  auto get_part = [&](int thread) { return buffer.data() + part * static_cast<size_t>(thread); };
  // Each thread writes its own part first: untouched pages would all be the one page of zeros.
  std::vector<std::thread> writers;
  for (int thread = 0; thread < threads; ++thread) {
    writers.emplace_back([&, thread] { std::memset(get_part(thread), 1, part); });
  }
  for (auto& writer : writers) writer.join();
  return measure(threads, seconds, static_cast<double>(part) * threads,
                 [&](int thread, int64_t repeats) {
                   for (int64_t i = 0; i < repeats; ++i) read_all(get_part(thread), part);
                 });
}

// ---- arithmetic ---------------------------------------------------------------------------------

// Independent sums: enough to hide the latency of four cycles at two instructions a cycle, few
// enough for sixteen registers.
constexpr int kChains = 12;
constexpr int64_t kSteps = 4096;  // steps of all chains in one repeat

struct Loop {
  void (*run)(int64_t repeats);
  double ops_per_step;  // operations of one step over all chains; a multiply-add is two
};

void run_portable_fp32(int64_t repeats) {
  typedef float Quad __attribute__((vector_size(16)));
  float start[kChains * 4] = {};
  keep(start);  // from here the compiler may not assume that the sums are equal
  Quad sums[kChains];
  std::memcpy(sums, start, sizeof(start));
  for (int64_t i = 0; i < repeats * kSteps; ++i) {
    for (auto& sum : sums) sum = sum * 0.999f + 1.0f;
  }
  for (const auto& sum : sums) keep(sum);
}

void run_portable_int8(int64_t repeats) {
  constexpr int kWidth = 16;
  int8_t left[kWidth], right[kWidth];
  std::memset(left, 3, sizeof(left));
  std::memset(right, 5, sizeof(right));
  int32_t sums[kWidth] = {};
  for (int64_t i = 0; i < repeats * kSteps; ++i) {
    keep(left);
    for (int j = 0; j < kWidth; ++j) sums[j] += int32_t{left[j]} * right[j];
    keep(sums);
  }
}

#if defined(TWOSTROKE_X86)

// Makes a value opaque to the compiler, which would otherwise see that all sums are equal and
// compute one.
#define TWOSTROKE_HIDE(value) asm volatile("" : "+x"(value))

__attribute__((target("avx512f"))) void run_avx512_fp32(int64_t repeats) {
  __m512 sums[kChains] = {};
  for (auto& sum : sums) TWOSTROKE_HIDE(sum);
  const __m512 factor = _mm512_set1_ps(0.999f), addend = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < repeats * kSteps; ++i) {
    for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, factor, addend);
  }
  for (const auto& sum : sums) keep(sum);
}

__attribute__((target("avx2,fma"))) void run_avx2_fp32(int64_t repeats) {
  __m256 sums[kChains] = {};
  for (auto& sum : sums) TWOSTROKE_HIDE(sum);
  const __m256 factor = _mm256_set1_ps(0.999f), addend = _mm256_set1_ps(1.0f);
  for (int64_t i = 0; i < repeats * kSteps; ++i) {
    for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, factor, addend);
  }
  for (const auto& sum : sums) keep(sum);
}

__attribute__((target("avx512f,avx512vnni"))) void run_avx512_int8(int64_t repeats) {
  __m512i sums[kChains] = {};
  for (auto& sum : sums) TWOSTROKE_HIDE(sum);
  const __m512i left = _mm512_set1_epi32(0x03010201), right = _mm512_set1_epi32(0x01020103);
  for (int64_t i = 0; i < repeats * kSteps; ++i) {
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, left, right);
  }
  for (const auto& sum : sums) keep(sum);
}

// The three instructions that stand for one vpdpbusd; hiding an operand at every step keeps the
// compiler from computing their product once.
__attribute__((target("avx2"))) void run_avx2_int8(int64_t repeats) {
  __m256i sums[kChains] = {};
  for (auto& sum : sums) TWOSTROKE_HIDE(sum);
  __m256i left = _mm256_set1_epi32(0x03010201);
  const __m256i right = _mm256_set1_epi32(0x01020103), ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < repeats * kSteps; ++i) {
    for (auto& sum : sums) {
      TWOSTROKE_HIDE(left);
      const __m256i pairs = _mm256_maddubs_epi16(left, right);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
  }
  for (const auto& sum : sums) keep(sum);
}

#undef TWOSTROKE_HIDE
#endif

Loop choose_fp32() {
#if defined(TWOSTROKE_X86)
  if (__builtin_cpu_supports("avx512f")) return {run_avx512_fp32, kChains * 16 * 2};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {run_avx2_fp32, kChains * 8 * 2};
  }
#endif
  return {run_portable_fp32, kChains * 4 * 2};
}

Loop choose_int8() {
#if defined(TWOSTROKE_X86)
  if (__builtin_cpu_supports("avx512vnni")) return {run_avx512_int8, kChains * 64 * 2};
  if (__builtin_cpu_supports("avx2")) return {run_avx2_int8, kChains * 32 * 2};
#endif
  return {run_portable_int8, 16 * 2};
}

Rates measure_loop(const Loop& loop, int threads, double seconds) {
  return measure(threads, seconds, loop.ops_per_step * kSteps * threads,
                 [&](int, int64_t repeats) { loop.run(repeats); });
}

std::vector<std::string> get_cpu_features() {
  std::vector<std::string> names;
#if defined(TWOSTROKE_X86)
#define TWOSTROKE_FEATURE(name) \
  if (__builtin_cpu_supports(name)) names.emplace_back(name)
  TWOSTROKE_FEATURE("avx2");
  TWOSTROKE_FEATURE("fma");
  TWOSTROKE_FEATURE("f16c");
  TWOSTROKE_FEATURE("avxvnni");
  TWOSTROKE_FEATURE("avx512f");
  TWOSTROKE_FEATURE("avx512bw");
  TWOSTROKE_FEATURE("avx512vl");
  TWOSTROKE_FEATURE("avx512dq");
  TWOSTROKE_FEATURE("avx512vnni");
  TWOSTROKE_FEATURE("avx512bf16");
#undef TWOSTROKE_FEATURE
#endif
  return names;
}

// Checks what all measurements share, and lets other Python threads run meanwhile.
template <class Fn>
Rates run_checked(int threads, double seconds, const Fn& fn) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("threads: not in 1 ... 4096");
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds: not in (0, 60]");
  nb::gil_scoped_release release;
  return fn();
}

}  // namespace
}  // namespace twostroke::limits

void bind_limits(nb::module_& m) {
  using namespace twostroke::limits;
  m.def(
      "measure_read_bandwidth",
      [](int threads, size_t bytes, double seconds) {
        return run_checked(threads, seconds,
                           [&] { return measure_read_bandwidth(threads, bytes, seconds); });
      },
      nb::arg("threads"), nb::arg("bytes") = size_t{256} << 20, nb::arg("seconds") = 0.2,
      "Bytes per second that all threads together read from distinct parts of a buffer of `bytes`,"
      " which must be far larger than the caches: (sustained, best).");
  m.def(
      "measure_fp32_rate",
      [](int threads, double seconds) {
        return run_checked(threads, seconds,
                           [&] { return measure_loop(choose_fp32(), threads, seconds); });
      },
      nb::arg("threads"), nb::arg("seconds") = 0.1,
      "float32 operations per second of multiply-adds in registers: (sustained, best).");
  m.def(
      "measure_int8_rate",
      [](int threads, double seconds) {
        return run_checked(threads, seconds,
                           [&] { return measure_loop(choose_int8(), threads, seconds); });
      },
      nb::arg("threads"), nb::arg("seconds") = 0.1,
      "Integer operations per second of 8-bit multiply-adds in registers: (sustained, best).");
  m.def("cpu_features", &get_cpu_features,
        "Instruction set extensions of this processor that the kernels know of.");
}
