// Worker threads of one session: they spin between the parallel regions of a step and sleep between steps.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

namespace cpm {

class ThreadPool {
public:
    // `threads` in all, the caller's included; at least 1.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs body(task, thread) for every task in [0, tasks), the caller taking part; returns when all are done.
    // Each thread walks through a run of neighbouring tasks, so that it reads memory in one long stream; who is
    // done helps the others from their ends. Tasks may differ in length. Not reentrant: one region at a time.
    void run(std::size_t tasks, const std::function<void(std::size_t task, int thread)>& body);

    // Says that the next region reads these spans from front to back, split among the threads in order. The pool
    // remembers what followed what: while the caller works between two regions, which would leave the memory idle,
    // workers fetch the beginning of what they will read next into their caches.
    struct Span {
        const std::uint8_t* data = nullptr;
        std::size_t bytes = 0;
    };
    static constexpr std::size_t kSpans = 2;
    using Spans = std::array<Span, kSpans>;
    void announce(const Spans& spans);

    // Between begin_step and end_step workers spin instead of sleeping. Steps may nest.
    void begin_step();
    void end_step();

private:
    // The tasks [first, last) that a thread has left, in one word so that taking one is one exchange; alone in its
    // cache line, since only helpers share it.
    struct alignas(64) Share {
        std::atomic<std::uint64_t> range{0};
        static std::uint64_t pack(std::uint64_t first, std::uint64_t last) { return last << 32 | first; }
        bool take_first(std::size_t& task);
        bool take_last(std::size_t& task);
        std::uint64_t left() const;
    };

    // What is left of a worker's part of the expected spans.
    struct Fetch {
        Spans left;
        bool next();
    };

    void work(int thread);
    Fetch fetch(int thread) const;
    void take_tasks(int thread);
    Share* fullest();
    bool wait_for_region(unsigned seen, Fetch fetch);
    bool sleep(unsigned seen);

    std::vector<std::thread> workers_;
    std::mutex regions_;  // one region at a time, also when two threads share the pool
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> region_{0};
    std::atomic<int> steps_{0};
    std::atomic<bool> stop_{false};
    std::atomic<int> running_{0};
    std::vector<Share> shares_;  // one a thread
    const std::function<void(std::size_t, int)>* body_ = nullptr;
    // Both change between regions only; workers copy what they need before they report a region as done.
    std::unordered_map<const std::uint8_t*, Spans> followers_;
    Spans current_, expected_;
};

}  // namespace cpm
