// Keys and values of a block rearranged into float panels, for many queries at once.
#pragma once

#include "kernels/sparse_attention_rows_x86.h"

namespace cpm {
namespace {

alignas(32) constexpr std::uint16_t kZeroHalves[kMaxHeadSize] = {};
alignas(32) constexpr std::int8_t kZeroCodes[kMaxHeadSize] = {};

inline __m256i two_rows(const std::uint16_t* low, const std::uint16_t* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

inline void store_halves(__m256i keys, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(keys)));
    _mm256_storeu_ps(out + kLanes, _mm256_cvtph_ps(_mm256_extracti128_si256(keys, 1)));
}

// Columns d .. d + 7 of 16 keys, transposed while they are halves.
inline void transpose(const std::uint16_t* const* keys, int d, float* out) {
    __m256i a[8], b[8], c[8];
    CPM_UNROLL
    for (int i = 0; i < 8; ++i) a[i] = two_rows(keys[i] + d, keys[i + 8] + d);
    CPM_UNROLL
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[i + 4] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    CPM_UNROLL
    for (int h = 0; h < 2; ++h)  // columns 4h .. 4h + 3: first of keys 0-3, then of keys 4-7
        CPM_UNROLL
        for (int i = 0; i < 2; ++i) {
            c[4 * h + 2 * i] = _mm256_unpacklo_epi32(b[4 * h + 2 * i], b[4 * h + 2 * i + 1]);
            c[4 * h + 2 * i + 1] = _mm256_unpackhi_epi32(b[4 * h + 2 * i], b[4 * h + 2 * i + 1]);
        }
    CPM_UNROLL
    for (int h = 0; h < 2; ++h)
        CPM_UNROLL
        for (int i = 0; i < 2; ++i) {
            store_halves(_mm256_unpacklo_epi64(c[4 * h + i], c[4 * h + i + 2]), out + (4 * h + 2 * i) * kKeyPanel);
            store_halves(_mm256_unpackhi_epi64(c[4 * h + i], c[4 * h + i + 2]),
                         out + (4 * h + 2 * i + 1) * kKeyPanel);
        }
}

// Columns of eight keys, one key a vector, to eight rows of a panel.
inline void transpose8(const __m256* keys, float* out) {
    __m256 a[8], b[8];
    CPM_UNROLL
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(keys[2 * i], keys[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(keys[2 * i], keys[2 * i + 1]);
    }
    CPM_UNROLL
    for (int h = 0; h < 2; ++h)
        CPM_UNROLL
        for (int i = 0; i < 2; ++i) {
            a[4 * h + 2 * i] = _mm256_shuffle_ps(b[4 * h + i], b[4 * h + i + 2], 0x44);
            a[4 * h + 2 * i + 1] = _mm256_shuffle_ps(b[4 * h + i], b[4 * h + i + 2], 0xee);
        }
    CPM_UNROLL
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + i * kKeyPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * kKeyPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

inline __m128i load_codes(const std::int8_t* codes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)); }

inline void store_codes(__m128i keys, __m256 scales, float* out) {
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(keys)), scales));
}

// Columns d .. d + 7 of 16 keys, transposed while they are codes; scales of keys 0-7 and 8-15.
inline void transpose(const std::int8_t* const* keys, int d, const __m256 (&scales)[2], float* out) {
    CPM_UNROLL
    for (int h = 0; h < 2; ++h, out += kLanes) {
        __m128i a[4], b[4], c[4];
        CPM_UNROLL
        for (int i = 0; i < 4; ++i)
            a[i] = _mm_unpacklo_epi8(load_codes(keys[8 * h + 2 * i] + d), load_codes(keys[8 * h + 2 * i + 1] + d));
        CPM_UNROLL
        for (int i = 0; i < 2; ++i) {  // columns 0-3 and 4-7, of keys 0-3 and 4-7
            b[i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
            b[i + 2] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
        }
        CPM_UNROLL
        for (int i = 0; i < 2; ++i) {  // two columns each
            c[2 * i] = _mm_unpacklo_epi32(b[2 * i], b[2 * i + 1]);
            c[2 * i + 1] = _mm_unpackhi_epi32(b[2 * i], b[2 * i + 1]);
        }
        CPM_UNROLL
        for (int i = 0; i < 4; ++i) {
            store_codes(c[i], scales[h], out + 2 * i * kKeyPanel);
            store_codes(_mm_unpackhi_epi64(c[i], c[i]), scales[h], out + (2 * i + 1) * kKeyPanel);
        }
    }
}

void pack_half_keys(const CacheRows& keys, int n, int size, float* panels, Ahead& ahead) {
    const std::uint16_t* halves = static_cast<const std::uint16_t*>(keys.data);
    for (int first = 0; first < n; first += kKeyPanel, panels += kKeyPanel * size) {
        const std::uint16_t* rows[kKeyPanel];
        for (int i = 0; i < kKeyPanel; ++i)
            rows[i] = first + i < n ? halves + std::int64_t(first + i) * size : kZeroHalves;
        for (int d = 0; d < size; d += kLanes) {
            fetch(ahead, kLinesPerTranspose);
            transpose(rows, d, panels + d * kKeyPanel);
        }
    }
}

void pack_int8_panel(const ScaledRows& keys, int n, float* panel, Ahead& ahead) {
    const std::int8_t* rows[kKeyPanel];
    for (int i = 0; i < kKeyPanel; ++i) rows[i] = i < n ? keys.at + i * keys.size : kZeroCodes;
    __m256 scales[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int d = 0; d < keys.size; d += kLanes) {
        if (d % kScaleColumns == 0) {
            alignas(32) float column[kKeyPanel] = {};
            for (int i = 0; i < std::min(n, kKeyPanel); ++i) column[i] = keys.scales[i * keys.groups + d / kScaleColumns];
            scales[0] = _mm256_load_ps(column);
            scales[1] = _mm256_load_ps(column + kLanes);
        }
        fetch(ahead, kLinesPerTranspose);
        transpose(rows, d, scales, panel + d * kKeyPanel);
    }
}

void pack_int8_keys(const CacheRows& keys, int n, int size, float* panels, Ahead& ahead) {
    with_scales(keys, n, size, [&](const ScaledRows& rows, int first, int count) {
        for (int k = 0; k < count; k += kKeyPanel)
            pack_int8_panel(rows.from(k), count - k, panels + std::int64_t(first + k) * size, ahead);
    });
}

void pack_pooled(const float* keys, int n, int size, float* panels) {
    const PlainRows<float> rows{keys, size};
    for (int first = 0; first < n; first += kKeyPanel, panels += kKeyPanel * size)
        for (int d = 0; d < size; d += kLanes)
            CPM_UNROLL
            for (int half = 0; half < kKeyPanel; half += kLanes) {
                __m256 columns[kLanes];
                CPM_UNROLL
                for (int i = 0; i < kLanes; ++i) {
                    const int row = first + half + i;
                    columns[i] = row < n ? rows.load(row, d) : _mm256_setzero_ps();
                }
                transpose8(columns, panels + d * kKeyPanel + half);
            }
}

template <typename T>
void pack_values(const CacheRows& values, int n, int size, float* panels) {
    const PlainRows<T> rows{static_cast<const T*>(values.data), size};
    int first = 0;
    for (; first + kValuePanel <= size; first += kValuePanel)
        for (int i = 0; i < n; ++i, panels += kValuePanel) {
            _mm256_storeu_ps(panels, rows.load(i, first));
            _mm256_storeu_ps(panels + kLanes, rows.load(i, first + kLanes));
        }
    if (first < size)
        for (int i = 0; i < n; ++i, panels += kLanes) _mm256_storeu_ps(panels, rows.load(i, first));
}

}  // namespace
}  // namespace cpm
