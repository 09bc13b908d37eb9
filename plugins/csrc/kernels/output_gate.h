// values *= sigmoid(gate): how attention outputs are gated.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"

namespace cpm {

// One row of n values.
using OutputGate = void (*)(const float* gate, std::int64_t n, float* values);

OutputGate output_gate(Isa isa);

void output_gate_scalar(const float* gate, std::int64_t n, float* values);
#if defined(CPM_X86)
void output_gate_avx2(const float* gate, std::int64_t n, float* values);
#endif

}  // namespace cpm
