#include "tensorrt/op.h"

#include <algorithm>

#include "tensorrt/error.h"

namespace cpm_tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

// The input of this name or number, of so many dimensions.
class Shape {
public:
    Shape(const char* name, const Dims& dims, int rank) : name_(name), dims_(dims) {
        if (dims.nbDims != rank) throw Error(name, ": expected ", rank, " dimensions, got ", dims.nbDims);
    }

    std::int64_t operator[](int axis) const { return dims_.d[axis]; }

    void expect(int axis, std::int64_t size) const {
        if (size >= 0 && dims_.d[axis] >= 0 && dims_.d[axis] != size) {
            throw Error(name_, ": expected size ", size, " of dimension ", axis, ", got ", dims_.d[axis]);
        }
    }

    void expect_at_least(int axis, std::int64_t size) const {
        if (dims_.d[axis] >= 0 && dims_.d[axis] < size) {
            throw Error(name_, ": expected size ", size, " or more of dimension ", axis, ", got ", dims_.d[axis]);
        }
    }

    void expect_multiple(int axis, std::int64_t of) const {
        if (of > 0 && dims_.d[axis] >= 0 && dims_.d[axis] % of) {
            throw Error(name_, ": expected a multiple of ", of, " in dimension ", axis, ", got ", dims_.d[axis]);
        }
    }

private:
    const char* name_;
    const Dims& dims_;
};

// Of two sizes, unless one is unknown.
std::int64_t product(std::int64_t left, std::int64_t right) { return left < 0 || right < 0 ? -1 : left * right; }

// x (..., k); codes (n, row bytes); scales (groups, n); zeros (groups, n)
void check_matmul(const Dims* inputs, int count, const Attributes& attributes) {
    const std::int64_t n = attributes.at("n"), k = attributes.at("k");
    const std::int64_t bits = attributes.at("bits"), group = attributes.at("group");
    if (inputs[0].nbDims < 1) throw Error("x: expected 1 dimension or more, got ", inputs[0].nbDims);
    Shape("x", inputs[0], inputs[0].nbDims).expect(inputs[0].nbDims - 1, k);
    const Shape codes("codes", inputs[1], 2), scales("scales", inputs[2], 2);
    codes.expect(0, n);
    codes.expect_at_least(1, (k * bits + 7) / 8);
    scales.expect(1, n);
    scales.expect_at_least(0, group > 0 ? (k + group - 1) / group : 1);
    if (count < 4) return;
    const Shape zeros("zeros", inputs[3], 2);
    zeros.expect(0, scales[0]);
    zeros.expect(1, n);
}

// query (1, T, Hq * D); key, value (1, T, Hkv * D); caches (1, Hkv, C, D); past_length (1,); pooled (1, Hkv, P, D)
void check_attention(const Dims* inputs, int count, const Attributes&) {
    const Shape query("query", inputs[0], 3), key("key", inputs[1], 3), value("value", inputs[2], 3);
    const Shape keys("key_cache", inputs[3], 4), values("value_cache", inputs[4], 4);
    const std::int64_t heads = keys[1], size = keys[3];
    query.expect(0, 1);
    query.expect_multiple(2, product(heads, size));
    for (const Shape* each : {&key, &value}) {
        each->expect(0, 1);
        each->expect(1, query[1]);
        each->expect(2, product(heads, size));
    }
    keys.expect(0, 1);
    for (int axis = 0; axis < 4; ++axis) values.expect(axis, keys[axis]);
    Shape("past_length", inputs[5], 1).expect(0, 1);
    if (count < 7) return;
    const Shape pooled("pooled_cache", inputs[6], 4);
    pooled.expect(0, 1);
    pooled.expect(1, heads);
    pooled.expect(3, size);
    keys.expect_multiple(2, pooled[2]);
}

// query, key (1, T, H * D); value (1, T, H * Dv); past_state (1, H, D, Dv); decay (H,)
void check_linear(const Dims* inputs, int, const Attributes&) {
    const Shape query("query", inputs[0], 3), key("key", inputs[1], 3), value("value", inputs[2], 3);
    const Shape state("past_state", inputs[3], 4);
    for (const Shape* each : {&query, &key, &value}) {
        each->expect(0, 1);
        each->expect(1, query[1]);
    }
    state.expect(0, 1);
    query.expect(2, product(state[1], state[2]));
    key.expect(2, product(state[1], state[2]));
    value.expect(2, product(state[1], state[3]));
    Shape("decay", inputs[4], 1).expect(0, state[1]);
}

Op matmul() {
    return {
        "CpmMatMulNBits",
        {{"x", DataType::kHALF}, {"codes", DataType::kINT8}, {"scales", DataType::kHALF}, {"zeros", DataType::kINT8}},
        {{"y", DataType::kHALF, 0, false}},
        {"bits", "group", "n", "k"},
        1,
        [](const Attributes&, int given) { return std::clamp(given, 3, 4); },
        [](const Attributes&) { return 1; },
        check_matmul,
    };
}

// With topk there is a pooled cache.
Op attention() {
    return {
        "CpmSparseAttention",
        {{"query", DataType::kHALF}, {"key", DataType::kHALF}, {"value", DataType::kHALF},
         {"key_cache", DataType::kHALF}, {"value_cache", DataType::kHALF}, {"past_length", DataType::kINT32},
         {"pooled_cache", DataType::kHALF}},
        {{"output", DataType::kHALF, 0, false}, {"present_key", DataType::kHALF, 3, true},
         {"present_value", DataType::kHALF, 4, true}, {"present_pooled", DataType::kHALF, 6, true}},
        {"topk"},
        -1,
        [](const Attributes& attributes, int) { return attributes.at("topk") > 0 ? 7 : 6; },
        [](const Attributes& attributes) { return attributes.at("topk") > 0 ? 4 : 3; },
        check_attention,
    };
}

Op linear_attention() {
    return {
        "CpmLinearAttention",
        {{"query", DataType::kHALF}, {"key", DataType::kHALF}, {"value", DataType::kHALF},
         {"past_state", DataType::kFLOAT}, {"decay", DataType::kFLOAT}},
        {{"output", DataType::kFLOAT, 2, false}, {"present_state", DataType::kFLOAT, 3, true}},
        {},
        -1,
        [](const Attributes&, int) { return 5; },
        [](const Attributes&) { return 2; },
        check_linear,
    };
}

}  // namespace

const std::vector<Op>& ops() {
    static const std::vector<Op> all{matmul(), attention(), linear_attention()};
    return all;
}

void check_inputs(const Op& op, const Dims* inputs, int count, const Attributes& attributes) {
    const int expected = op.input_count(attributes, count);
    if (count != expected) throw Error("expected ", expected, " inputs, got ", count);
    op.check(inputs, count, attributes);
}

}  // namespace cpm_tensorrt
