// What the attention kernels on 256-bit vectors are made of. Everything is in an unnamed namespace: none of it leaks
// into files compiled for another instruction set.
#pragma once

#include <immintrin.h>

#include "kernels/sparse_attention.h"

// GCC unrolls these loops anyway, but without being told only after it has decided to keep the arrays of sums in
// memory, at three times the cost.
#if defined(__GNUC__)
#define CPM_UNROLL _Pragma("GCC unroll 8")
#else
#define CPM_UNROLL
#endif

namespace cpm {
namespace {

constexpr int kLanes = 8;

// How many lines are asked for between pieces of work, so that 8 queries over a block of 64 keys ask for the whole
// next one at an even pace.
constexpr int kLinesPerTranspose = 2;
constexpr int kLinesPerTile = 8;
constexpr int kLinesPerSoftmax = 4;
constexpr int kLinesPerColumns = 12;  // of one vector
constexpr int kLinesPerDots = 1;  // a byte of an element

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Asks for the next `lines` cache lines.
inline void fetch(Ahead& ahead, int lines) {
    Ahead::Range(&ranges)[4] = ahead.ranges;
    for (; lines > 0; --lines, ranges[0].at += 64) {
        if (ranges[0].at >= ranges[0].end) {
            if (!ranges[1].at) return;
            ranges[0] = ranges[1];
            ranges[1] = ranges[2];
            ranges[2] = ranges[3];
            ranges[3] = {};
        }
        _mm_prefetch(ranges[0].at, _MM_HINT_T0);
    }
}

// 2^x of 8 floats from -125 to 127, relative error below 3e-7 (degree 5 over [-1/2, 1/2]); less counts as -125.
inline __m256 exp2_8(__m256 x) {
    const __m256 shifter = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the nearest integer
    x = _mm256_max_ps(_mm256_set1_ps(-125.0f), x);  // in this order NaN stays NaN
    const __m256 shifted = _mm256_add_ps(x, shifter);
    const __m256 r = _mm256_sub_ps(x, _mm256_sub_ps(shifted, shifter));
    __m256 p = _mm256_set1_ps(0.00132764608f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.00967554189f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.0555071346f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.240221202f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.693146944f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

inline float exp2_1(float x) { return _mm256_cvtss_f32(exp2_8(_mm256_set1_ps(x))); }

inline float largest(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

inline int largest(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// Lanes below `count` all ones.
inline __m256 first_lanes(int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}

}  // namespace
}  // namespace cpm
