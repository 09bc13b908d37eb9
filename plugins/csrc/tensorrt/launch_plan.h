// What an op launches, read from its attribute `plan` (plugins/launch_plan.py states the form) and bound to the
// kernels of the bundle. Everything but the number of rows is known here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tensorrt/kernel_index.h"

namespace cpm_tensorrt {

// An argument of a launch, in the order of the kernel's parameters.
struct Argument {
    enum class Kind { kInput, kOutput, kWorkspace, kRows, kInteger, kFloat };
    Kind kind = Kind::kInteger;
    std::size_t index = 0;  // of the input, output or workspace
    std::int32_t integer = 0;
    float number = 0;
};

struct Launch {
    const Kernel* kernel = nullptr;
    std::vector<Argument> arguments;
};

struct Grid {
    unsigned x = 1, y = 1, z = 1;
};

class LaunchPlan {
public:
    // Throws Error for malformed text, for what does not fit the kernels, and for an input or output beyond these.
    LaunchPlan(const std::string& json, const KernelIndex& index, std::size_t inputs, std::size_t outputs);

    // Bytes of scratch memory for so many rows; no smaller number needs more.
    std::size_t workspace_bytes(std::int64_t rows) const;

    // Where each scratch buffer begins, in bytes.
    std::vector<std::size_t> offsets(std::int64_t rows) const;

    const std::vector<Launch>& launches(std::int64_t rows) const;

    // Every kernel of any number of rows, once.
    const std::vector<const Kernel*>& kernels() const { return kernels_; }

    // One more than the highest input that any launch reads.
    std::size_t inputs() const { return inputs_; }

    // Throws Error for a grid that CUDA does not launch.
    static Grid grid(const Launch& launch, std::int64_t rows);

private:
    struct Workspace {
        std::string name;
        std::int64_t unit;
        std::vector<std::int64_t> divisors;
    };
    struct Variant {
        std::optional<std::int64_t> rows_up_to;
        std::vector<Launch> launches;
    };

    friend class PlanReader;
    std::vector<Workspace> workspaces_;
    std::vector<Variant> variants_;
    std::vector<const Kernel*> kernels_;
    std::size_t inputs_ = 0;
};

}  // namespace cpm_tensorrt
