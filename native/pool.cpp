#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(TWOSTROKE_X86)
#include <immintrin.h>
#endif

namespace twostroke {
namespace {

// Spins this often before giving the processor away: about 20 microseconds, longer than any
// imbalance inside a step and far shorter than a scheduler's slice.
constexpr int kSpins = 1000;

// Workers stay awake for so long after a call. Planning a step of one row takes half of it; more
// would only take time from other programs when the engine falls idle.
constexpr auto kStayAwake = std::chrono::microseconds(200);

inline void pause_briefly() {
#if defined(TWOSTROKE_X86)
  _mm_pause();
#endif
}

template <class Done>
void spin_until(Done done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads) : size_(std::max(1, threads)) {
  for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  job_ = nullptr;
  announce();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::parallel(const std::function<void(int, int)>& fn) {
  if (size_ == 1) {
    fn(0, 1);
    return;
  }
  running_.store(size_ - 1, std::memory_order_relaxed);
  job_ = &fn;
  announce();
  fn(0, size_);
  spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::announce() {
  generation_.fetch_add(1);
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }
  wake_.notify_all();
}

uint32_t ThreadPool::wait_for_next(uint32_t seen) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (const uint32_t now = generation_.load(); now != seen) return now;
    pause_briefly();
  }
  const auto until = std::chrono::steady_clock::now() + kStayAwake;
  while (std::chrono::steady_clock::now() < until) {
    if (const uint32_t now = generation_.load(); now != seen) return now;
    std::this_thread::yield();  // others may have the processor meanwhile
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [&] { return generation_.load() != seen; });
  sleepers_.fetch_sub(1);
  return generation_.load();
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    seen = wait_for_next(seen);
    if (job_ == nullptr) return;
    (*job_)(thread, size_);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::barrier() {
  if (size_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
}

}  // namespace twostroke
