#include "openvino/ops.h"

namespace cpm_openvino {

std::int64_t first_integer(const ov::Tensor& tensor) {
    if (tensor.get_element_type() == ov::element::i32) return *tensor.data<const std::int32_t>();
    return *tensor.data<const std::int64_t>();
}

void CachedAttention::validate_and_infer_types() {
    const auto& qkv = get_input_partial_shape(0);
    OPENVINO_ASSERT(qkv.rank().is_static() && qkv.size() == 3, "expected qkv of rank 3, got ", qkv);
    const auto wide = num_heads_ * (1 + gated_) + 2 * kv_num_heads_;
    ov::Dimension width = ov::Dimension::dynamic();
    if (qkv[2].is_static()) width = qkv[2].get_length() / wide * num_heads_;
    set_output_type(0, ov::element::f32, ov::PartialShape{qkv[0], qkv[1], width});
}

bool CachedAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("layer", layer_);
    visitor.on_attribute("num_heads", num_heads_);
    visitor.on_attribute("kv_num_heads", kv_num_heads_);
    visitor.on_attribute("scale", scale_);
    visitor.on_attribute("kernel_size", kernel_size_);
    visitor.on_attribute("kernel_stride", kernel_stride_);
    visitor.on_attribute("block_size", block_size_);
    visitor.on_attribute("init_blocks", init_blocks_);
    visitor.on_attribute("window_size", window_size_);
    visitor.on_attribute("topk", topk_);
    visitor.on_attribute("dense_len", dense_len_);
    visitor.on_attribute("coarse_lse", coarse_lse_);
    visitor.on_attribute("gated", gated_);
    return true;
}

std::shared_ptr<ov::Node> CachedAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<CachedAttention>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool CachedAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape shape = inputs[0].get_shape();
    OPENVINO_ASSERT(shape[0] == 1, get_friendly_name(), ": a session holds one sequence, got a batch of ", shape[0]);
    const auto rows = static_cast<std::int64_t>(shape[1]), stride = static_cast<std::int64_t>(shape[2]);
    const std::int64_t size = stride / (num_heads_ * (1 + gated_) + 2 * kv_num_heads_);
    outputs[0].set_shape({1, shape[1], static_cast<std::size_t>(num_heads_ * size)});

    const bool rotated = inputs.size() == 5;
    cpm_session* session = session_of(inputs.back());
    const cpm_cache* cache = cpm_session_cache(session, static_cast<std::int32_t>(layer_));
    OPENVINO_ASSERT(cache && cache->key, get_friendly_name(), ": the session has no cache for layer ", layer_);

    cpm_attention_spec spec{};
    spec.num_heads = static_cast<std::int32_t>(num_heads_);
    spec.kv_num_heads = static_cast<std::int32_t>(kv_num_heads_);
    spec.head_size = static_cast<std::int32_t>(size);
    spec.scale = scale_;
    spec.kernel_size = static_cast<std::int32_t>(kernel_size_);
    spec.kernel_stride = static_cast<std::int32_t>(kernel_stride_);
    spec.block_size = static_cast<std::int32_t>(block_size_);
    spec.init_blocks = static_cast<std::int32_t>(init_blocks_);
    spec.window_size = static_cast<std::int32_t>(window_size_);
    spec.topk = static_cast<std::int32_t>(topk_);
    spec.dense_len = static_cast<std::int32_t>(dense_len_);
    spec.coarse_lse = static_cast<std::int32_t>(coarse_lse_);

    cpm_attention_rows step{};
    step.query = inputs[0].data<const float>();
    step.key = step.query + num_heads_ * size;
    step.value = step.key + kv_num_heads_ * size;
    step.query_stride = step.key_stride = step.value_stride = stride;
    step.cosine = rotated ? inputs[1].data<const float>() : nullptr;
    step.sine = rotated ? inputs[2].data<const float>() : nullptr;
    step.past_length = first_integer(inputs[inputs.size() - 2]);
    step.rows = rows;
    step.output = outputs[0].data<float>();
    cpm_pool* pool = cpm_session_pool(session);
    std::int32_t status = cpm_sparse_attention(pool, cpm_best_isa(), &spec, cache, &step);
    if (status == CPM_OK && gated_) {
        const float* gate = step.value + kv_num_heads_ * size;
        status = cpm_output_gate(pool, cpm_best_isa(), gate, stride, rows, num_heads_ * size, step.output);
    }
    OPENVINO_ASSERT(status == CPM_OK, get_friendly_name(), ": ", cpm_error_text(status));
    return true;
}

}  // namespace cpm_openvino
