// Rows of the caches on 256-bit vectors: written, read as floats, and averaged.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/half.h"
#include "kernels/int8_codes.h"
#include "kernels/sparse_attention_vectors_x86.h"

namespace cpm {
namespace {

// Floats, float16, or int8 without their scales.
template <typename T>
struct PlainRows {
    const T* at;
    int size;

    __m256 load(int row, int column) const { return load8(at + std::int64_t(row) * size + column); }
    PlainRows from(int row) const { return {at + std::int64_t(row) * size, size}; }
};

// int8 keys.
struct ScaledRows {
    const std::int8_t* at;
    const float* scales;  // (rows, groups)
    int size, groups;

    __m256 codes(int row, int column) const { return load8(at + std::int64_t(row) * size + column); }
    __m256 scale(int row, int column) const {
        return _mm256_broadcast_ss(scales + row * groups + column / kScaleColumns);
    }
    __m256 load(int row, int column) const { return _mm256_mul_ps(codes(row, column), scale(row, column)); }
    ScaledRows from(int row) const { return {at + std::int64_t(row) * size, scales + row * groups, size, groups}; }
};

inline PlainRows<std::uint16_t> half_rows(const CacheRows& rows, int size) {
    return {static_cast<const std::uint16_t*>(rows.data), size};
}

// Calls body(rows, first, count) for int8 keys [first, first + count), a few at a time, with their scales as floats.
template <typename Body>
inline void with_scales(const CacheRows& keys, int n, int size, Body body) {
    constexpr int kPart = 64;  // a multiple of kKeyPanel
    alignas(32) float scales[kPart * key_scales(kMaxHeadSize)];
    const int groups = key_scales(size);
    for (int first = 0; first < n; first += kPart) {
        const int count = std::min(kPart, n - first);
        const std::uint16_t* stored = keys.scales + std::int64_t(first) * groups;
        int i = 0;
        for (; i + kLanes <= count * groups; i += kLanes) _mm256_store_ps(scales + i, load8(stored + i));
        for (; i < count * groups; ++i) scales[i] = half_to_float(stored[i]);
        const std::int8_t* codes = static_cast<const std::int8_t*>(keys.data) + std::int64_t(first) * size;
        body(ScaledRows{codes, scales, size, groups}, first, count);
    }
}

void store_half(const float* in, int size, const CacheRows& row) {
    std::uint16_t* out = static_cast<std::uint16_t*>(row.data);
    for (int d = 0; d < size; d += kLanes)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + d), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// n floats, a multiple of 8, to codes; returns their scale. The largest magnitude is taken from the bits, where NaN is
// larger than all others, so that it ends up in the scale.
inline std::uint16_t quantize(const float* in, int n, std::int8_t* codes) {
    __m256i peak = _mm256_setzero_si256();
    for (int d = 0; d < n; d += kLanes)
        peak = _mm256_max_epi32(peak, _mm256_and_si256(_mm256_castps_si256(load8(in + d)),
                                                       _mm256_set1_epi32(0x7fffffff)));
    const int bits = largest(peak);
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    const std::uint16_t scale = code_scale(magnitude);
    const float factor = code_factor(scale);
    if (factor == 0.0f) {
        std::memset(codes, 0, std::size_t(n));
        return scale;
    }
    const __m256 factors = _mm256_set1_ps(factor);
    for (int d = 0; d < n; d += kLanes) {
        const __m256i wide = _mm256_cvtps_epi32(_mm256_mul_ps(load8(in + d), factors));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        const __m128i bytes = _mm_max_epi8(_mm_packs_epi16(words, words), _mm_set1_epi8(-kMaxCode));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + d), bytes);
    }
    return scale;
}

void store_int8_key(const float* in, int size, const CacheRows& row) {
    std::int8_t* codes = static_cast<std::int8_t*>(row.data);
    for (int d = 0; d < size; d += kScaleColumns)
        row.scales[d / kScaleColumns] = quantize(in + d, std::min(kScaleColumns, size - d), codes + d);
}

void store_int8_value(const float* in, int size, const CacheRows& row) {
    *row.scales = quantize(in, size, static_cast<std::int8_t*>(row.data));
}

template <typename Rows>
inline void add_rows(const Rows& rows, int n, int size, float* sums) {
    for (int d = 0; d < size; d += kLanes) {
        __m256 sum = _mm256_loadu_ps(sums + d);
        for (int i = 0; i < n; ++i) sum = _mm256_add_ps(sum, rows.load(i, d));
        _mm256_storeu_ps(sums + d, sum);
    }
}

inline void divide(float* sums, int size, int n) {
    for (int d = 0; d < size; d += kLanes)
        _mm256_storeu_ps(sums + d, _mm256_div_ps(_mm256_loadu_ps(sums + d), _mm256_set1_ps(float(n))));
}

void mean_half(const CacheRows& keys, int n, int size, float* out) {
    std::fill_n(out, size, 0.0f);
    add_rows(half_rows(keys, size), n, size, out);
    divide(out, size, n);
}

void mean_int8(const CacheRows& keys, int n, int size, float* out) {
    std::fill_n(out, size, 0.0f);
    with_scales(keys, n, size, [&](const ScaledRows& rows, int, int count) { add_rows(rows, count, size, out); });
    divide(out, size, n);
}

void apply_scales(float* weights, int rows, std::int64_t ld, int n, const CacheRows& values) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const __m256 scales = load8(values.scales + i);
        for (int r = 0; r < rows; ++r) {
            float* at = weights + r * ld + i;
            _mm256_storeu_ps(at, _mm256_mul_ps(_mm256_loadu_ps(at), scales));
        }
    }
    for (; i < n; ++i)
        for (int r = 0; r < rows; ++r) weights[r * ld + i] *= half_to_float(values.scales[i]);
}

}  // namespace
}  // namespace cpm
