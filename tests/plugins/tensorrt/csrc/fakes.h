// What TensorRT gives a plugin, without TensorRT: a logger, and sizes that may not be known yet.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity == Severity::kERROR) errors.emplace_back(message);
    }
    std::vector<std::string> errors;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override { return &logger; }
    Logger logger;
};

// A size by its value, or -1 for one that the profile decides.
class Size final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
public:
    explicit Size(std::int64_t value) : value_(value) { mImpl = this; }
    ~Size() noexcept override = default;
    bool isConstant() const override { return value_ >= 0; }
    std::int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

private:
    std::int64_t value_;
};

// None of the ops computes sizes: they pass those of inputs on.
class Builder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }
    ~Builder() noexcept override = default;
    const nvinfer1::IDimensionExpr* constant(std::int64_t) override { return nullptr; }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                              const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }
};
