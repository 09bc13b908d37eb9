// The cpm ops as OpenVINO operations that run our kernels: what the `native` flavour of a bundle consists of.
//
// Every op takes, as its last input, the address of a cpm_session as 8 bytes (the CPU plugin narrows int64 to
// int32): sessions in one process share a compiled model and its weights, but neither threads nor caches.
// Weights are the kernels' packed panels (uint8), read in place from the mapped IR.
#pragma once

#include <openvino/op/op.hpp>

#include "capi.h"

namespace cpm_openvino {

cpm_session* session_of(const ov::Tensor& handle);

// The CPU plugin hands int64 inputs over as int32.
std::int64_t first_integer(const ov::Tensor& tensor);

// The attributes of a packed weight matrix.
struct WeightAttributes {
    std::int64_t rows = 0, bits = 4, group = 32, symmetric = 1;
    void visit(ov::AttributeVisitor& visitor);
    cpm_nbits_shape shape(std::size_t cols) const;
};

// Throws unless `panels` holds `count` matrices of a shape.
void check_panels(const cpm_nbits_shape& shape, const ov::Tensor& panels, const ov::Node& node, std::size_t count = 1);

// Rows of x (B, T, n) normalized, kept by the thread that runs the step until its next call.
const float* normalized(cpm_pool* pool, const ov::Tensor& x, const ov::Tensor& weight, float epsilon, float scale,
                        const ov::Node& node);

// Throws unless status is CPM_OK.
void check(std::int32_t status, const ov::Node& node);

// scale * rms_norm(x) . w^T. Inputs: x (B, T, K) f32, norm weight (K) f32, panels u8, session.
class NormLinear : public ov::op::Op {
public:
    OPENVINO_OP("NormLinear", "cpm");
    NormLinear() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    WeightAttributes weight_;
    float epsilon_ = 1e-6f, scale_ = 1.0f;
};

// silu(n . gate^T) * (n . up^T) with n = rms_norm(x). Inputs: x, norm weight, gate panels, up panels, session.
class NormGated : public ov::op::Op {
public:
    OPENVINO_OP("NormGated", "cpm");
    NormGated() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    WeightAttributes weight_;
    float epsilon_ = 1e-6f;
};

// x + scale * what the experts make of n = rms_norm(x), see kernels/mixture_of_experts.h. Inputs: x (B, T, H), norm
// weight (H), router (experts, H) f32, w1, w3 and w2 panels of all experts, session. The weight attributes are those
// of w1 and w3: w2 has `rows` columns.
class NormExperts : public ov::op::Op {
public:
    OPENVINO_OP("NormExperts", "cpm");
    NormExperts() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    WeightAttributes weight_;
    std::int64_t top_k_ = 1;
    float epsilon_ = 1e-6f, scale_ = 1.0f;
};

// residual + scale * the MLP of rms_norm(x) with a threshold on its gate, see kernels/sparse_mlp.h. Inputs: x (B, T, H),
// norm weight (H), residual (B, T, H), gate panels, up strips, down slices, session, which counts what passes. The weight
// attributes are those of gate and up: down has `rows` columns.
class NormSparseMlp : public ov::op::Op {
public:
    OPENVINO_OP("NormSparseMlp", "cpm");
    NormSparseMlp() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    WeightAttributes weight_;
    float threshold_ = 0.0f, epsilon_ = 1e-6f, scale_ = 1.0f;
};

// residual + scale * (x . w^T). Inputs: x (B, T, K), residual (B, T, rows), panels, session.
class LinearAdd : public ov::op::Op {
public:
    OPENVINO_OP("LinearAdd", "cpm");
    LinearAdd() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    WeightAttributes weight_;
    float scale_ = 1.0f;
};

// Rotary embedding, append to the session's cache, attention, output gate. Inputs: qkv (B, T, (num_heads +
// 2 kv_num_heads) * D), with num_heads * D gates behind where `gated`; cos and sin (B, T, D / 2), which layers
// without rotary embedding leave out; past_length (B), session; B is 1. The attributes are those of
// cpm.SparseAttention, `gated`, and `layer`, which names the cache.
class CachedAttention : public ov::op::Op {
public:
    OPENVINO_OP("CachedAttention", "cpm");
    CachedAttention() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    std::int64_t layer_ = 0, num_heads_ = 1, kv_num_heads_ = 1, kernel_size_ = 32, kernel_stride_ = 16;
    std::int64_t block_size_ = 64, init_blocks_ = 1, window_size_ = 2048, topk_ = 0, dense_len_ = 8192;
    std::int64_t coarse_lse_ = 1, gated_ = 0;
    float scale_ = 1.0f;
};

// The whole of a recurrent layer between its products, on the session's state; see kernels/recurrent_attention.h.
// Inputs: mixed (B, T, 4 * heads * D) of queries, keys, values and gates, query norm (D), key norm (D), output norm
// (heads * D), cos and sin (B, T, D / 2), log decays (heads), session; B is 1. `layer` names the state.
class RecurrentAttention : public ov::op::Op {
public:
    OPENVINO_OP("RecurrentAttention", "cpm");
    RecurrentAttention() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    std::int64_t layer_ = 0;
    float scale_ = 1.0f, epsilon_ = 1e-6f;
};

// The whole of latent attention between its products, on the session's cache; see kernels/latent_attention.h. Inputs:
// query (B, T, num_heads * (nope + rope)), latent (B, T, rank + rope), latent norm (rank), cos and sin (B, T, rope / 2),
// up-projection u8 (float scales, then int8 codes), past_length (B), session; B is 1. `layer` names the cache.
class LatentAttention : public ov::op::Op {
public:
    OPENVINO_OP("LatentAttention", "cpm");
    LatentAttention() = default;
    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool has_evaluate() const override { return true; }

private:
    std::int64_t layer_ = 0, num_heads_ = 1, rank_ = 8, nope_size_ = 1, rope_size_ = 8, value_size_ = 16, groups_ = 1;
    float scale_ = 1.0f, epsilon_ = 1e-6f;
};

}  // namespace cpm_openvino
