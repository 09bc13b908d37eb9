// Makes plugins of one op, for TensorRT's ONNX parser and for engines that are read.
#pragma once

#include <vector>

#include "tensorrt/op.h"

namespace cpm_tensorrt {

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(const Op& op);

    nvinfer1::IPluginV3* createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
    const char* getPluginName() const noexcept override { return op_.name; }
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

private:
    const Op& op_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection names_{};
};

}  // namespace cpm_tensorrt
