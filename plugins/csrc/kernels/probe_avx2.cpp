#include <immintrin.h>

#include "kernels/probe.h"

namespace cpm {
namespace {

std::uint64_t read(const std::uint8_t* data, std::int64_t bytes) {
    __m256i sums[4];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (std::int64_t i = 0; i + 128 <= bytes; i += 128)
        for (int j = 0; j < 4; ++j) {
            const auto* p = reinterpret_cast<const __m256i*>(data + i + 32 * j);
            sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(p));
        }
    std::uint64_t lanes[4];
    const __m256i total = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

std::int64_t multiply_add(std::int64_t rounds, float* sink) {
    // Ten chains cover the latency of two units.
    __m256 sums[10];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
    for (std::int64_t i = 0; i < rounds; ++i)
        for (int repeat = 0; repeat < 8; ++repeat)
            for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, half, one);
    for (auto& sum : sums) *sink += _mm256_cvtss_f32(sum);
    return rounds * 80 * 8;
}

}  // namespace

const ProbeKernels kProbeAvx2 = {read, multiply_add};

}  // namespace cpm
