// Products of queries with keys and of weights with values, on packed panels or straight from the cache.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/sparse_attention_rows_x86.h"

namespace cpm {
namespace {

constexpr int kTileRows = 6;        // 6 rows by 2 vectors: 12 sums, 2 operands and a broadcast fill 15 registers
constexpr int kDirectTileRows = 8;   // 8 rows by 1 vector: every half is converted once

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

template <int Rows, int Vectors, typename T>
void direct_tile(const float* weights, std::int64_t ld, int n, const T* values, int size, const float* rescale,
                 float* sums, Ahead& ahead) {
    int first = 0;
    for (; first + Vectors * kLanes <= size; first += Vectors * kLanes) {
        fetch(ahead, kLinesPerColumns * Vectors);
        multiply<Rows, Vectors, true>(weights, ld, n, values + first, size, rescale, sums + first, size);
    }
    for (; first < size; first += kLanes)
        multiply<Rows, 1, true>(weights, ld, n, values + first, size, rescale, sums + first, size);
}

template <typename T>
void direct_accumulate(const float* weights, int rows, std::int64_t ld, int n, const CacheRows& cached, int size,
                       const float* rescale, float* sums, Ahead& ahead) {
    const T* values = static_cast<const T*>(cached.data);
    for (int tiles = (rows + kDirectTileRows - 1) / kDirectTileRows; tiles > 0; --tiles) {
        const int count = (rows + tiles - 1) / tiles;
        switch (count) {
            // Eight vectors of codes on their way to floats would leave no registers for the sums.
            case 1: direct_tile<1, sizeof(T) == 1 ? 4 : 8>(weights, ld, n, values, size, rescale, sums, ahead); break;
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

// How many dot products go side by side: the sums, and for keys with scales as many of a group, stay in registers.
template <typename Rows>
constexpr int kDots = 8;
template <>
constexpr int kDots<ScaledRows> = 4;

// sums (Queries, 8 / Queries) of products with as many keys.
template <int Queries, typename T>
inline void dots(const float* queries, int size, const PlainRows<T>& keys, float* sums) {
    constexpr int Keys = 8 / Queries;
    __m256 sum[8];
    CPM_UNROLL
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
    for (int d = 0; d < size; d += kLanes) {
        __m256 key[Keys];
        CPM_UNROLL
        for (int k = 0; k < Keys; ++k) key[k] = keys.load(k, d);
        CPM_UNROLL
        for (int r = 0; r < Queries; ++r) {
            const __m256 query = _mm256_loadu_ps(queries + r * size + d);
            CPM_UNROLL
            for (int k = 0; k < Keys; ++k) sum[r * Keys + k] = _mm256_fmadd_ps(query, key[k], sum[r * Keys + k]);
        }
    }
    _mm256_storeu_ps(sums, sums_of(sum));
}

// sums (Queries, 4 / Queries); the scales are applied once a group of columns.
template <int Queries>
inline void dots(const float* queries, int size, const ScaledRows& keys, float* sums) {
    constexpr int Keys = 4 / Queries;
    __m256 sum[4];
    CPM_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] = _mm256_setzero_ps();
    for (int first = 0; first < size; first += kScaleColumns) {
        __m256 part[4];
        CPM_UNROLL
        for (int i = 0; i < 4; ++i) part[i] = _mm256_setzero_ps();
        const int last = std::min(first + kScaleColumns, size);
        for (int d = first; d < last; d += kLanes) {
            __m256 key[Keys];
            CPM_UNROLL
            for (int k = 0; k < Keys; ++k) key[k] = keys.codes(k, d);
            CPM_UNROLL
            for (int r = 0; r < Queries; ++r) {
                const __m256 query = _mm256_loadu_ps(queries + r * size + d);
                CPM_UNROLL
                for (int k = 0; k < Keys; ++k) part[r * Keys + k] = _mm256_fmadd_ps(query, key[k], part[r * Keys + k]);
            }
        }
        CPM_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = _mm256_fmadd_ps(part[i], keys.scale(i % Keys, first), sum[i]);
    }
    const __m256 halves = add_lanes(sum[0], sum[1], sum[2], sum[3]);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

template <typename Rows>
inline float dot(const float* query, int size, const Rows& keys, int key) {
    __m256 sum = _mm256_setzero_ps();
    for (int d = 0; d < size; d += kLanes)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), keys.load(key, d), sum);
    return sum_of(sum);
}

template <int Queries, typename Rows>
void direct_rows(const float* queries, int size, const Rows& keys, int n, float* out, std::int64_t ld,
                 Ahead& ahead) {
    constexpr int Keys = kDots<Rows> / Queries;
    int k = 0;
    for (; k + Keys <= n; k += Keys) {
        fetch(ahead, kLinesPerDots * int(sizeof(*keys.at)));
        float sums[kDots<Rows>];
        dots<Queries>(queries, size, keys.from(k), sums);
        CPM_UNROLL
        for (int r = 0; r < Queries; ++r) std::memcpy(out + r * ld + k, sums + r * Keys, Keys * sizeof(float));
    }
    for (; k < n; ++k)
        for (int r = 0; r < Queries; ++r) out[r * ld + k] = dot(queries + r * size, size, keys, k);
}

template <typename Rows>
void score_rows(const float* queries, int count, int size, const Rows& keys, int n, float* out, std::int64_t ld,
                Ahead& ahead) {
    while (count > 0) {
        const int some = count >= 4 ? 4 : count >= 2 ? 2 : 1;
        switch (some) {
            case 4: direct_rows<4>(queries, size, keys, n, out, ld, ahead); break;
            case 2: direct_rows<2>(queries, size, keys, n, out, ld, ahead); break;
            default: direct_rows<1>(queries, size, keys, n, out, ld, ahead); break;
        }
        queries += some * size;
        out += some * ld;
        count -= some;
    }
}

void direct_half_scores(const float* queries, int rows, int size, const CacheRows& keys, int n, float* out,
                        std::int64_t ld, Ahead& ahead) {
    score_rows(queries, rows, size, half_rows(keys, size), n, out, ld, ahead);
}

void direct_int8_scores(const float* queries, int rows, int size, const CacheRows& keys, int n, float* out,
                        std::int64_t ld, Ahead& ahead) {
    with_scales(keys, n, size, [&](const ScaledRows& part, int first, int count) {
        score_rows(queries, rows, size, part, count, out + first, ld, ahead);
    });
}

void direct_pooled(const float* queries, int rows, int size, const float* keys, int n, float* out, std::int64_t ld,
                   Ahead& ahead) {
    score_rows(queries, rows, size, PlainRows<float>{keys, size}, n, out, ld, ahead);
}

}  // namespace
}  // namespace cpm
