// Products of queries with keys and of weights with values, on packed panels or straight from the cache.
#pragma once

#include <cstring>

#include "kernels/sparse_attention_vectors_x86.h"

namespace cpm {
namespace {

constexpr int kTileRows = 6;        // 6 rows by 2 vectors: 12 sums, 2 operands and a broadcast fill 15 registers
constexpr int kDirectTileRows = 8;   // 8 rows by 1 vector: every half is converted once

alignas(32) constexpr std::uint16_t kZeroHalves[kMaxHeadSize] = {};
alignas(32) constexpr float kZeroFloats[kMaxHeadSize] = {};

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

// Columns d .. d + 7 of 8 keys.
inline void transpose8(const float* const* keys, int d, float* out) {
    __m256 a[8], b[8];
    CPM_UNROLL
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(keys[i] + d);
    CPM_UNROLL
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
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

inline void transpose(const float* const* keys, int d, float* out) {
    transpose8(keys, d, out);
    transpose8(keys + kLanes, d, out + kLanes);
}

template <typename T>
void pack(const T* keys, const T* zeros, int n, int size, float* panels, Ahead& ahead) {
    for (int first = 0; first < n; first += kKeyPanel, panels += kKeyPanel * size) {
        const T* rows[kKeyPanel];
        for (int i = 0; i < kKeyPanel; ++i) rows[i] = first + i < n ? keys + std::int64_t(first + i) * size : zeros;
        for (int d = 0; d < size; d += kLanes) {
            fetch(ahead, kLinesPerTranspose);
            transpose(rows, d, panels + d * kKeyPanel);
        }
    }
}

void pack_keys(const std::uint16_t* keys, int n, int size, float* panels, Ahead& ahead) {
    pack(keys, kZeroHalves, n, size, panels, ahead);
}

void pack_pooled(const float* keys, int n, int size, float* panels) {
    Ahead none;
    pack(keys, kZeroFloats, n, size, panels, none);
}

void pack_values(const std::uint16_t* values, int n, int size, float* panels) {
    int first = 0;
    for (; first + kValuePanel <= size; first += kValuePanel)
        for (int i = 0; i < n; ++i, panels += kValuePanel) {
            const std::uint16_t* row = values + std::int64_t(i) * size + first;
            _mm256_storeu_ps(panels, load8(row));
            _mm256_storeu_ps(panels + kLanes, load8(row + kLanes));
        }
    if (first < size)
        for (int i = 0; i < n; ++i, panels += kLanes)
            _mm256_storeu_ps(panels, load8(values + std::int64_t(i) * size + first));
}

// sums (Rows, 8 * Vectors; ld_sums) = rescale * sums + a (Rows, depth; ld) . b (depth, 8 * Vectors; ld_b).
// Without rescale the sums start at 0.
template <int Rows, int Vectors, bool Rescale, typename T>
inline void multiply(const float* a, std::int64_t ld, int depth, const T* b, std::int64_t ld_b,
                     const float* rescale, float* sums, std::int64_t ld_sums) {
    __m256 sum[Rows][Vectors];
    CPM_UNROLL
    for (int r = 0; r < Rows; ++r)
        CPM_UNROLL
        for (int v = 0; v < Vectors; ++v)
            sum[r][v] = Rescale ? _mm256_mul_ps(_mm256_loadu_ps(sums + r * ld_sums + v * kLanes),
                                                _mm256_broadcast_ss(rescale + r))
                                : _mm256_setzero_ps();
    for (int k = 0; k < depth; ++k, b += ld_b) {
        __m256 right[Vectors];
        CPM_UNROLL
        for (int v = 0; v < Vectors; ++v) right[v] = load8(b + v * kLanes);
        CPM_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const __m256 left = _mm256_broadcast_ss(a + r * ld + k);
            CPM_UNROLL
            for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm256_fmadd_ps(left, right[v], sum[r][v]);
        }
    }
    CPM_UNROLL
    for (int r = 0; r < Rows; ++r)
        CPM_UNROLL
        for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(sums + r * ld_sums + v * kLanes, sum[r][v]);
}

// Rows in tiles as equal as they can be: 8 rows are 4 and 4, not 6 and 2.
template <int Vectors, bool Rescale>
void multiply_rows(const float* a, int rows, std::int64_t ld, int depth, const float* b, const float* rescale,
                   float* sums, std::int64_t ld_sums, Ahead& ahead) {
    constexpr int width = Vectors * kLanes;
    for (int tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int count = (rows + tiles - 1) / tiles;
        fetch(ahead, kLinesPerTile);
        switch (count) {
            case 1: multiply<1, Vectors, Rescale>(a, ld, depth, b, width, rescale, sums, ld_sums); break;
            case 2: multiply<2, Vectors, Rescale>(a, ld, depth, b, width, rescale, sums, ld_sums); break;
            case 3: multiply<3, Vectors, Rescale>(a, ld, depth, b, width, rescale, sums, ld_sums); break;
            case 4: multiply<4, Vectors, Rescale>(a, ld, depth, b, width, rescale, sums, ld_sums); break;
            case 5: multiply<5, Vectors, Rescale>(a, ld, depth, b, width, rescale, sums, ld_sums); break;
            default: multiply<6, Vectors, Rescale>(a, ld, depth, b, width, rescale, sums, ld_sums); break;
        }
        a += count * ld;
        sums += count * ld_sums;
        if (Rescale) rescale += count;
        rows -= count;
    }
}

void scores(const float* queries, int rows, int size, const float* keys, int panels, float* out, std::int64_t ld,
            Ahead& ahead) {
    for (int p = 0; p < panels; ++p, keys += kKeyPanel * size)
        multiply_rows<2, false>(queries, rows, size, size, keys, nullptr, out + p * kKeyPanel, ld, ahead);
}

void accumulate(const float* weights, int rows, std::int64_t ld, int n, const float* values, int size,
                const float* rescale, float* sums) {
    Ahead none;
    int first = 0;
    for (; first + kValuePanel <= size; first += kValuePanel, values += n * kValuePanel)
        multiply_rows<2, true>(weights, rows, ld, n, values, rescale, sums + first, size, none);
    if (first < size) multiply_rows<1, true>(weights, rows, ld, n, values, rescale, sums + first, size, none);
}

template <int Rows, int Vectors>
void direct_tile(const float* weights, std::int64_t ld, int n, const std::uint16_t* values, int size,
                 const float* rescale, float* sums, Ahead& ahead) {
    int first = 0;
    for (; first + Vectors * kLanes <= size; first += Vectors * kLanes) {
        fetch(ahead, kLinesPerColumns * Vectors);
        multiply<Rows, Vectors, true>(weights, ld, n, values + first, size, rescale, sums + first, size);
    }
    for (; first < size; first += kLanes)
        multiply<Rows, 1, true>(weights, ld, n, values + first, size, rescale, sums + first, size);
}

void direct_accumulate(const float* weights, int rows, std::int64_t ld, int n, const std::uint16_t* values,
                       int size, const float* rescale, float* sums, Ahead& ahead) {
    for (int tiles = (rows + kDirectTileRows - 1) / kDirectTileRows; tiles > 0; --tiles) {
        const int count = (rows + tiles - 1) / tiles;
        switch (count) {
            case 1: direct_tile<1, 8>(weights, ld, n, values, size, rescale, sums, ahead); break;
            case 2: direct_tile<2, 4>(weights, ld, n, values, size, rescale, sums, ahead); break;
            case 3: direct_tile<3, 2>(weights, ld, n, values, size, rescale, sums, ahead); break;
            case 4: direct_tile<4, 2>(weights, ld, n, values, size, rescale, sums, ahead); break;
            case 5: direct_tile<5, 2>(weights, ld, n, values, size, rescale, sums, ahead); break;
            case 6: direct_tile<6, 2>(weights, ld, n, values, size, rescale, sums, ahead); break;
            case 7: direct_tile<7, 1>(weights, ld, n, values, size, rescale, sums, ahead); break;
            default: direct_tile<8, 1>(weights, ld, n, values, size, rescale, sums, ahead); break;
        }
        weights += count * ld;
        sums += std::int64_t(count) * size;
        rescale += count;
        rows -= count;
    }
}

// Lanes 0 + 2 and 1 + 3 of a, then of b, in each half. Blends are cheaper than the shuffles of a horizontal add.
inline __m256 add_pairs(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
}

// In each half the sums of a, b, c and d over its four lanes.
inline __m256 add_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 v = add_pairs(a, c), w = add_pairs(b, d);
    return _mm256_add_ps(_mm256_blend_ps(v, w, 0xaa), _mm256_permute_ps(_mm256_blend_ps(v, w, 0x55), 0xb1));
}

// Eight sums, each of the eight lanes of a vector.
inline __m256 sums_of(const __m256* v) {
    const __m256 low = add_lanes(v[0], v[1], v[2], v[3]), high = add_lanes(v[4], v[5], v[6], v[7]);
    return _mm256_add_ps(_mm256_blend_ps(low, high, 0xf0), _mm256_permute2f128_ps(low, high, 0x21));
}

// Dot products of 8 / Rows keys with Rows queries.
template <int Rows, typename T>
inline void dots(const float* queries, int size, const T* keys, float* out, std::int64_t ld) {
    constexpr int Keys = 8 / Rows;
    __m256 sum[8];
    CPM_UNROLL
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
    for (int d = 0; d < size; d += kLanes) {
        __m256 key[Keys];
        CPM_UNROLL
        for (int k = 0; k < Keys; ++k) key[k] = load8(keys + k * size + d);
        CPM_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const __m256 query = _mm256_loadu_ps(queries + r * size + d);
            CPM_UNROLL
            for (int k = 0; k < Keys; ++k) sum[r * Keys + k] = _mm256_fmadd_ps(query, key[k], sum[r * Keys + k]);
        }
    }
    alignas(32) float sums[8];
    _mm256_store_ps(sums, sums_of(sum));
    CPM_UNROLL
    for (int r = 0; r < Rows; ++r) std::memcpy(out + r * ld, sums + r * Keys, Keys * sizeof(float));
}

template <typename T>
inline float dot(const float* query, int size, const T* key) {
    __m256 sum = _mm256_setzero_ps();
    for (int d = 0; d < size; d += kLanes) sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), load8(key + d), sum);
    return sum_of(sum);
}

template <int Rows, typename T>
void direct_rows(const float* queries, int size, const T* keys, int n, float* out, std::int64_t ld,
                 Ahead& ahead) {
    constexpr int Keys = 8 / Rows;
    int k = 0;
    for (; k + Keys <= n; k += Keys) {
        fetch(ahead, kLinesPerDots * int(sizeof(T)));
        dots<Rows>(queries, size, keys + std::int64_t(k) * size, out + k, ld);
    }
    for (; k < n; ++k)
        for (int r = 0; r < Rows; ++r) out[r * ld + k] = dot(queries + r * size, size, keys + std::int64_t(k) * size);
}

template <typename T>
void direct_scores(const float* queries, int rows, int size, const T* keys, int n, float* out,
                   std::int64_t ld, Ahead& ahead) {
    while (rows > 0) {
        const int count = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        switch (count) {
            case 4: direct_rows<4>(queries, size, keys, n, out, ld, ahead); break;
            case 2: direct_rows<2>(queries, size, keys, n, out, ld, ahead); break;
            default: direct_rows<1>(queries, size, keys, n, out, ld, ahead); break;
        }
        queries += count * size;
        out += count * ld;
        rows -= count;
    }
}

}  // namespace
}  // namespace cpm
