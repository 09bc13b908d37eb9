#include <immintrin.h>

#include <cstring>

#include "kernels/sparse_mlp.h"
#include "kernels/unroll.h"

namespace cpm {
namespace {

constexpr int kVectors = int(kChunkRows) / 8;  // of 8 rows in a chunk

inline __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(std::uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

std::int64_t select(const float* gate, std::int64_t n, float threshold, std::int32_t* neurons) {
    const __m256 limit = _mm256_set1_ps(threshold);
    std::int64_t count = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
        const int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(gate + i), limit, _CMP_GT_OQ));
        if (mask == 0) continue;
        for (int lane = 0; lane < 8; ++lane) {
            neurons[count] = std::int32_t(i + lane);
            count += mask >> lane & 1;
        }
    }
    for (; i < n; ++i)
        if (gate[i] > threshold) neurons[count++] = std::int32_t(i);
    return count;
}

inline __m128i load_half(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Four 32-bit words of each of eight rows become four vectors of one word of every row.
inline void transpose_words(const std::uint8_t* const rows[kPanelRows], std::int64_t at, std::uint8_t* out) {
    __m256i in[4];
    CPM_UNROLL
    for (int r = 0; r < 4; ++r) {
        const __m256i low = _mm256_castsi128_si256(load_half(rows[r] + at));
        in[r] = _mm256_inserti128_si256(low, load_half(rows[r + 4] + at), 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(in[0], in[1]), high01 = _mm256_unpackhi_epi32(in[0], in[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(in[2], in[3]), high23 = _mm256_unpackhi_epi32(in[2], in[3]);
    store(out, _mm256_unpacklo_epi64(low01, low23));
    store(out + 32, _mm256_unpackhi_epi64(low01, low23));
    store(out + 64, _mm256_unpacklo_epi64(high01, high23));
    store(out + 96, _mm256_unpackhi_epi64(high01, high23));
}

// Eight 16-bit scales of each of eight rows become eight times one scale of every row, `stride` bytes apart.
inline void transpose_scales(const std::uint8_t* const rows[kPanelRows], std::int64_t at, std::int64_t stride,
                             std::uint8_t* out) {
    __m128i in[8], pairs[8], fours[8];
    CPM_UNROLL
    for (int r = 0; r < 8; ++r) in[r] = load_half(rows[r] + at);
    CPM_UNROLL
    for (int r = 0; r < 4; ++r) {
        pairs[2 * r] = _mm_unpacklo_epi16(in[2 * r], in[2 * r + 1]);
        pairs[2 * r + 1] = _mm_unpackhi_epi16(in[2 * r], in[2 * r + 1]);
    }
    CPM_UNROLL
    for (int h = 0; h < 2; ++h) {
        CPM_UNROLL
        for (int r = 0; r < 2; ++r) {
            fours[4 * h + 2 * r] = _mm_unpacklo_epi32(pairs[4 * r + h], pairs[4 * r + h + 2]);
            fours[4 * h + 2 * r + 1] = _mm_unpackhi_epi32(pairs[4 * r + h], pairs[4 * r + h + 2]);
        }
        CPM_UNROLL
        for (int g = 0; g < 2; ++g) {
            auto* low = reinterpret_cast<__m128i*>(out + (4 * h + 2 * g) * stride);
            auto* high = reinterpret_cast<__m128i*>(out + (4 * h + 2 * g + 1) * stride);
            _mm_storeu_si128(low, _mm_unpacklo_epi64(fours[4 * h + g], fours[4 * h + 2 + g]));
            _mm_storeu_si128(high, _mm_unpackhi_epi64(fours[4 * h + g], fours[4 * h + 2 + g]));
        }
    }
}

void gather_panel(const NBitsShape& s, const std::uint8_t* const rows[kPanelRows], std::uint8_t* panel) {
    const std::int64_t groups = s.groups(), stride = s.group_bytes(), zeros = s.symmetric ? 0 : kPanelRows;
    const std::int64_t bytes = s.group_cols() * s.bits / 8, scales = groups * bytes;
    std::int64_t g = 0;
    for (; g + 8 <= groups; g += 8) transpose_scales(rows, scales + 2 * g, stride, panel + g * stride);
    for (; g < groups; ++g)
        for (int r = 0; r < kPanelRows; ++r) std::memcpy(panel + g * stride + 2 * r, rows[r] + scales + 2 * g, 2);
    for (g = 0; g < groups; ++g, panel += stride) {
        for (int r = 0; r < int(zeros); ++r) panel[2 * kPanelRows + r] = rows[r][scales + 2 * groups + g];
        std::uint8_t* out = panel + 2 * kPanelRows + zeros;
        std::int64_t at = g * bytes;
        for (; at + 16 <= (g + 1) * bytes; at += 16, out += 8 * 16) transpose_words(rows, at, out);
        for (; at < (g + 1) * bytes; at += 4)
            for (int r = 0; r < kPanelRows; ++r, out += 4) std::memcpy(out, rows[r] + at, 4);
    }
}

// The codes of 64 rows of a column, one a byte: rows 0 to 31 and rows 32 to 63.
template <int Bits>
inline void unpack(const std::uint8_t* chunk, __m256i& low, __m256i& high) {
    if constexpr (Bits == 8) {
        low = load(chunk);
        high = load(chunk + 32);
    } else if constexpr (Bits == 4) {
        const __m256i packed = load(chunk), mask = _mm256_set1_epi8(15);
        low = _mm256_and_si256(packed, mask);
        high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
    } else {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk));
        const __m256i packed = _mm256_broadcastsi128_si256(half), mask = _mm256_set1_epi8(3);
        low = _mm256_and_si256(_mm256_srlv_epi64(packed, _mm256_setr_epi64x(0, 0, 2, 2)), mask);
        high = _mm256_and_si256(_mm256_srlv_epi64(packed, _mm256_setr_epi64x(4, 4, 6, 6)), mask);
    }
}

// Four columns of 32 rows, interleaved: 32-bit lane l < 4 of out[k] has row 4k + l, lane l >= 4 row 16 + 4k + l - 4.
inline void interleave(const __m256i in[4], __m256i out[4]) {
    const __m256i low01 = _mm256_unpacklo_epi8(in[0], in[1]), high01 = _mm256_unpackhi_epi8(in[0], in[1]);
    const __m256i low23 = _mm256_unpacklo_epi8(in[2], in[3]), high23 = _mm256_unpackhi_epi8(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi16(low01, low23);
    out[1] = _mm256_unpackhi_epi16(low01, low23);
    out[2] = _mm256_unpacklo_epi16(high01, high23);
    out[3] = _mm256_unpackhi_epi16(high01, high23);
}

// The codes of four columns in 64 rows, from `at` bytes into each column.
template <int Bits>
inline void unpack_quad(const std::uint8_t* const columns[4], std::int64_t at, __m256i out[kVectors]) {
    __m256i low[4], high[4];
    CPM_UNROLL
    for (int i = 0; i < 4; ++i) unpack<Bits>(columns[i] + at, low[i], high[i]);
    interleave(low, out);
    interleave(high, out + 4);
}

// Where the first four rows of vector k lie in a chunk; the other four come 16 rows later.
constexpr int row_of(int k) { return k / 4 * 32 + k % 4 * 4; }

// The active columns of a block, four at a time: where their codes are, and their activations.
struct Quad {
    const std::uint8_t* columns[4];
    __m256i factors;
};

// At most a quarter of the block's columns.
inline int quads_of(const ActiveColumns& x, std::int64_t block, const std::uint8_t* codes, std::int64_t size,
                    std::int64_t first, Quad* quads) {
    int count = 0;
    for (std::int32_t i = x.first[block]; i < x.first[block + 1]; i += 4, ++count) {
        std::int8_t factors[4] = {};
        for (int j = 0; j < 4; ++j) {
            // What fills up the last four is any column, times 0.
            const bool real = i + j < x.first[block + 1];
            const std::int32_t column = x.columns[real ? i + j : i];
            quads[count].columns[j] = codes + (column - first) * size;
            if (real) factors[j] = x.codes[column];
        }
        std::int32_t packed;
        std::memcpy(&packed, factors, 4);
        quads[count].factors = _mm256_set1_epi32(packed);
    }
    return count;
}

// Integer dot products of a block's active columns with the 64 rows that begin `at` bytes into them: int32 lanes in the
// order of `unpack_quad`. Sums of 4 bits in 32 columns stay within 16 bits, 8 times 2 * 15 * 127
// at most, and so do those of 2 bits in 128.
template <int Bits>
inline void block_dot(const Quad* quads, int count, std::int64_t at, __m256i out[kVectors]) {
    const __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(char(0x80));
    CPM_UNROLL
    for (int k = 0; k < kVectors; ++k) out[k] = _mm256_setzero_si256();
    for (int i = 0; i < count; ++i) {
        const __m256i factors = quads[i].factors;
        __m256i weights[kVectors];
        unpack_quad<Bits>(quads[i].columns, at, weights);
        CPM_UNROLL
        for (int k = 0; k < kVectors; ++k) {
            if constexpr (Bits == 8) {
                // As in matmul_nbits_x86.h: products of two full bytes would overflow.
                const __m256i w = _mm256_xor_si256(weights[k], flip), magnitude = _mm256_abs_epi8(w);
                const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(factors, w));
                out[k] = _mm256_add_epi32(out[k], _mm256_madd_epi16(pairs, ones));
            } else {
                out[k] = _mm256_add_epi16(out[k], _mm256_maddubs_epi16(weights[k], factors));
            }
        }
    }
    if constexpr (Bits != 8) {
        CPM_UNROLL
        for (int k = 0; k < kVectors; ++k) out[k] = _mm256_madd_epi16(out[k], ones);
    }
}

inline __m256 scales_of(const std::uint8_t* header, int row) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + 2 * row));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + 2 * (row + 16)));
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}

inline __m256 minus_zeros_of(const std::uint8_t* zeros, int row) {
    std::int32_t low, high;
    std::memcpy(&low, zeros + row, 4);
    std::memcpy(&high, zeros + row + 16, 4);
    const __m128i bytes = _mm_setr_epi32(low, high, 0, 0);
    return _mm256_sub_ps(_mm256_setzero_ps(), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
}

// Single: a group is one block, and its sum needs no memory of its own.
template <int Bits, bool Zeros, bool Single>
void slice_dot(const NBitsShape& s, const std::uint8_t* slice, const ActiveColumns& x, float* out) {
    const std::int64_t blocks = s.group_cols() / s.block(), header = slice_header_bytes(s), size = column_bytes(s);
    constexpr int kAll = int(kSliceRows) / 8;
    __m256 total[kAll], sum[kAll];
    for (auto& vector : total) vector = _mm256_setzero_ps();
    for (std::int64_t g = 0; g < s.groups(); ++g, slice += header + s.group_cols() * size) {
        if (x.first[g * blocks] == x.first[(g + 1) * blocks]) continue;
        if constexpr (!Single)
            for (auto& vector : sum) vector = _mm256_setzero_ps();
        for (std::int64_t b = g * blocks; b < (g + 1) * blocks; ++b) {
            Quad quads[kWideBlock / 4];
            const int count = quads_of(x, b, slice + header, size, g * s.group_cols(), quads);
            if (count == 0) continue;
            const __m256i offset = _mm256_set1_epi32(x.offsets[b]);
            const __m256 x_scale = _mm256_set1_ps(x.scales[b]);
            for (int first = 0; first < kAll; first += kVectors) {
                __m256i dot[kVectors];
                block_dot<Bits>(quads, count, first * Bits, dot);
                CPM_UNROLL
                for (int k = 0; k < kVectors; ++k) {
                    const int row = first * 8 + row_of(k);
                    __m256 value;
                    if constexpr (Zeros) {
                        const __m256 minus = minus_zeros_of(slice + 2 * kSliceRows, row);
                        value = _mm256_fmadd_ps(minus, _mm256_cvtepi32_ps(offset), _mm256_cvtepi32_ps(dot[k]));
                    } else {
                        value = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot[k], offset));
                    }
                    if constexpr (Single)
                        total[first + k] =
                            _mm256_fmadd_ps(_mm256_mul_ps(value, x_scale), scales_of(slice, row), total[first + k]);
                    else
                        sum[first + k] = _mm256_fmadd_ps(value, x_scale, sum[first + k]);
                }
            }
        }
        if constexpr (!Single)
            for (int k = 0; k < kAll; ++k) {
                const int row = k / kVectors * int(kChunkRows) + row_of(k % kVectors);
                total[k] = _mm256_fmadd_ps(sum[k], scales_of(slice, row), total[k]);
            }
    }
    for (int k = 0; k < kAll; ++k) {
        float* rows = out + k / kVectors * int(kChunkRows) + row_of(k % kVectors);
        _mm_storeu_ps(rows, _mm256_castps256_ps128(total[k]));
        _mm_storeu_ps(rows + 16, _mm256_extractf128_ps(total[k], 1));
    }
}

template <int Bits, bool Zeros>
void slice_dot(const NBitsShape& s, const std::uint8_t* slice, const ActiveColumns& x, float* out) {
    if (s.group_cols() == s.block())
        slice_dot<Bits, Zeros, true>(s, slice, x, out);
    else
        slice_dot<Bits, Zeros, false>(s, slice, x, out);
}

// The vectors of `unpack_quad` to those of the eight panels that the 64 rows are: rows 8p to 8p + 7 side by side.
inline void by_panel(const __m256i in[kVectors], __m256i out[kVectors]) {
    CPM_UNROLL
    for (int half = 0; half < kVectors; half += 4) {
        out[half] = _mm256_permute2x128_si256(in[half], in[half + 1], 0x20);
        out[half + 1] = _mm256_permute2x128_si256(in[half + 2], in[half + 3], 0x20);
        out[half + 2] = _mm256_permute2x128_si256(in[half], in[half + 1], 0x31);
        out[half + 3] = _mm256_permute2x128_si256(in[half + 2], in[half + 3], 0x31);
    }
}

template <int Bits>
void group_panels(const std::uint8_t* codes, std::int64_t size, std::int64_t width, std::int64_t stride,
                  std::uint8_t* panels) {
    constexpr int steps = 8 / Bits;
    for (std::int64_t column = 0; column < width; column += 4 * steps, panels += 32) {
        __m256i packed[kVectors];
        for (int step = 0; step < steps; ++step) {
            const std::uint8_t* own[4];
            for (int i = 0; i < 4; ++i) own[i] = codes + (column + 4 * step + i) * size;
            __m256i rows[kVectors], vectors[kVectors];
            unpack_quad<Bits>(own, 0, rows);
            by_panel(rows, vectors);
            CPM_UNROLL
            for (int k = 0; k < kVectors; ++k) {
                const __m256i moved = _mm256_slli_epi16(vectors[k], Bits * step);
                packed[k] = step ? _mm256_or_si256(packed[k], moved) : moved;
            }
        }
        for (int k = 0; k < kVectors; ++k) store(panels + k * stride, packed[k]);
    }
}

template <int Bits>
void slice_panels(const NBitsShape& s, const std::uint8_t* slice, std::uint8_t* panels) {
    const std::int64_t header = slice_header_bytes(s), size = column_bytes(s), width = s.group_cols();
    const std::int64_t panel = s.panel_bytes(), zeros = s.symmetric ? 0 : kPanelRows;
    constexpr int kChunks = int(kSliceRows / kChunkRows);
    for (std::int64_t g = 0; g < s.groups(); ++g, slice += header + width * size, panels += s.group_bytes()) {
        for (int p = 0; p < kSliceRows / kPanelRows; ++p) {
            std::memcpy(panels + p * panel, slice + 2 * p * kPanelRows, 2 * kPanelRows);
            std::memcpy(panels + p * panel + 2 * kPanelRows, slice + 2 * kSliceRows + p * kPanelRows,
                        std::size_t(zeros));
        }
        for (int c = 0; c < kChunks; ++c)
            group_panels<Bits>(slice + header + c * kChunkRows * Bits / 8, size, width, panel,
                               panels + c * kVectors * panel + 2 * kPanelRows + zeros);
    }
}

void any_slice_dot(const NBitsShape& s, const std::uint8_t* slice, const ActiveColumns& x, float* out) {
    if (s.bits == 2)
        slice_dot<2, false>(s, slice, x, out);
    else if (s.bits == 8)
        slice_dot<8, false>(s, slice, x, out);
    else if (s.symmetric)
        slice_dot<4, false>(s, slice, x, out);
    else
        slice_dot<4, true>(s, slice, x, out);
}

void any_slice_panels(const NBitsShape& s, const std::uint8_t* slice, std::uint8_t* panels) {
    if (s.bits == 2)
        slice_panels<2>(s, slice, panels);
    else if (s.bits == 8)
        slice_panels<8>(s, slice, panels);
    else
        slice_panels<4>(s, slice, panels);
}

}  // namespace

const SparseMlpKernels kSparseMlpAvx2 = {select, gather_panel, any_slice_dot, any_slice_panels};

}  // namespace cpm
