#include "kernels/output_gate.h"

#include "kernels/exp_x86.h"

namespace cpm {

void output_gate_avx2(const float* gate, std::int64_t n, float* values) {
    const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 e = exp8(_mm256_sub_ps(zero, _mm256_loadu_ps(gate + i)));
        _mm256_storeu_ps(values + i, _mm256_div_ps(_mm256_loadu_ps(values + i), _mm256_add_ps(one, e)));
    }
    if (i < n) output_gate_scalar(gate + i, n - i, values + i);
}

}  // namespace cpm
