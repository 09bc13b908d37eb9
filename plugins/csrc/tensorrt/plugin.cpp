#include "tensorrt/plugin.h"

#include "tensorrt/error.h"

namespace cpm_tensorrt {

using namespace nvinfer1;

namespace {

constexpr std::int32_t kDone = 0, kFailed = 1;

std::shared_ptr<const LaunchPlan> bind(const Op& op, const std::string& plan, const Attributes& attributes) {
    return std::make_shared<const LaunchPlan>(plan, KernelIndex::get(), op.inputs.size(),
                                              static_cast<std::size_t>(op.output_count(attributes)));
}

// Rows of a tensor: all dimensions but the last, multiplied.
std::int64_t rows_of(const Dims& dims) {
    std::int64_t rows = 1;
    for (int axis = 0; axis + 1 < dims.nbDims; ++axis) rows *= dims.d[axis];
    return rows;
}

}  // namespace

Plugin::Plugin(const Op& op, std::string layer, std::string plan, Attributes attributes)
    : op_(op),
      where_(layer.empty() ? op.name : text(op.name, " ", layer)),
      plan_(std::move(plan)),
      attributes_(std::move(attributes)),
      launcher_(bind(op, plan_, attributes_)) {
    list_fields();
}

Plugin::Plugin(const Plugin& other)
    : IPluginV3(other),
      IPluginV3OneCore(other),
      IPluginV3OneBuildV2(other),
      IPluginV3OneRuntime(other),
      op_(other.op_),
      where_(other.where_),
      plan_(other.plan_),
      attributes_(other.attributes_),
      launcher_(other.launcher_) {
    list_fields();
}

void Plugin::list_fields() {
    fields_.emplace_back("plan", plan_.data(), PluginFieldType::kCHAR, static_cast<std::int32_t>(plan_.size()));
    for (const auto& [name, value] : attributes_) {
        fields_.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
    }
    serialized_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
    return guarded<IPluginV3*>(where(), nullptr, [&] { return new Plugin(*this); });
}

void Plugin::check(const std::vector<Dims>& inputs) const {
    const int count = static_cast<int>(inputs.size());
    check_inputs(op_, inputs.data(), count, attributes_);
    if (launcher_.plan().inputs() > inputs.size()) {
        throw Error("expected the ", launcher_.plan().inputs(), " inputs that the plan reads, got ", count);
    }
}

std::int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, std::int32_t inputs,
                                     const DynamicPluginTensorDesc*, std::int32_t) noexcept {
    return guarded(where(), kFailed, [&] {
        std::vector<Dims> dims;
        for (std::int32_t i = 0; i < inputs; ++i) dims.push_back(in[i].desc.dims);
        check(dims);
        return kDone;
    });
}

std::int32_t Plugin::getOutputDataTypes(DataType* types, std::int32_t outputs, const DataType* in,
                                        std::int32_t inputs) const noexcept {
    return guarded(where(), kFailed, [&] {
        if (outputs != getNbOutputs()) throw Error("expected ", getNbOutputs(), " outputs, got ", outputs);
        const int expected = op_.input_count(attributes_, inputs);
        if (inputs != expected) throw Error("expected ", expected, " inputs, got ", inputs);
        for (std::int32_t i = 0; i < inputs; ++i) {
            const Input& input = op_.inputs[static_cast<std::size_t>(i)];
            if (in[i] != input.type) {
                throw Error(input.name, ": expected data type ", static_cast<int>(input.type), ", got ",
                            static_cast<int>(in[i]), " (numbers of nvinfer1::DataType); build a strongly typed network");
            }
        }
        for (std::int32_t i = 0; i < outputs; ++i) types[i] = op_.outputs[static_cast<std::size_t>(i)].type;
        return kDone;
    });
}

std::int32_t Plugin::getOutputShapes(const DimsExprs* in, std::int32_t inputs, const DimsExprs*, std::int32_t,
                                     DimsExprs* out, std::int32_t outputs, IExprBuilder&) noexcept {
    return guarded(where(), kFailed, [&] {
        std::vector<Dims> dims(static_cast<std::size_t>(inputs));
        for (std::int32_t i = 0; i < inputs; ++i) {
            Dims& known = dims[static_cast<std::size_t>(i)];
            known.nbDims = in[i].nbDims;
            for (int axis = 0; axis < in[i].nbDims; ++axis) {
                known.d[axis] = in[i].d[axis]->isConstant() ? in[i].d[axis]->getConstantValue() : -1;
            }
        }
        check(dims);
        if (outputs != getNbOutputs()) throw Error("expected ", getNbOutputs(), " outputs, got ", outputs);
        for (std::int32_t i = 0; i < outputs; ++i) out[i] = in[op_.outputs[static_cast<std::size_t>(i)].like];
        if (op_.rows_of >= 0) out[0].d[out[0].nbDims - 1] = in[op_.rows_of].d[0];
        return kDone;
    });
}

bool Plugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                       std::int32_t inputs, std::int32_t) noexcept {
    const bool is_input = position < inputs;
    const auto index = static_cast<std::size_t>(is_input ? position : position - inputs);
    if (index >= (is_input ? op_.inputs.size() : op_.outputs.size())) return false;
    const DataType type = is_input ? op_.inputs[index].type : op_.outputs[index].type;
    const PluginTensorDesc& tensor = tensors[position].desc;
    return tensor.type == type && tensor.format == TensorFormat::kLINEAR;
}

std::size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, std::int32_t, const DynamicPluginTensorDesc*,
                                     std::int32_t) const noexcept {
    return guarded(where(), std::size_t{0}, [&] {
        const std::int64_t rows = rows_of(in[0].max);
        if (rows < 1) throw Error("expected a largest number of rows, got ", rows);
        return launcher_.plan().workspace_bytes(rows);
    });
}

std::int32_t Plugin::getAliasedInput(std::int32_t output) noexcept {
    if (output < 0 || output >= getNbOutputs()) return -1;
    const Output& found = op_.outputs[static_cast<std::size_t>(output)];
    return found.in_place ? found.like : -1;
}

std::int32_t Plugin::onShapeChange(const PluginTensorDesc* in, std::int32_t inputs, const PluginTensorDesc*,
                                   std::int32_t) noexcept {
    return guarded(where(), kFailed, [&] {
        std::vector<Dims> dims;
        for (std::int32_t i = 0; i < inputs; ++i) dims.push_back(in[i].dims);
        check(dims);
        launcher_.prepare();
        return kDone;
    });
}

void Plugin::check_aliases(const void* const* inputs, void* const* outputs) const {
    for (std::int32_t i = 0; i < getNbOutputs(); ++i) {
        const Output& output = op_.outputs[static_cast<std::size_t>(i)];
        if (!output.in_place || outputs[i] == inputs[output.like]) continue;
        throw Error(output.name, ": expected the address of ", op_.inputs[static_cast<std::size_t>(output.like)].name,
                    ", ", inputs[output.like], ", because the cache is updated in place, got ", outputs[i],
                    "; build the engine with the preview feature ALIASED_PLUGIN_IO_10_03 and bind both to one buffer");
    }
}

std::int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                             void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded(where(), kFailed, [&] {
        check_aliases(inputs, outputs);
        launcher_.launch(rows_of(in[0].dims), {inputs, outputs, workspace}, stream);
        return kDone;
    });
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept {
    return guarded<IPluginV3*>(where(), nullptr, [&] {
        auto attached = std::make_unique<Plugin>(*this);
        attached->launcher_.prepare();
        return attached.release();
    });
}

}  // namespace cpm_tensorrt
