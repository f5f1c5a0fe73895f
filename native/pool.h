// A pool of worker threads that run one function together (single program, many threads).
//
// Owns the threads. Inside `parallel` all threads run the same function and may meet at `barrier`;
// there they spin briefly before they yield, because a step has hundreds of barriers a few
// microseconds apart. After a call the workers stay awake for a moment, because the next step of a
// running batch follows at once and waking takes as long as planning it; then they sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace twostroke {

class ThreadPool {
 public:
  // `threads` includes the calling thread; at least 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Runs fn(thread, threads) on every thread, 0 being the caller; returns when all are done.
  // Not reentrant, and to be called from one thread at a time.
  void parallel(const std::function<void(int, int)>& fn);

  // Waits until every thread of the running `parallel` call has reached its barrier.
  void barrier();

 private:
  void work(int thread);
  // Starts the next generation and wakes whoever sleeps.
  void announce();
  // Waits until the generation is another than `seen` and returns it.
  uint32_t wait_for_next(uint32_t seen);

  int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int, int)>* job_ = nullptr;  // of this generation; null: stop
  std::mutex mutex_;
  std::condition_variable wake_;
  // A worker counts itself among the sleepers before it looks at the generation for the last time,
  // and `announce` looks for sleepers after it has changed the generation: one of them sees the
  // other, so no wake-up is lost.
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace twostroke
