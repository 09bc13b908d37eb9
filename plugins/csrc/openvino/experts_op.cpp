#include "openvino/ops.h"

namespace cpm_openvino {

void NormExperts::validate_and_infer_types() {
    set_output_type(0, ov::element::f32, get_input_partial_shape(0));
}

bool NormExperts::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    visitor.on_attribute("top_k", top_k_);
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("scale", scale_);
    return true;
}

std::shared_ptr<ov::Node> NormExperts::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto copy = std::make_shared<NormExperts>(*this);
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool NormExperts::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor &x = inputs[0], &router = inputs[2];
    const ov::Shape shape = x.get_shape();
    OPENVINO_ASSERT(shape.size() == 3 && router.get_shape() == (ov::Shape{router.get_shape()[0], shape[2]}),
                    get_friendly_name(), ": expected x of rank 3 and a router (experts, ", shape.back(), ")");
    outputs[0].set_shape(shape);
    cpm_experts experts{};
    experts.count = static_cast<std::int64_t>(router.get_shape()[0]);
    experts.top_k = top_k_;
    experts.inner = weight_.shape(shape[2]);
    experts.outer = weight_.shape(static_cast<std::size_t>(weight_.rows));
    experts.outer.rows = experts.inner.cols;
    for (std::size_t i = 3; i < 6; ++i)
        check_panels(i < 5 ? experts.inner : experts.outer, inputs[i], *this, router.get_shape()[0]);
    experts.w1 = inputs[3].data<const std::uint8_t>();
    experts.w3 = inputs[4].data<const std::uint8_t>();
    experts.w2 = inputs[5].data<const std::uint8_t>();
    experts.router = router.data<const float>();
    cpm_pool* pool = cpm_session_pool(session_of(inputs[6]));
    const float* rows = normalized(pool, x, inputs[1], epsilon_, 1.0f, *this);
    check(cpm_mixture_of_experts(pool, cpm_best_isa(), &experts, rows, static_cast<std::int64_t>(shape[0] * shape[1]),
                                 x.data<const float>(), scale_, outputs[0].data<float>()),
          *this);
    return true;
}

}  // namespace cpm_openvino
