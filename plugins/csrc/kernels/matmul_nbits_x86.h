// Panel kernels on 256-bit vectors. Include after defining, in the including file, a struct Dot:
//   Dot::Sum        running sum of one block, one 32-bit lane (or pair of 16-bit lanes) a row
//   Dot::zero()     the empty sum
//   Dot::add(sum, weights, x)   unsigned weight codes times the same four int8 activations in every lane
//   Dot::lanes(sum) the sum as int32 lanes
// Everything is in an unnamed namespace: each instruction set gets its own copies, none leaks to the linker.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels/exp_x86.h"
#include "kernels/matmul_nbits.h"
#include "kernels/matmul_nbits_quantize_x86.h"
#include "kernels/unroll.h"

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

// Integer dot products of one block of 2-bit codes of Panels panels with one row. Codes left where they are, two bits
// up, are four times as large: one shift serves four columns.
template <int Block, int Panels>
inline void two_bit_dot(const std::uint8_t* const* codes, const std::int8_t* x, __m256i* out) {
    constexpr int vectors = Block / 16, run = vectors < 4 ? vectors : 4;  // longer sums could overflow 16 bits
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12);
    typename Dot::Sum sum[Panels];
    __m256i fourfold[Panels];
    for (int p = 0; p < Panels; ++p) {
        sum[p] = Dot::zero();
        fourfold[p] = _mm256_setzero_si256();
    }
    CPM_UNROLL
    for (int first = 0; first < vectors; first += run) {
        typename Dot::Sum large[Panels];
        for (int p = 0; p < Panels; ++p) large[p] = Dot::zero();
        CPM_UNROLL
        for (int i = 0; i < run; ++i) {
            const int v = first + i;
            const __m256i x0 = four(x + 16 * v), x1 = four(x + 16 * v + 4), x2 = four(x + 16 * v + 8),
                          x3 = four(x + 16 * v + 12);
            CPM_UNROLL
            for (int p = 0; p < Panels; ++p) {
                const __m256i packed = load(codes[p] + 32 * v), shifted = _mm256_srli_epi16(packed, 4);
                sum[p] = Dot::add(sum[p], _mm256_and_si256(packed, low), x0);
                large[p] = Dot::add(large[p], _mm256_and_si256(packed, high), x1);
                sum[p] = Dot::add(sum[p], _mm256_and_si256(shifted, low), x2);
                large[p] = Dot::add(large[p], _mm256_and_si256(shifted, high), x3);
                if constexpr (Panels > 1) {
                    CPM_PIN(sum[p]);
                    CPM_PIN(large[p]);
                }
            }
        }
        for (int p = 0; p < Panels; ++p) fourfold[p] = _mm256_add_epi32(fourfold[p], Dot::lanes(large[p]));
    }
    for (int p = 0; p < Panels; ++p)
        out[p] = _mm256_add_epi32(Dot::lanes(sum[p]), _mm256_srai_epi32(fourfold[p], 2));
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
        two_bit_dot<Block, 1>(&codes, x, out);
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

// The integer dot products of one block of two panels with one row.
template <int Bits, int Block>
inline void pair_block_dot(const std::uint8_t* const* codes, const std::int8_t* x, __m256i* out) {
    if constexpr (Bits == 2) {
        two_bit_dot<Block, 2>(codes, x, out);
    } else {
        const __m256i mask = _mm256_set1_epi8(15);
        typename Dot::Sum sums[2] = {Dot::zero(), Dot::zero()};
        CPM_UNROLL
        for (int v = 0; v < Block / 8; ++v) {
            const __m256i x0 = four(x + 8 * v), x1 = four(x + 8 * v + 4);
            CPM_UNROLL
            for (int p = 0; p < 2; ++p) {
                const __m256i packed = load(codes[p] + 32 * v);
                sums[p] = Dot::add(sums[p], _mm256_and_si256(packed, mask), x0);
                sums[p] = Dot::add(sums[p], _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask), x1);
                CPM_PIN(sums[p]);
            }
        }
        for (int p = 0; p < 2; ++p) out[p] = Dot::lanes(sums[p]);
    }
}

// Two panels of symmetric 2- or 4-bit codes times one row: half the broadcasts of x. The same floats as one after the
// other.
template <int Bits, int Block, bool Single>
inline void pair_dot(const NBitsShape& shape, const std::uint8_t* first, const std::uint8_t* second,
                         const Activations& row, float* out) {
    const std::int64_t blocks = Single ? 1 : shape.group_cols() / Block, groups = shape.groups();
    constexpr int block_bytes = kPanelRows * Block * Bits / 8;
    const std::uint8_t* panels[2] = {first, second};
    // The next two panels are fetched in the order of memory: two streams at once would cross page by page.
    constexpr std::int64_t step = block_bytes + 2 * kPanelRows;  // with its scales
    const std::int64_t size = shape.panel_bytes();
    const bool neighbours = second == first + size;
    const std::uint8_t* ahead[2] = {neighbours ? second + size : first + size, nullptr};
    ahead[1] = neighbours ? ahead[0] + step : second + size;
    const std::int8_t* x = row.codes;
    std::int64_t at = 0;
    __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (std::int64_t g = 0; g < groups; ++g) {
        __m256 scales[2], sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int p = 0; p < 2; ++p) {
            scales[p] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panels[p])));
            panels[p] += 2 * kPanelRows;
        }
        for (std::int64_t b = 0; b < blocks; ++b, ++at, x += Block) {
            for (auto& line : ahead) {
                prefetch<block_bytes>(line);
                line += neighbours ? 2 * step : step;
            }
            __m256i dot[2];
            pair_block_dot<Bits, Block>(panels, x, dot);
            const __m256i offset = _mm256_set1_epi32(row.offsets[at]);
            const __m256 x_scale = _mm256_broadcast_ss(row.scales + at);
            CPM_UNROLL
            for (int p = 0; p < 2; ++p) {
                const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot[p], offset));
                if constexpr (Single)
                    total[p] = _mm256_fmadd_ps(_mm256_mul_ps(value, x_scale), scales[p], total[p]);
                else
                    sum[p] = _mm256_fmadd_ps(value, x_scale, sum[p]);
                panels[p] += block_bytes;
            }
        }
        if constexpr (!Single)
            for (int p = 0; p < 2; ++p) total[p] = _mm256_fmadd_ps(sum[p], scales[p], total[p]);
    }
    for (int p = 0; p < 2; ++p) _mm256_storeu_ps(out + p * kPanelRows, total[p]);
}

template <int Bits, int Block>
void pair_dot(const NBitsShape& shape, const std::uint8_t* first, const std::uint8_t* second, const Activations& row,
              float* out) {
    if (shape.group_cols() == Block)
        pair_dot<Bits, Block, true>(shape, first, second, row, out);
    else
        pair_dot<Bits, Block, false>(shape, first, second, row, out);
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
    { CPM_TILES(4, false), CPM_TILES(4, true), CPM_TILES(2, false), CPM_TILES(8, false), pair_dot<2, kWideBlock>, pair_dot<4, kBlock>, quantize, silu_mul }
