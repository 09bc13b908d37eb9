// Runs an op's plan on a stream of the current CUDA context.
#pragma once

#include <memory>
#include <unordered_map>

#include "tensorrt/cuda_driver.h"
#include "tensorrt/launch_plan.h"

namespace cpm_tensorrt {

// What TensorRT gives enqueue.
struct Buffers {
    const void* const* inputs = nullptr;
    void* const* outputs = nullptr;
    void* workspace = nullptr;
};

// One user at a time; copies share the plan.
class Launcher {
public:
    explicit Launcher(std::shared_ptr<const LaunchPlan> plan) : plan_(std::move(plan)) {}

    const LaunchPlan& plan() const { return *plan_; }

    // Loads every kernel of the plan into the current context, unless it is the one of the last call. Loading is
    // forbidden while a stream is captured, so this comes first. Throws Error when the kernels are of another SM.
    void prepare();

    // Launches all kernels for so many rows; prepares what prepare() has not. Throws Error before the first launch
    // for a buffer that is missing or not aligned as its kernel relies on.
    void launch(std::int64_t rows, const Buffers& buffers, CUstream stream);

private:
    std::shared_ptr<const LaunchPlan> plan_;
    unsigned long long context_ = 0;
    std::unordered_map<const Kernel*, CUfunction> functions_;
};

}  // namespace cpm_tensorrt
