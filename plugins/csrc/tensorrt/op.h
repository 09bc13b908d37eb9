// What TensorRT must know of an op: its tensors and the attributes that say which of them there are. What it
// computes is in its plan.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cpm_tensorrt {

// Integer attributes of a node, by name.
using Attributes = std::map<std::string, std::int32_t>;

struct Input {
    const char* name;
    nvinfer1::DataType type;
};

struct Output {
    const char* name;
    nvinfer1::DataType type;
    int like;  // the input whose shape it has
    bool in_place;  // at the address of that input
};

struct Op {
    const char* name;
    std::vector<Input> inputs;  // all of them; the last one is optional in some ops
    std::vector<Output> outputs;
    std::vector<const char*> attributes;  // integers that a node must have, besides its plan
    int rows_of;  // the input whose first dimension is the last one of output 0, or -1

    int (*input_count)(const Attributes&, int given);  // of a node that is given so many
    int (*output_count)(const Attributes&);
    // Throws Error where sizes contradict each other or the attributes. Sizes below 0 are not known yet.
    void (*check)(const nvinfer1::Dims* inputs, int count, const Attributes&);
};

const std::vector<Op>& ops();

// Throws Error when inputs are missing or left over, or their sizes do not fit.
void check_inputs(const Op& op, const nvinfer1::Dims* inputs, int count, const Attributes& attributes);

}  // namespace cpm_tensorrt
