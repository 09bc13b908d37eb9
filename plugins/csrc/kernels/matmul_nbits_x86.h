// Panel kernels on 256-bit vectors. Include after defining, in the including file, a struct Dot:
//   Dot::Sum        running sum of one block, one 32-bit lane (or pair of 16-bit lanes) a row
//   Dot::zero()     the empty sum
//   Dot::add(sum, weights, x)   unsigned weight codes times the same four int8 activations in every lane
//   Dot::lanes(sum) the sum as int32 lanes
// Everything is in an unnamed namespace: each instruction set gets its own copies, none leaks to the linker.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/exp_x86.h"
#include "kernels/matmul_nbits.h"

// Without it GCC keeps small arrays of vectors in memory.
#if defined(__GNUC__)
#define CPM_UNROLL _Pragma("GCC unroll 16")
// Pins a running sum to its place: GCC would gather the products of many steps first, and spill them.
#define CPM_PIN(vector) asm("" : "+x"(vector))
#else
#define CPM_UNROLL
#define CPM_PIN(vector)
#endif

namespace cpm {
namespace {

inline __m256i four(const std::int8_t* x) {
    std::int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm256_set1_epi32(quad);
}

inline __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// The hardware prefetcher stops at page ends; a panel goes on.
constexpr int kAhead = 2048;

template <int Bytes>
inline void prefetch(const std::uint8_t* p) {
    for (int i = 0; i < Bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// Codes left where they are, two bits up, are four times as large: one shift serves four columns.
template <int Block>
inline __m256i two_bit_dot(const std::uint8_t* codes, const std::int8_t* x) {
    constexpr int vectors = Block / 16, run = vectors < 4 ? vectors : 4;  // longer sums could overflow 16 bits
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12);
    typename Dot::Sum sum = Dot::zero();
    __m256i fourfold = _mm256_setzero_si256();
    CPM_UNROLL
    for (int first = 0; first < vectors; first += run) {
        typename Dot::Sum large = Dot::zero();
        CPM_UNROLL
        for (int i = 0; i < run; ++i) {
            const int v = first + i;
            const __m256i packed = load(codes + 32 * v), shifted = _mm256_srli_epi16(packed, 4);
            const std::int8_t* quads = x + 16 * v;
            sum = Dot::add(sum, _mm256_and_si256(packed, low), four(quads));
            large = Dot::add(large, _mm256_and_si256(packed, high), four(quads + 4));
            sum = Dot::add(sum, _mm256_and_si256(shifted, low), four(quads + 8));
            large = Dot::add(large, _mm256_and_si256(shifted, high), four(quads + 12));
        }
        fourfold = _mm256_add_epi32(fourfold, Dot::lanes(large));
    }
    return _mm256_add_epi32(Dot::lanes(sum), _mm256_srai_epi32(fourfold, 2));
}

// The integer dot products of one block of columns with the Tile rows of x (Tile, Block): int32 lanes, one a row.
template <int Bits, int Tile, int Block>
inline void block_dot(const std::uint8_t* codes, const std::int8_t* x, __m256i* out) {
    if constexpr (Bits == 8) {
        // |w| times sign(w) x: products of two bytes would overflow the 16 bits of unsigned times signed.
        for (int t = 0; t < Tile; ++t) out[t] = _mm256_setzero_si256();
        const __m256i offset = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1);
        CPM_UNROLL
        for (int v = 0; v < 8; ++v) {
            const __m256i w = _mm256_xor_si256(load(codes + 32 * v), offset), magnitude = _mm256_abs_epi8(w);
            CPM_UNROLL
            for (int t = 0; t < Tile; ++t) {
                const __m256i signed_x = _mm256_sign_epi8(four(x + t * Block + 4 * v), w);
                out[t] = _mm256_add_epi32(out[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), ones));
                if constexpr (Tile > 1) CPM_PIN(out[t]);
            }
        }
    } else if constexpr (Bits == 2 && Tile == 1) {
        out[0] = two_bit_dot<Block>(codes, x);
    } else {
        constexpr int steps = 8 / Bits;
        const __m256i mask = _mm256_set1_epi8(Bits == 4 ? 15 : 3);
        typename Dot::Sum sums[Tile];
        for (int t = 0; t < Tile; ++t) sums[t] = Dot::zero();
        CPM_UNROLL
        for (int v = 0; v < Bits * Block / kBlock; ++v) {
            const __m256i packed = load(codes + 32 * v);
            CPM_UNROLL
            for (int s = 0; s < steps; ++s) {
                const __m256i w = _mm256_and_si256(s ? _mm256_srli_epi16(packed, Bits * s) : packed, mask);
                CPM_UNROLL
                for (int t = 0; t < Tile; ++t) {
                    sums[t] = Dot::add(sums[t], w, four(x + t * Block + 4 * (v * steps + s)));
                    if constexpr (Tile > 1) CPM_PIN(sums[t]);
                }
            }
        }
        for (int t = 0; t < Tile; ++t) out[t] = Dot::lanes(sums[t]);
    }
}

// Single: a group is one block, and its sum needs no register of its own.
template <int Bits, bool Zeros, int Tile, int Block, bool Single>
inline void panel_dot(const NBitsShape& shape, const std::uint8_t* panel, const Activations& tile, float* out) {
    const std::int64_t blocks = Single ? 1 : shape.group_cols() / Block, groups = shape.groups();
    constexpr int block_bytes = kPanelRows * Block * Bits / 8;
    const std::int8_t* x = tile.codes;
    const float* x_scales = tile.scales;
    const std::int32_t* offsets = tile.offsets;
    __m256 total[Tile];
    for (int t = 0; t < Tile; ++t) total[t] = _mm256_setzero_ps();
    for (std::int64_t g = 0; g < groups; ++g) {
        const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel)));
        panel += 2 * kPanelRows;
        __m256 minus_zeros = _mm256_setzero_ps();
        if constexpr (Zeros) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel));
            minus_zeros = _mm256_sub_ps(minus_zeros, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
            panel += kPanelRows;
        }
        __m256 sum[Tile];
        if constexpr (!Single)
            for (int t = 0; t < Tile; ++t) sum[t] = _mm256_setzero_ps();
        for (std::int64_t b = 0; b < blocks; ++b, panel += block_bytes) {
            // A larger tile finds the panel in the cache.
            if constexpr (Tile == 1) prefetch<block_bytes>(panel + kAhead);
            __m256i dot[Tile];
            block_dot<Bits, Tile, Block>(panel, x, dot);
            CPM_UNROLL
            for (int t = 0; t < Tile; ++t) {
                const __m256i offset = _mm256_set1_epi32(offsets[t]);
                __m256 value;
                if constexpr (Zeros)
                    value = _mm256_fmadd_ps(minus_zeros, _mm256_cvtepi32_ps(offset), _mm256_cvtepi32_ps(dot[t]));
                else
                    value = _mm256_cvtepi32_ps(Bits == 8 ? dot[t] : _mm256_sub_epi32(dot[t], offset));
                const __m256 x_scale = _mm256_broadcast_ss(x_scales + t);
                if constexpr (Single)
                    total[t] = _mm256_fmadd_ps(_mm256_mul_ps(value, x_scale), scales, total[t]);
                else
                    sum[t] = _mm256_fmadd_ps(value, x_scale, sum[t]);
            }
            x += Tile * Block;
            x_scales += Tile;
            offsets += Tile;
        }
        if constexpr (!Single)
            for (int t = 0; t < Tile; ++t) total[t] = _mm256_fmadd_ps(sum[t], scales, total[t]);
    }
    for (int t = 0; t < Tile; ++t) _mm256_storeu_ps(out + t * kPanelRows, total[t]);
}

template <int Bits, bool Zeros, int Tile, int Block>
inline void panel_dot(const NBitsShape& shape, const std::uint8_t* panel, const Activations& tile, float* out) {
    if (shape.group_cols() == Block)
        panel_dot<Bits, Zeros, Tile, Block, true>(shape, panel, tile, out);
    else
        panel_dot<Bits, Zeros, Tile, Block, false>(shape, panel, tile, out);
}

template <int Bits, bool Zeros, int Tile>
void panel_dot(const NBitsShape& shape, const std::uint8_t* panel, const Activations& tile, float* out) {
    if constexpr (Bits == 2)
        if (shape.block() == kWideBlock) return panel_dot<Bits, Zeros, Tile, kWideBlock>(shape, panel, tile, out);
    panel_dot<Bits, Zeros, Tile, kBlock>(shape, panel, tile, out);
}

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

// n is a multiple of 8.
inline void silu_mul(float* gate, const float* up, std::int64_t n) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (std::int64_t i = 0; i < n; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), g));
        const __m256 value = _mm256_div_ps(g, _mm256_add_ps(one, e));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(value, _mm256_loadu_ps(up + i)));
    }
}

}  // namespace
}  // namespace cpm

#define CPM_TILES(Bits, Zeros)                                                                            \
    {                                                                                                     \
        panel_dot<Bits, Zeros, 1>, panel_dot<Bits, Zeros, 2>, panel_dot<Bits, Zeros, 3>,                  \
        panel_dot<Bits, Zeros, 4>, panel_dot<Bits, Zeros, 5>, panel_dot<Bits, Zeros, 6>                   \
    }

#define CPM_NBITS_KERNELS \
    { CPM_TILES(4, false), CPM_TILES(4, true), CPM_TILES(2, false), CPM_TILES(8, false), quantize, silu_mul }
