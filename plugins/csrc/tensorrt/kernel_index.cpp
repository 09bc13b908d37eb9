#include "tensorrt/json.h"
#include "tensorrt/kernel_index.h"

#include <dlfcn.h>

#include <fstream>
#include <iterator>

#include "tensorrt/error.h"

namespace cpm_tensorrt {
namespace {

constexpr int kFormatVersion = 1;
constexpr int kAnchor = 0;  // an address inside this library

std::string own_folder() {
    Dl_info found{};
    if (!dladdr(&kAnchor, &found) || !found.dli_fname) throw Error("cannot tell where this library was loaded from");
    const std::string path = found.dli_fname;
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

Parameter::Kind kind_of(const std::string& type) {
    if (type.rfind('*', 0) == 0) return Parameter::Kind::kPointer;
    if (type == "i32") return Parameter::Kind::kInt32;
    if (type == "fp32") return Parameter::Kind::kFloat32;
    throw Error("type of a parameter: expected a pointer, i32 or fp32, got ", type);
}

Quotient quotient_of(const Json& json, const std::vector<Parameter>& parameters) {
    const auto name = json.at("parameter").get<std::string>();
    const auto divisor = json.at("divisor").get<std::int64_t>();
    if (divisor < 1) throw Error("grid: expected a divisor of 1 or more, got ", divisor);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        if (parameters[i].name == name && parameters[i].kind == Parameter::Kind::kInt32) return {i, divisor};
    }
    throw Error("grid: expected an integer parameter, got ", name);
}

Kernel kernel_of(const Json& json, const std::string& folder) {
    Kernel kernel;
    kernel.name = json.at("name").get<std::string>();
    kernel.path = folder + "/" + json.at("file").get<std::string>();
    kernel.bytes = json.at("bytes").get<std::size_t>();
    kernel.entry = json.at("entry").get<std::string>();
    for (const Json& each : json.at("parameters")) {
        const auto type = each.at("type").get<std::string>();
        kernel.parameters.push_back({each.at("name").get<std::string>(), kind_of(type), each.at("aligned").get<bool>()});
    }
    const Json& grid = json.at("grid");
    if (grid.size() != 3) throw Error(kernel.name, ": grid: expected three axes, got ", grid.size());
    for (std::size_t axis = 0; axis < 3; ++axis) {
        for (const Json& each : grid[axis]) kernel.grid[axis].push_back(quotient_of(each, kernel.parameters));
    }
    kernel.threads = json.at("threads").get<unsigned>();
    kernel.shared_bytes = json.at("shared_bytes").get<unsigned>();
    if (const auto bytes = json.at("scratch_bytes").get<std::int64_t>()) {
        throw Error(kernel.name, ": expected no scratch memory, got ", bytes, " bytes");
    }
    return kernel;
}

}  // namespace

const KernelIndex& KernelIndex::get() {
    static const KernelIndex index(own_folder() + "/kernels");
    return index;
}

KernelIndex::KernelIndex(const std::string& folder) : path_(folder + "/index.json") {
    std::ifstream file(path_);
    if (!file) throw Error(path_, ": expected the index of the bundle's kernels, which cannot be read; copy the bundle again");
    try {
        const std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        const Json json = Json::parse(content);
        const int version = json.at("format_version").get<int>();
        if (version != kFormatVersion) throw Error("format_version: expected ", kFormatVersion, ", got ", version);
        sm_ = json.at("sm").get<int>();
        for (const Json& each : json.at("kernels")) {
            Kernel kernel = kernel_of(each, folder);
            const std::string name = kernel.name;
            if (!kernels_.emplace(name, std::move(kernel)).second) throw Error(name, ": expected one kernel of this name");
        }
    } catch (const std::exception& error) {
        throw Error(path_, ": ", error.what());
    }
}

const Kernel& KernelIndex::kernel(const std::string& name) const {
    const auto found = kernels_.find(name);
    if (found == kernels_.end()) {
        throw Error(path_, ": expected kernel ", name, ", got ", kernels_.size(),
                    " others; plans and kernels are of different exports");
    }
    return found->second;
}

}  // namespace cpm_tensorrt
