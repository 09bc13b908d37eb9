// The kernels of a bundle: kernels/index.json beside this library and the cubins that it names.
//
// exporter/cubins/index.py writes the file and lists its keys. Read here: format_version, sm, and of each kernel
// name, file, bytes, entry, parameters, grid, threads, shared_bytes and scratch_bytes.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace cpm_tensorrt {

struct Parameter {
    enum class Kind { kPointer, kInt32, kFloat32 };
    std::string name;
    Kind kind = Kind::kPointer;
    bool aligned = false;  // the address, or the integer, is a multiple of 16: the code relies on it
};

// ceil(parameter / divisor); the parameter by its position.
struct Quotient {
    std::size_t parameter = 0;
    std::int64_t divisor = 1;
};

struct Kernel {
    std::string name, path, entry;
    std::size_t bytes = 0;  // of the file
    std::vector<Parameter> parameters;
    std::vector<Quotient> grid[3];  // an axis is the product of its quotients
    unsigned threads = 0, shared_bytes = 0;
};

class KernelIndex {
public:
    // The one beside this library, read once. Throws Error when it is missing or malformed; the next call tries again.
    static const KernelIndex& get();

    explicit KernelIndex(const std::string& folder);

    // Throws Error when there is none of this name.
    const Kernel& kernel(const std::string& name) const;

    int sm() const { return sm_; }
    const std::string& path() const { return path_; }

private:
    std::string path_;
    int sm_ = 0;
    std::unordered_map<std::string, Kernel> kernels_;
};

}  // namespace cpm_tensorrt
