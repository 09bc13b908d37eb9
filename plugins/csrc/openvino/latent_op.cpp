#include "openvino/ops.h"

namespace cpm_openvino {

void LatentAttention::validate_and_infer_types() {
    const auto& query = get_input_partial_shape(0);
    OPENVINO_ASSERT(query.rank().is_static() && query.size() == 3, "expected query of rank 3, got ", query);
    set_output_type(0, ov::element::f32, ov::PartialShape{query[0], query[1], num_heads_ * value_size_});
}

bool LatentAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("layer", layer_);
    visitor.on_attribute("num_heads", num_heads_);
    visitor.on_attribute("rank", rank_);
    visitor.on_attribute("nope_size", nope_size_);
    visitor.on_attribute("rope_size", rope_size_);
    visitor.on_attribute("value_size", value_size_);
    visitor.on_attribute("groups", groups_);
    visitor.on_attribute("scale", scale_);
    visitor.on_attribute("epsilon", epsilon_);
    return true;
}

std::shared_ptr<ov::Node> LatentAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<LatentAttention>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool LatentAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape shape = inputs[0].get_shape();
    OPENVINO_ASSERT(shape[0] == 1, get_friendly_name(), ": a session holds one sequence, got a batch of ", shape[0]);
    outputs[0].set_shape({1, shape[1], static_cast<std::size_t>(num_heads_ * value_size_)});

    cpm_session* session = session_of(inputs.back());
    const cpm_cache* cache = cpm_session_cache(session, static_cast<std::int32_t>(layer_));
    OPENVINO_ASSERT(cache && cache->key, get_friendly_name(), ": the session has no cache for layer ", layer_);
    const std::int64_t up_rows = num_heads_ * (nope_size_ + value_size_);
    const std::size_t up_bytes = static_cast<std::size_t>(up_rows * (4 * groups_ + rank_));
    OPENVINO_ASSERT(inputs[5].get_byte_size() == up_bytes, get_friendly_name(), ": up-projection of ",
                    inputs[5].get_byte_size(), " bytes, expected ", up_bytes);

    cpm_latent_spec spec{};
    spec.num_heads = static_cast<std::int32_t>(num_heads_);
    spec.rank = static_cast<std::int32_t>(rank_);
    spec.nope_size = static_cast<std::int32_t>(nope_size_);
    spec.rope_size = static_cast<std::int32_t>(rope_size_);
    spec.value_size = static_cast<std::int32_t>(value_size_);
    spec.groups = static_cast<std::int32_t>(groups_);
    spec.scale = scale_;
    spec.epsilon = epsilon_;

    cpm_latent_rows rows{};
    rows.query = inputs[0].data<const float>();
    rows.latent = inputs[1].data<const float>();
    rows.query_stride = static_cast<std::int64_t>(shape[2]);
    rows.latent_stride = rank_ + rope_size_;
    rows.norm = inputs[2].data<const float>();
    rows.cosine = inputs[3].data<const float>();
    rows.sine = inputs[4].data<const float>();
    rows.scales = reinterpret_cast<const float*>(inputs[5].data<const std::uint8_t>());
    rows.codes = reinterpret_cast<const std::int8_t*>(rows.scales + up_rows * groups_);
    rows.past_length = first_integer(inputs[6]);
    rows.rows = static_cast<std::int64_t>(shape[1]);
    rows.output = outputs[0].data<float>();
    const std::int32_t status =
        cpm_latent_attention(cpm_session_pool(session), cpm_best_isa(), &spec, cache, &rows);
    OPENVINO_ASSERT(status == CPM_OK, get_friendly_name(), ": ", cpm_error_text(status));
    return true;
}

}  // namespace cpm_openvino
