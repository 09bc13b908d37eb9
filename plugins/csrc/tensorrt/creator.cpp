#include "tensorrt/creator.h"

#include <algorithm>
#include <cstring>

#include "tensorrt/error.h"
#include "tensorrt/plugin.h"

namespace cpm_tensorrt {

using namespace nvinfer1;

namespace {

// Some callers count a terminating zero in, some do not.
std::string string_of(const PluginField& field) {
    if (field.type != PluginFieldType::kCHAR || !field.data) throw Error(field.name, ": expected a string");
    std::string value(static_cast<const char*>(field.data), static_cast<std::size_t>(std::max(field.length, 0)));
    while (!value.empty() && value.back() == '\0') value.pop_back();
    return value;
}

std::int32_t integer_of(const PluginField& field) {
    if (field.type != PluginFieldType::kINT32 || field.length != 1 || !field.data) {
        throw Error(field.name, ": expected one 32-bit integer");
    }
    return *static_cast<const std::int32_t*>(field.data);
}

const PluginField& field_of(const PluginFieldCollection& fields, const char* name) {
    for (std::int32_t i = 0; i < fields.nbFields; ++i) {
        if (fields.fields[i].name && !std::strcmp(fields.fields[i].name, name)) return fields.fields[i];
    }
    throw Error(name, ": expected this attribute, got none");
}

}  // namespace

Creator::Creator(const Op& op) : op_(op) {
    fields_.emplace_back("plan", nullptr, PluginFieldType::kCHAR, 0);
    for (const char* name : op.attributes) fields_.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    names_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

const char* Creator::getPluginVersion() const noexcept { return kVersion; }

const char* Creator::getPluginNamespace() const noexcept { return kNamespace; }

IPluginV3* Creator::createPlugin(const char* layer, const PluginFieldCollection* fields, TensorRTPhase) noexcept {
    return guarded<IPluginV3*>(op_.name, nullptr, [&] {
        if (!fields) throw Error("expected attributes, got none");
        Attributes attributes;
        for (const char* name : op_.attributes) attributes[name] = integer_of(field_of(*fields, name));
        return new Plugin(op_, layer ? layer : "", string_of(field_of(*fields, "plan")), std::move(attributes));
    });
}

}  // namespace cpm_tensorrt
