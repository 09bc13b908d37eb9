// Activation rows to int8 on 256-bit vectors, for matmul_nbits_x86.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels/matmul_nbits.h"
#include "kernels/unroll.h"

namespace cpm {
namespace {

inline float largest(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

// One full block of Block values.
template <int Block>
inline void quantize_block(const float* x, std::int8_t* codes, float* scale, std::int32_t* sum) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 peak = _mm256_setzero_ps();
    CPM_UNROLL
    for (int i = 0; i < Block; i += 8) peak = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x + i), magnitude), peak);
    const float top = largest(peak);
    const __m256 inverse = _mm256_set1_ps(top > kSmallestPeak ? 127.0f / top : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int start = 0; start < Block; start += 32) {
        __m256i q[4];
        for (int i = 0; i < 4; ++i) {
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + start + 8 * i), inverse));
            total = _mm256_add_epi32(total, q[i]);
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + start), _mm256_permutevar8x32_epi32(bytes, order));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    *sum = _mm_cvtsi128_si32(half);
    *scale = top / 127.0f;
}

template <int Block>
inline void quantize(const NBitsShape& shape, const float* x, int rows, std::int8_t* codes, float* scales,
                     std::int32_t* offsets) {
    for (std::int64_t start = 0; start < shape.cols; start += Block) {
        float rest[Block] = {};
        const float* block = x + start;
        if (shape.cols - start < Block) {
            std::memcpy(rest, block, std::size_t(shape.cols - start) * sizeof(float));
            block = rest;
        }
        quantize_block<Block>(block, codes, scales, offsets);
        *offsets *= shape.offset_factor();
        codes += rows * Block;
        scales += rows;
        offsets += rows;
    }
}

inline void quantize(const NBitsShape& shape, const float* x, int rows, std::int8_t* codes, float* scales,
                     std::int32_t* offsets) {
    if (shape.block() == kWideBlock)
        quantize<kWideBlock>(shape, x, rows, codes, scales, offsets);
    else
        quantize<kBlock>(shape, x, rows, codes, scales, offsets);
}

}  // namespace
}  // namespace cpm
