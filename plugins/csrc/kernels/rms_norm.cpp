#include "kernels/rms_norm.h"

#include <cmath>

namespace cpm {

void rms_norm_scalar(const float* x, const float* weight, std::int64_t n, float epsilon, float scale, float* y) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < n; ++i) sum += double(x[i]) * x[i];
    const float factor = scale / std::sqrt(float(sum / double(n)) + epsilon);
    for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

RmsNorm rms_norm(Isa isa) {
#if defined(CPM_X86)
    if (isa != Isa::scalar) return rms_norm_avx2;
#else
    (void)isa;
#endif
    return rms_norm_scalar;
}

}  // namespace cpm
