// Up-projections on 256-bit vectors.
#include "kernels/latent_attention.h"
#include "kernels/sparse_attention_vectors_x86.h"

namespace cpm {
namespace {

constexpr int kColumns = 8;  // vectors of sums that stay in registers

void widen(const std::uint16_t* in, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; i += kLanes) _mm256_storeu_ps(out + i, load8(in + i));
}

void dequantize(const std::int8_t* codes, const float* scales, int n, int size, int groups, float* out) {
    const int width = size / groups;
    for (int row = 0; row < n * groups; ++row) {
        const __m256 scale = _mm256_broadcast_ss(scales + row);
        for (int i = 0; i < width; i += kLanes, codes += kLanes, out += kLanes)
            _mm256_storeu_ps(out, _mm256_mul_ps(load8(codes), scale));
    }
}

// Columns of one group: out (8 * Vectors) = sum of factors[i] * scales[i * groups] times row i.
template <int Vectors>
inline void combine_columns(const std::int8_t* codes, const float* scales, const float* factors, int n, int size,
                            int groups, float* out) {
    __m256 sum[Vectors];
    CPM_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[v] = _mm256_setzero_ps();
    for (int row = 0; row < n; ++row, codes += size) {
        const __m256 factor = _mm256_set1_ps(factors[row] * scales[row * groups]);
        CPM_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[v] = _mm256_fmadd_ps(load8(codes + v * kLanes), factor, sum[v]);
    }
    CPM_UNROLL
    for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(out + v * kLanes, sum[v]);
}

void combine(const std::int8_t* codes, const float* scales, const float* factors, int n, int size, int groups,
             float* out) {
    const int width = size / groups;
    for (int g = 0; g < groups; ++g) {
        int i = g * width;
        const int end = i + width;
        for (; i + kColumns * kLanes <= end; i += kColumns * kLanes)
            combine_columns<kColumns>(codes + i, scales + g, factors, n, size, groups, out + i);
        for (; i < end; i += kLanes) combine_columns<1>(codes + i, scales + g, factors, n, size, groups, out + i);
    }
}

void project(const std::int8_t* codes, const float* scales, const float* x, int n, int size, int groups, float* out) {
    const int width = size / groups;
    for (int row = 0; row < n; ++row) {
        __m256 total = _mm256_setzero_ps();
        for (int g = 0; g < groups; ++g, codes += width) {
            const float* values = x + g * width;
            __m256 sum = _mm256_setzero_ps(), sum2 = sum;
            int i = 0;
            for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
                sum = _mm256_fmadd_ps(load8(codes + i), load8(values + i), sum);
                sum2 = _mm256_fmadd_ps(load8(codes + i + kLanes), load8(values + i + kLanes), sum2);
            }
            for (; i < width; i += kLanes) sum = _mm256_fmadd_ps(load8(codes + i), load8(values + i), sum);
            total = _mm256_fmadd_ps(_mm256_add_ps(sum, sum2), _mm256_broadcast_ss(scales + row * groups + g), total);
        }
        out[row] = sum_of(total);
    }
}

}  // namespace

const LatentKernels kLatentAvx2 = {widen, dequantize, combine, project};

}  // namespace cpm
