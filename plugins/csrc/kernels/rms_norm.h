// y = scale * x / sqrt(mean(x^2) + epsilon) * weight, one row of n values.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"

namespace cpm {

using RmsNorm = void (*)(const float* x, const float* weight, std::int64_t n, float epsilon, float scale, float* y);

RmsNorm rms_norm(Isa isa);

void rms_norm_scalar(const float* x, const float* weight, std::int64_t n, float epsilon, float scale, float* y);
#if defined(CPM_X86)
void rms_norm_avx2(const float* x, const float* weight, std::int64_t n, float epsilon, float scale, float* y);
#endif

}  // namespace cpm
