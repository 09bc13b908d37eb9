#include "openvino/ops.h"

namespace cpm_openvino {
namespace {

void check_bytes(std::int64_t expected, const ov::Tensor& data, const ov::Node& node) {
    OPENVINO_ASSERT(expected == static_cast<std::int64_t>(data.get_byte_size()), node.get_friendly_name(),
                    ": packed weight of ", data.get_byte_size(), " bytes, expected ", expected);
}

}  // namespace

void NormSparseMlp::validate_and_infer_types() {
    set_output_type(0, ov::element::f32, get_input_partial_shape(2));
}

bool NormSparseMlp::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    visitor.on_attribute("threshold", threshold_);
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("scale", scale_);
    return true;
}

std::shared_ptr<ov::Node> NormSparseMlp::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<NormSparseMlp>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool NormSparseMlp::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor &x = inputs[0], &residual = inputs[2];
    const ov::Shape shape = x.get_shape();
    OPENVINO_ASSERT(shape.size() == 3 && residual.get_shape() == shape, get_friendly_name(),
                    ": expected x of rank 3 and a residual of its shape, got ", shape, " and ", residual.get_shape());
    outputs[0].set_shape(shape);
    cpm_sparse_mlp_weights weights{};
    weights.gate = weights.up = weight_.shape(shape[2]);
    weights.down = weight_.shape(static_cast<std::size_t>(weight_.rows));
    weights.down.rows = weights.up.cols;
    check_panels(weights.gate, inputs[3], *this);
    check_bytes(cpm_strips_bytes(&weights.up), inputs[4], *this);
    check_bytes(cpm_slices_bytes(&weights.down), inputs[5], *this);
    weights.gate_panels = inputs[3].data<const std::uint8_t>();
    weights.up_strips = inputs[4].data<const std::uint8_t>();
    weights.down_slices = inputs[5].data<const std::uint8_t>();
    weights.threshold = threshold_;
    cpm_session* session = session_of(inputs[6]);
    cpm_pool* pool = cpm_session_pool(session);
    const float* rows = normalized(pool, x, inputs[1], epsilon_, 1.0f, *this);
    check(cpm_sparse_mlp(pool, cpm_best_isa(), &weights, rows, static_cast<std::int64_t>(shape[0] * shape[1]),
                         residual.data<const float>(), scale_, outputs[0].data<float>(), cpm_session_sparsity(session)),
          *this);
    return true;
}

}  // namespace cpm_openvino
