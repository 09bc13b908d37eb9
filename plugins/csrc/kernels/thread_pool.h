// Worker threads of one session: they spin between the parallel regions of a step and sleep between steps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
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
    // Tasks are handed out one by one, so they may differ in length. Not reentrant: one region at a time.
    void run(std::size_t tasks, const std::function<void(std::size_t task, int thread)>& body);

    // Between begin_step and end_step workers spin instead of sleeping. Steps may nest.
    void begin_step();
    void end_step();

private:
    void work(int thread);
    void take_tasks(int thread);
    bool wait_for_region(unsigned seen);

    std::vector<std::thread> workers_;
    std::mutex regions_;  // one region at a time, also when two threads share the pool
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> region_{0};
    std::atomic<int> steps_{0};
    std::atomic<bool> stop_{false};
    std::atomic<std::size_t> next_{0};
    std::atomic<int> running_{0};
    std::size_t tasks_ = 0;
    const std::function<void(std::size_t, int)>* body_ = nullptr;
};

}  // namespace cpm
