#include "tensorrt/launcher.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#include "tensorrt/error.h"

namespace cpm_tensorrt {
namespace {

constexpr std::uintptr_t kAlignment = 16;
// What a kernel may use without asking: CUDA C++ Programming Guide, shared memory.
constexpr unsigned kPlainSharedBytes = 48 << 10;
// Triton kernels end with pointers to global and profiling scratch memory, which ours do not use.
constexpr std::size_t kScratchPointers = 2;

std::string read_cubin(const Kernel& kernel) {
    std::ifstream file(kernel.path, std::ios::binary);
    std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (data.size() != kernel.bytes) {
        throw Error(kernel.path, ": expected ", kernel.bytes, " bytes, got ", data.size(), "; copy the bundle again");
    }
    return data;
}

CUfunction load(const CudaDriver& driver, const Kernel& kernel) {
    const std::string cubin = read_cubin(kernel);
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    driver.check(driver.module_load_data(&module, cubin.data()), "loading ", kernel.path);
    driver.check(driver.module_get_function(&function, module, kernel.entry.c_str()), kernel.path, ": ", kernel.entry);
    if (kernel.shared_bytes > kPlainSharedBytes) {
        const auto bytes = static_cast<int>(kernel.shared_bytes);
        driver.check(driver.func_set_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes),
                     kernel.name, ": ", bytes, " bytes of shared memory");
    }
    if (driver.func_load) driver.check(driver.func_load(function), "loading ", kernel.name);
    return function;
}

// Functions of all plugins, by context: layers of one kind share their modules, which live as long as the context.
CUfunction function_of(const CudaDriver& driver, unsigned long long context, const Kernel& kernel) {
    static std::mutex mutex;
    static std::map<std::pair<unsigned long long, const Kernel*>, CUfunction> functions;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_pair(context, &kernel);
    const auto found = functions.find(key);
    return found != functions.end() ? found->second : functions[key] = load(driver, kernel);
}

std::uint64_t address_of(const Argument& argument, const Buffers& buffers, const std::vector<std::size_t>& offsets) {
    if (argument.kind == Argument::Kind::kInput) return reinterpret_cast<std::uintptr_t>(buffers.inputs[argument.index]);
    if (argument.kind == Argument::Kind::kOutput) {
        return reinterpret_cast<std::uintptr_t>(buffers.outputs[argument.index]);
    }
    if (!buffers.workspace) return 0;
    return reinterpret_cast<std::uintptr_t>(buffers.workspace) + offsets[argument.index];
}

std::uint64_t slot_of(const Parameter& parameter, const Argument& argument, std::int64_t rows, const Buffers& buffers,
                      const std::vector<std::size_t>& offsets) {
    std::uint64_t slot = 0;
    if (parameter.kind == Parameter::Kind::kPointer) {
        slot = address_of(argument, buffers, offsets);
        if (!slot) throw Error(parameter.name, ": expected an address, got none");
        if (parameter.aligned && slot % kAlignment) {
            throw Error(parameter.name, ": expected an address that is a multiple of ", kAlignment, ", got ", slot,
                        "; bind buffers as they were allocated");
        }
    } else if (parameter.kind == Parameter::Kind::kFloat32) {
        std::memcpy(&slot, &argument.number, sizeof argument.number);
    } else {
        const auto value = argument.kind == Argument::Kind::kRows ? static_cast<std::int32_t>(rows) : argument.integer;
        std::memcpy(&slot, &value, sizeof value);
    }
    return slot;
}

// A launch with its arguments in place.
struct Ready {
    const Kernel* kernel;
    Grid grid;
    std::vector<std::uint64_t> slots;
};

Ready ready(const Launch& launch, std::int64_t rows, const Buffers& buffers, const std::vector<std::size_t>& offsets) {
    Ready made{launch.kernel, LaunchPlan::grid(launch, rows), {}};
    const auto& parameters = launch.kernel->parameters;
    made.slots.reserve(parameters.size() + kScratchPointers);
    try {
        for (std::size_t i = 0; i < parameters.size(); ++i) {
            made.slots.push_back(slot_of(parameters[i], launch.arguments[i], rows, buffers, offsets));
        }
    } catch (const Error& error) {
        throw Error(launch.kernel->name, ": ", error.what());
    }
    made.slots.resize(parameters.size() + kScratchPointers, 0);
    return made;
}

}  // namespace

void Launcher::prepare() {
    const CudaDriver& driver = CudaDriver::get();
    const unsigned long long context = driver.context();
    if (!functions_.empty() && context == context_) return;
    const KernelIndex& index = KernelIndex::get();
    if (driver.sm() != index.sm()) {
        throw Error("expected a device of sm_", index.sm(), ", for which the bundle's kernels were compiled, got sm_",
                    driver.sm(), "; export for this device with --chip");
    }
    functions_.clear();
    for (const Kernel* kernel : plan_->kernels()) functions_[kernel] = function_of(driver, context, *kernel);
    context_ = context;
}

void Launcher::launch(std::int64_t rows, const Buffers& buffers, CUstream stream) {
    if (rows < 1 || rows > INT32_MAX) throw Error("rows: expected 1 to ", INT32_MAX, ", got ", rows);
    prepare();
    const std::vector<std::size_t> offsets = plan_->offsets(rows);
    std::vector<Ready> all;
    for (const Launch& each : plan_->launches(rows)) all.push_back(ready(each, rows, buffers, offsets));
    const CudaDriver& driver = CudaDriver::get();
    for (Ready& each : all) {
        std::vector<void*> arguments;
        arguments.reserve(each.slots.size());
        for (std::uint64_t& slot : each.slots) arguments.push_back(&slot);
        const Kernel& kernel = *each.kernel;
        driver.check(driver.launch_kernel(functions_.at(&kernel), each.grid.x, each.grid.y, each.grid.z, kernel.threads,
                                          1, 1, kernel.shared_bytes, stream, arguments.data(), nullptr),
                     "launching ", kernel.name);
    }
}

}  // namespace cpm_tensorrt
