#include <immintrin.h>

#include <cmath>

#include "kernels/rms_norm.h"

namespace cpm {

void rms_norm_avx2(const float* x, const float* weight, std::int64_t n, float epsilon, float scale, float* y) {
    __m256 sums[4];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    std::int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; ++j) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            sums[j] = _mm256_fmadd_ps(v, v, sums[j]);
        }
    float parts[8];
    _mm256_storeu_ps(parts, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    double total = 0.0;
    for (float part : parts) total += part;
    for (; i < n; ++i) total += double(x[i]) * x[i];
    const float factor = scale / std::sqrt(float(total / double(n)) + epsilon);
    const __m256 factors = _mm256_set1_ps(factor);
    for (i = 0; i + 8 <= n; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), factors);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(scaled, _mm256_loadu_ps(weight + i)));
    }
    for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

}  // namespace cpm
