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
constexpr std::uint64_t kFirst = 0xffffffff;  // the half of a share's word that holds its first task

constexpr std::size_t kLine = 64;
constexpr std::size_t kFetchBytes = 256 << 10;  // half of a small second-level cache
constexpr std::size_t kMostFollowers = 1 << 14;         // more than the matrices of any model

void prefetch(const std::uint8_t* address) {
#if defined(CPM_X86)
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
#else
    (void)address;
#endif
}

void pause() {
#if defined(CPM_X86)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace

bool ThreadPool::Share::take_first(std::size_t& task) {
    std::uint64_t now = range.load(std::memory_order_relaxed);
    do {
        task = std::size_t(now & kFirst);
        if (task >= now >> 32) return false;
    } while (!range.compare_exchange_weak(now, now + 1, std::memory_order_relaxed));
    return true;
}

bool ThreadPool::Share::take_last(std::size_t& task) {
    std::uint64_t now = range.load(std::memory_order_relaxed);
    do {
        task = std::size_t(now >> 32);
        if ((now & kFirst) >= task--) return false;
    } while (!range.compare_exchange_weak(now, now - (std::uint64_t(1) << 32), std::memory_order_relaxed));
    return true;
}

std::uint64_t ThreadPool::Share::left() const {
    const std::uint64_t now = range.load(std::memory_order_relaxed), first = now & kFirst, last = now >> 32;
    return first < last ? last - first : 0;
}

ThreadPool::ThreadPool(int threads) : shares_(std::size_t(std::max(threads, 1))) {
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
    body_ = &body;
    const std::size_t threads = shares_.size();
    for (std::size_t i = 0; i < threads; ++i)
        shares_[i].range.store(Share::pack(tasks * i / threads, tasks * (i + 1) / threads), std::memory_order_relaxed);
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
    std::size_t task = 0;
    while (shares_[std::size_t(thread)].take_first(task)) (*body_)(task, thread);
    while (Share* share = fullest())
        if (share->take_last(task)) (*body_)(task, thread);
}

ThreadPool::Share* ThreadPool::fullest() {
    Share* found = nullptr;
    std::uint64_t most = 0;
    for (Share& share : shares_)
        if (const std::uint64_t left = share.left(); left > most) {
            most = left;
            found = &share;
        }
    return found;
}

void ThreadPool::announce(const Spans& spans) {
    if (workers_.empty()) return;
    std::lock_guard<std::mutex> only(regions_);
    if (followers_.size() > kMostFollowers) followers_.clear();
    followers_[current_[0].data] = spans;
    current_ = spans;
    const auto found = followers_.find(spans[0].data);
    expected_ = found == followers_.end() ? Spans{} : found->second;
}

ThreadPool::Fetch ThreadPool::fetch(int thread) const {
    Fetch result;
    for (std::size_t i = 0; i < kSpans; ++i) {
        const std::size_t part = expected_[i].bytes / shares_.size();
        result.left[i] = {expected_[i].data + part * std::size_t(thread), std::min(part, kFetchBytes / kSpans)};
    }
    return result;
}

bool ThreadPool::Fetch::next() {
    for (Span& span : left) {
        if (span.bytes < kLine) continue;
        prefetch(span.data);
        span.data += kLine;
        span.bytes -= kLine;
        return true;
    }
    return false;
}

bool ThreadPool::wait_for_region(unsigned seen, Fetch fetch) {
    auto deadline = std::chrono::steady_clock::now() + kLinger;
    for (int spins = 0;; ++spins) {
        if (region_.load(std::memory_order_acquire) != seen) return true;
        if (stop_.load(std::memory_order_relaxed)) return false;
        if (!fetch.next()) pause();
        if (spins % kSpinsBetweenYields != kSpinsBetweenYields - 1) continue;
        std::this_thread::yield();
        const auto now = std::chrono::steady_clock::now();
        if (steps_.load(std::memory_order_relaxed) > 0) deadline = now + kLinger;
        if (now > deadline) return sleep(seen);
    }
}

bool ThreadPool::sleep(unsigned seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] {
        return stop_ || region_.load(std::memory_order_acquire) != seen || steps_.load() > 0;
    });
    return !stop_;
}

void ThreadPool::work(int thread) {
    unsigned seen = 0;
    Fetch ahead;
    while (wait_for_region(seen, ahead)) {
        const unsigned now = region_.load(std::memory_order_acquire);
        if (now == seen) continue;
        seen = now;
        take_tasks(thread);
        ahead = fetch(thread);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace cpm
