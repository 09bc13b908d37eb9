#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>

#include "openvino/ops.h"

namespace {

// Once to read an IR that holds the op, once to import the ONNX node of the same name.
template <class Op>
void add(std::vector<ov::Extension::Ptr>& extensions, const char* name) {
    extensions.push_back(std::make_shared<ov::OpExtension<Op>>());
    extensions.push_back(std::make_shared<ov::frontend::onnx::OpExtension<Op>>(name, "cpm"));
}

std::vector<ov::Extension::Ptr> all() {
    OPENVINO_ASSERT(cpm_abi_version() == CPM_ABI_VERSION, "cpm kernels: expected ABI version ", CPM_ABI_VERSION,
                    ", got ", cpm_abi_version());
    std::vector<ov::Extension::Ptr> extensions;
    add<cpm_openvino::NormLinear>(extensions, "NormLinear");
    add<cpm_openvino::NormGated>(extensions, "NormGated");
    add<cpm_openvino::NormExperts>(extensions, "NormExperts");
    add<cpm_openvino::NormSparseMlp>(extensions, "NormSparseMlp");
    add<cpm_openvino::LinearAdd>(extensions, "LinearAdd");
    add<cpm_openvino::CachedAttention>(extensions, "CachedAttention");
    add<cpm_openvino::RecurrentAttention>(extensions, "RecurrentAttention");
    add<cpm_openvino::LatentAttention>(extensions, "LatentAttention");
    return extensions;
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(all());
