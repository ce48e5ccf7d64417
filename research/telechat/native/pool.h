// The threads that share one operator's work; native/build.py says how many.
//
// A thread without work spins for a moment, as the next operator of a graph usually follows at once, and then sleeps.
// Operators take turns: MindSpore may launch two at the same time.
#pragma once

#include <pthread.h>
#include <sched.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace telechat {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// While it lives, its thread takes numbers below 2^-126 for 0: they are slow, and some threads of MindSpore do so and
// some do not, so that a result would depend on the thread.
class FlushToZero {
 public:
#if defined(__SSE__)
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  FlushToZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1 << 24));
  }
  ~FlushToZero() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#else
  FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_;
#else
  uint64_t before_ = 0;
#endif
};

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;                        // never destroyed: threads may outlive static objects
    return *pool;
  }

  int threads() const { return count_; }

  // How many from now on. Threads that run already stay, and take no part beyond that number.
  void use(int count) { count_ = std::max(count, 1); }

  std::mutex& turn() { return turn_; }

  // Calls work(i) for each i below `tasks` (less than 2^20), on all threads; returns when all are done.
  template <typename Work>
  void run(int64_t tasks, const Work& work) {
    const FlushToZero flush;
    if (tasks <= 1 || count_ == 1) {
      for (int64_t i = 0; i < tasks; ++i) work(i);
      return;
    }
    start();
    call_ = [](const void* w, int64_t i) { (*static_cast<const Work*>(w))(i); };
    work_ = &work;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = ++job_;
    next_.store((job & kJobs) << 40 | static_cast<uint64_t>(tasks) << 20, std::memory_order_release);
    published_.store(job, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take(job);
    for (int spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins < 2000) relax(); else sched_yield();
    }
  }

 private:
  static constexpr uint64_t kTasks = (1 << 20) - 1, kJobs = (1 << 24) - 1;

  Pool() {
    pthread_atfork(nullptr, nullptr, [] { get().forked(); });
  }

  // A forked process has no threads but the one that forked.
  void forked() {
    started_ = 1;
    sleeping_.store(0);
    new (&mutex_) std::mutex;
    new (&turn_) std::mutex;
    new (&wake_) std::condition_variable;
  }

  void start() {
    for (; started_ < count_; ++started_) std::thread([this, me = started_] { serve(me); }).detach();
  }

  // Takes tasks of one job until none is left. Job, tasks and the next of them are one number: a thread that comes late
  // can take nothing of a job that is over, and while a task is taken its job is not.
  void take(uint64_t job) {
    uint64_t now = next_.load(std::memory_order_acquire);
    while (now >> 40 == (job & kJobs) && (now & kTasks) < (now >> 20 & kTasks)) {
      if (!next_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
      call_(work_, static_cast<int64_t>(now & kTasks));
      done_.fetch_add(1, std::memory_order_acq_rel);
      now = next_.load(std::memory_order_acquire);
    }
  }

  void serve(int me) {
    const FlushToZero flush;
    uint64_t seen = 0;
    while (true) {
      uint64_t job = published_.load(std::memory_order_acquire);
      if (job == seen) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
        while ((job = published_.load(std::memory_order_acquire)) == seen) {
          for (int i = 0; i < 32; ++i) relax();
          if (std::chrono::steady_clock::now() >= until) break;
        }
      }
      if (job == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return published_.load(std::memory_order_seq_cst) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        continue;
      }
      seen = job;
      if (me < count_) take(job);
    }
  }

  std::atomic<int> count_{1};
  int started_ = 1;                                      // threads, with the one that calls
  void (*call_)(const void*, int64_t) = nullptr;
  const void* work_ = nullptr;
  uint64_t job_ = 0;
  std::atomic<uint64_t> next_{0}, published_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<int> sleeping_{0};
  std::mutex mutex_, turn_;
  std::condition_variable wake_;
};

// Calls work(first, last) for parts of 0 .. size - 1, each of `grain` or more, on all threads.
template <typename Work>
void split(int64_t size, int64_t grain, const Work& work) {
  Pool& pool = Pool::get();
  const int64_t most = 4 * pool.threads();
  const int64_t part = std::max<int64_t>(grain, (size + most - 1) / most);
  const int64_t tasks = (size + part - 1) / part;
  pool.run(tasks, [&](int64_t i) { work(i * part, std::min(size, (i + 1) * part)); });
}

}  // namespace telechat
