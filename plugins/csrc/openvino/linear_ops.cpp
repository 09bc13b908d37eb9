#include <cstring>
#include <vector>

#include "openvino/ops.h"

namespace cpm_openvino {
namespace {

cpm_pool* pool_of(const ov::Tensor& handle) { return cpm_session_pool(session_of(handle)); }

std::int64_t rows_of(const ov::Shape& shape) { return static_cast<std::int64_t>(shape[0] * shape[1]); }

ov::PartialShape with_last(const ov::PartialShape& shape, std::int64_t last) {
    OPENVINO_ASSERT(shape.rank().is_static() && shape.size() == 3, "expected x of rank 3, got ", shape);
    return {shape[0], shape[1], last};
}

void set_output(ov::Tensor& output, const ov::Shape& x, std::int64_t rows) {
    output.set_shape({x[0], x[1], static_cast<std::size_t>(rows)});
}

}  // namespace

cpm_session* session_of(const ov::Tensor& handle) {
    OPENVINO_ASSERT(handle.get_byte_size() == sizeof(cpm_session*), "session: expected an address, got ",
                    handle.get_byte_size(), " bytes");
    cpm_session* session = nullptr;
    std::memcpy(&session, handle.data(), sizeof session);
    return session;
}

void check(std::int32_t status, const ov::Node& node) {
    OPENVINO_ASSERT(status == CPM_OK, node.get_type_name(), " ", node.get_friendly_name(), ": ", cpm_error_text(status));
}

void check_panels(const cpm_nbits_shape& shape, const ov::Tensor& panels, const ov::Node& node, std::size_t count) {
    const std::int64_t expected = cpm_nbits_bytes(&shape) * static_cast<std::int64_t>(count);
    OPENVINO_ASSERT(expected == static_cast<std::int64_t>(panels.get_byte_size()), node.get_friendly_name(),
                    ": packed weight of ", panels.get_byte_size(), " bytes, expected ", expected);
}

const float* normalized(cpm_pool* pool, const ov::Tensor& x, const ov::Tensor& weight, float epsilon, float scale,
                        const ov::Node& node) {
    thread_local std::vector<float> rows;
    const auto cols = static_cast<std::int64_t>(x.get_shape()[2]);
    const std::int64_t m = rows_of(x.get_shape());
    rows.resize(static_cast<std::size_t>(m * cols));
    check(cpm_rms_norm(pool, cpm_best_isa(), x.data<const float>(), weight.data<const float>(), m, cols, epsilon,
                       scale, rows.data()),
          node);
    return rows.data();
}

cpm_nbits_shape WeightAttributes::shape(std::size_t cols) const {
    return {rows, static_cast<std::int64_t>(cols), static_cast<std::int32_t>(bits), static_cast<std::int32_t>(group),
            static_cast<std::int32_t>(symmetric)};
}

void WeightAttributes::visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("rows", rows);
    visitor.on_attribute("bits", bits);
    visitor.on_attribute("group", group);
    visitor.on_attribute("symmetric", symmetric);
}

void NormLinear::validate_and_infer_types() {
    set_output_type(0, ov::element::f32, with_last(get_input_partial_shape(0), weight_.rows));
}

bool NormLinear::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("scale", scale_);
    return true;
}

std::shared_ptr<ov::Node> NormLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<NormLinear>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool NormLinear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor &x = inputs[0], &panels = inputs[2];
    const cpm_nbits_shape shape = weight_.shape(x.get_shape()[2]);
    check_panels(shape, panels, *this);
    set_output(outputs[0], x.get_shape(), weight_.rows);
    cpm_pool* pool = pool_of(inputs[3]);
    const float* rows = normalized(pool, x, inputs[1], epsilon_, scale_, *this);
    check(cpm_nbits_matmul(pool, cpm_best_isa(), &shape, panels.data<const std::uint8_t>(), rows,
                           rows_of(x.get_shape()), outputs[0].data<float>(), nullptr, 1.0f),
          *this);
    return true;
}

void NormGated::validate_and_infer_types() {
    set_output_type(0, ov::element::f32, with_last(get_input_partial_shape(0), weight_.rows));
}

bool NormGated::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    visitor.on_attribute("epsilon", epsilon_);
    return true;
}

std::shared_ptr<ov::Node> NormGated::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<NormGated>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool NormGated::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor& x = inputs[0];
    const cpm_nbits_shape shape = weight_.shape(x.get_shape()[2]);
    check_panels(shape, inputs[2], *this);
    check_panels(shape, inputs[3], *this);
    set_output(outputs[0], x.get_shape(), weight_.rows);
    cpm_pool* pool = pool_of(inputs[4]);
    const float* rows = normalized(pool, x, inputs[1], epsilon_, 1.0f, *this);
    check(cpm_nbits_gated(pool, cpm_best_isa(), &shape, inputs[2].data<const std::uint8_t>(),
                          inputs[3].data<const std::uint8_t>(), rows, rows_of(x.get_shape()),
                          outputs[0].data<float>()),
          *this);
    return true;
}

void LinearAdd::validate_and_infer_types() {
    set_output_type(0, ov::element::f32, with_last(get_input_partial_shape(0), weight_.rows));
}

bool LinearAdd::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    visitor.on_attribute("scale", scale_);
    return true;
}

std::shared_ptr<ov::Node> LinearAdd::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<LinearAdd>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool LinearAdd::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor& x = inputs[0];
    const cpm_nbits_shape shape = weight_.shape(x.get_shape()[2]);
    check_panels(shape, inputs[2], *this);
    set_output(outputs[0], x.get_shape(), weight_.rows);
    check(cpm_nbits_matmul(pool_of(inputs[3]), cpm_best_isa(), &shape, inputs[2].data<const std::uint8_t>(),
                           x.data<const float>(), rows_of(x.get_shape()), outputs[0].data<float>(),
                           inputs[1].data<const float>(), scale_),
          *this);
    return true;
}

}  // namespace cpm_openvino
