#include "kernels/thread_pool.h"

#include <algorithm>
#include <chrono>

#if defined(CPM_X86)
#include <immintrin.h>
#endif

namespace cpm {
namespace {

// After a step, workers watch this long for the next one before they sleep: a wake-up costs about 20 us.
constexpr auto kLinger = std::chrono::microseconds(200);
constexpr int kSpinsBetweenYields = 2000;

void pause() {
#if defined(CPM_X86)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
    for (int i = 1; i < std::max(threads, 1); ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::begin_step() {
    ++steps_;
    if (workers_.empty()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
}

void ThreadPool::end_step() { --steps_; }

void ThreadPool::run(std::size_t tasks, const std::function<void(std::size_t, int)>& body) {
    if (workers_.empty() || tasks <= 1) {
        for (std::size_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
    std::lock_guard<std::mutex> only(regions_);
    tasks_ = tasks;
    body_ = &body;
    next_.store(0, std::memory_order_relaxed);
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
        // Under the mutex a worker either sees the new region or is already waiting for the signal.
        std::lock_guard<std::mutex> lock(mutex_);
        region_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_tasks(0);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
        if (spins % kSpinsBetweenYields == kSpinsBetweenYields - 1) std::this_thread::yield();
        pause();
    }
}

void ThreadPool::take_tasks(int thread) {
    for (std::size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*body_)(task, thread);
}

bool ThreadPool::wait_for_region(unsigned seen) {
    auto deadline = std::chrono::steady_clock::now() + kLinger;
    for (int spins = 0;; ++spins) {
        if (region_.load(std::memory_order_acquire) != seen) return true;
        if (stop_.load(std::memory_order_relaxed)) return false;
        pause();
        if (spins % kSpinsBetweenYields != kSpinsBetweenYields - 1) continue;
        std::this_thread::yield();
        const auto now = std::chrono::steady_clock::now();
        if (steps_.load(std::memory_order_relaxed) > 0) deadline = now + kLinger;
        if (now > deadline) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] {
        return stop_ || region_.load(std::memory_order_acquire) != seen || steps_.load() > 0;
    });
    return !stop_;
}

void ThreadPool::work(int thread) {
    unsigned seen = 0;
    while (wait_for_region(seen)) {
        const unsigned now = region_.load(std::memory_order_acquire);
        if (now == seen) continue;
        seen = now;
        take_tasks(thread);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace cpm
