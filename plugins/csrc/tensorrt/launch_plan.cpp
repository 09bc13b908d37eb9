#include "tensorrt/json.h"
#include "tensorrt/launch_plan.h"

#include <algorithm>
#include <limits>

#include "tensorrt/error.h"

namespace cpm_tensorrt {

namespace {

constexpr int kVersion = 1;
constexpr std::int64_t kAlignment = 16;
constexpr std::size_t kWorkspaceAlignment = 256;
// CUDA C++ Programming Guide, technical specifications per compute capability.
constexpr std::int64_t kGridX = std::numeric_limits<std::int32_t>::max(), kGridYZ = 65535;

std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

std::int64_t positive(const Json& json, const char* what) {
    const auto value = json.get<std::int64_t>();
    if (value < 1) throw Error(what, ": expected 1 or more, got ", value);
    return value;
}

}  // namespace

// Reads one plan; its errors say which launch they are in.
class PlanReader {
public:
    PlanReader(LaunchPlan& plan, const KernelIndex& index, std::size_t inputs, std::size_t outputs)
        : plan_(plan), index_(index), inputs_(inputs), outputs_(outputs) {}

    void read(const Json& json) {
        const int version = json.at("version").get<int>();
        if (version != kVersion) {
            throw Error("version: expected ", kVersion, ", got ", version, "; export with the version of this library");
        }
        for (const Json& each : json.at("workspace")) {
            LaunchPlan::Workspace made{each.at("name").get<std::string>(), positive(each.at("unit"), "unit"), {}};
            for (const Json& divisor : each.at("divisors")) made.divisors.push_back(positive(divisor, "divisor"));
            plan_.workspaces_.push_back(std::move(made));
        }
        std::int64_t last = 0;
        for (const Json& each : json.at("variants")) {
            LaunchPlan::Variant variant;
            if (!each.at("rows_up_to").is_null()) variant.rows_up_to = positive(each.at("rows_up_to"), "rows_up_to");
            const bool ended = !plan_.variants_.empty() && !plan_.variants_.back().rows_up_to;
            if (ended || (variant.rows_up_to && *variant.rows_up_to <= last)) {
                throw Error("variants: expected growing limits and null at the end");
            }
            last = variant.rows_up_to.value_or(last);
            for (const Json& launch : each.at("launches")) variant.launches.push_back(launch_of(launch));
            plan_.variants_.push_back(std::move(variant));
        }
        if (plan_.variants_.empty() || plan_.variants_.back().rows_up_to) {
            throw Error("variants: expected one for any number of rows at the end");
        }
    }

private:
    Launch launch_of(const Json& json) {
        const Kernel& kernel = index_.kernel(json.at("kernel").get<std::string>());
        const Json& arguments = json.at("arguments");
        Launch launch{&kernel, {}};
        for (const Parameter& parameter : kernel.parameters) {
            const auto found = arguments.find(parameter.name);
            if (found == arguments.end()) throw Error(kernel.name, ": expected an argument ", parameter.name, ", got none");
            try {
                const Argument argument = argument_of(parameter, *found);
                if (argument.kind == Argument::Kind::kInput) plan_.inputs_ = std::max(plan_.inputs_, argument.index + 1);
                launch.arguments.push_back(argument);
            } catch (const std::exception& error) {
                throw Error(kernel.name, ": ", parameter.name, ": ", error.what());
            }
        }
        if (arguments.size() != kernel.parameters.size()) {
            throw Error(kernel.name, ": expected ", kernel.parameters.size(), " arguments, got ", arguments.size());
        }
        auto& kernels = plan_.kernels_;
        if (std::find(kernels.begin(), kernels.end(), &kernel) == kernels.end()) kernels.push_back(&kernel);
        return launch;
    }

    Argument argument_of(const Parameter& parameter, const Json& value) const {
        Argument made;
        if (parameter.kind == Parameter::Kind::kPointer) {
            if (!value.is_string()) throw Error("expected a buffer, got ", value.dump());
            return buffer_of(value.get<std::string>());
        }
        if (parameter.kind == Parameter::Kind::kFloat32) {
            if (!value.is_number()) throw Error("expected a number, got ", value.dump());
            made.kind = Argument::Kind::kFloat;
            made.number = value.get<float>();
        } else if (value == "rows") {
            if (parameter.aligned) throw Error("expected a multiple of ", kAlignment, ", got the number of rows");
            made.kind = Argument::Kind::kRows;
        } else {
            if (!value.is_number_integer()) throw Error("expected an integer or rows, got ", value.dump());
            const auto integer = value.get<std::int64_t>();
            made.integer = static_cast<std::int32_t>(integer);
            if (made.integer != integer) throw Error("expected a 32-bit integer, got ", integer);
            if (parameter.aligned && integer % kAlignment) {
                throw Error("expected a multiple of ", kAlignment, ", got ", integer);
            }
        }
        return made;
    }

    Argument buffer_of(const std::string& name) const {
        const std::size_t colon = name.find(':');
        const std::string kind = name.substr(0, colon), key = colon == std::string::npos ? "" : name.substr(colon + 1);
        Argument made;
        if (kind == "workspace") {
            made.kind = Argument::Kind::kWorkspace;
            for (const auto& each : plan_.workspaces_) {
                if (each.name == key) return made;
                ++made.index;
            }
            throw Error("expected a workspace of the plan, got ", name);
        }
        if (kind != "input" && kind != "output") throw Error("expected a buffer, got ", name);
        made.kind = kind == "input" ? Argument::Kind::kInput : Argument::Kind::kOutput;
        const std::size_t count = kind == "input" ? inputs_ : outputs_;
        for (; made.index < count; ++made.index) {
            if (std::to_string(made.index) == key) return made;
        }
        throw Error("expected one of the ", count, " ", kind, "s, got ", name);
    }

    LaunchPlan& plan_;
    const KernelIndex& index_;
    std::size_t inputs_, outputs_;
};

LaunchPlan::LaunchPlan(const std::string& json, const KernelIndex& index, std::size_t inputs, std::size_t outputs) {
    try {
        PlanReader(*this, index, inputs, outputs).read(Json::parse(json));
    } catch (const std::exception& error) {
        throw Error("plan: ", error.what());
    }
}

std::vector<std::size_t> LaunchPlan::offsets(std::int64_t rows) const {
    std::vector<std::size_t> found{0};
    for (const Workspace& each : workspaces_) {
        auto bytes = static_cast<std::size_t>(each.unit);
        for (const std::int64_t divisor : each.divisors) bytes *= static_cast<std::size_t>(ceil_div(rows, divisor));
        found.push_back(found.back() + (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
    }
    return found;
}

std::size_t LaunchPlan::workspace_bytes(std::int64_t rows) const { return offsets(rows).back(); }

const std::vector<Launch>& LaunchPlan::launches(std::int64_t rows) const {
    const auto applies = [rows](const Variant& each) { return !each.rows_up_to || rows <= *each.rows_up_to; };
    return std::find_if(variants_.begin(), variants_.end(), applies)->launches;
}

Grid LaunchPlan::grid(const Launch& launch, std::int64_t rows) {
    std::int64_t sizes[3];
    for (std::size_t axis = 0; axis < 3; ++axis) {
        const std::int64_t limit = axis == 0 ? kGridX : kGridYZ;
        sizes[axis] = 1;
        for (const Quotient& each : launch.kernel->grid[axis]) {
            const Argument& argument = launch.arguments[each.parameter];
            const std::int64_t value = argument.kind == Argument::Kind::kRows ? rows : argument.integer;
            const std::int64_t size = ceil_div(value, each.divisor);
            if (size < 1 || size > limit / sizes[axis]) {
                throw Error(launch.kernel->name, ": expected a grid of 1 to ", limit, " blocks on axis ", axis, ", got ",
                            size, " times ", sizes[axis], " for ", rows, " rows");
            }
            sizes[axis] *= size;
        }
    }
    return {static_cast<unsigned>(sizes[0]), static_cast<unsigned>(sizes[1]), static_cast<unsigned>(sizes[2])};
}

}  // namespace cpm_tensorrt
