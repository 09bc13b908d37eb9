#include "kernels/output_gate.h"

#include <cmath>

namespace cpm {

void output_gate_scalar(const float* gate, std::int64_t n, float* values) {
    for (std::int64_t i = 0; i < n; ++i) values[i] = values[i] / (1.0f + std::exp(-gate[i]));
}

OutputGate output_gate(Isa isa) {
#if defined(CPM_X86)
    if (isa != Isa::scalar) return output_gate_avx2;
#else
    (void)isa;
#endif
    return output_gate_scalar;
}

}  // namespace cpm
