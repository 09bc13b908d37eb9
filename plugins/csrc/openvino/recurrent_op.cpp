#include "openvino/ops.h"

namespace cpm_openvino {

void RecurrentAttention::validate_and_infer_types() {
    const auto& mixed = get_input_partial_shape(0);
    OPENVINO_ASSERT(mixed.rank().is_static() && mixed.size() == 3, "expected mixed of rank 3, got ", mixed);
    ov::Dimension width = ov::Dimension::dynamic();
    if (mixed[2].is_static()) width = mixed[2].get_length() / 4;
    set_output_type(0, ov::element::f32, ov::PartialShape{mixed[0], mixed[1], width});
}

bool RecurrentAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("layer", layer_);
    visitor.on_attribute("scale", scale_);
    visitor.on_attribute("epsilon", epsilon_);
    return true;
}

std::shared_ptr<ov::Node> RecurrentAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<RecurrentAttention>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool RecurrentAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape shape = inputs[0].get_shape();
    OPENVINO_ASSERT(shape[0] == 1, get_friendly_name(), ": a session holds one sequence, got a batch of ", shape[0]);
    outputs[0].set_shape({1, shape[1], shape[2] / 4});

    cpm_session* session = session_of(inputs.back());
    float* state = cpm_session_state(session, static_cast<std::int32_t>(layer_));
    OPENVINO_ASSERT(state, get_friendly_name(), ": the session has no state for layer ", layer_);

    cpm_recurrent_rows rows{};
    rows.rows = static_cast<std::int64_t>(shape[1]);
    rows.heads = static_cast<std::int64_t>(inputs[6].get_size());
    rows.size = static_cast<std::int64_t>(shape[2]) / 4 / rows.heads;
    rows.mixed = inputs[0].data<const float>();
    rows.query_norm = inputs[1].data<const float>();
    rows.key_norm = inputs[2].data<const float>();
    rows.output_norm = inputs[3].data<const float>();
    rows.cosine = inputs[4].data<const float>();
    rows.sine = inputs[5].data<const float>();
    rows.decay = inputs[6].data<const float>();
    rows.scale = scale_;
    rows.epsilon = epsilon_;
    rows.output = outputs[0].data<float>();
    const std::int32_t status = cpm_recurrent_attention(cpm_session_pool(session), cpm_best_isa(), &rows, state);
    OPENVINO_ASSERT(status == CPM_OK, get_friendly_name(), ": ", cpm_error_text(status));
    return true;
}

}  // namespace cpm_openvino
