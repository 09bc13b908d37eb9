// 256-bit vectors with fused multiply-add. All matrix products are one micro-kernel: up to 6 rows times 16
// columns in registers, the left factor broadcast along its rows, the right factor a panel of 16 columns.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/linear_attention.h"

namespace cpm {
namespace {

constexpr std::int64_t kPanel = 16;
constexpr int kTileRows = 6;
constexpr std::int64_t kRowsAhead = 8;  // that a single step fetches: 4 KiB of a usual state
constexpr std::int64_t kTransposedStride = kLinearChunk + 32;  // 5 cache lines: a power of two would share cache sets

struct Tile {
    __m256 low[kTileRows], high[kTileRows];
};

// tile += a (Rows, depth) . b (depth, 16).
template <int Rows>
inline void multiply(Tile& tile, const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                     std::int64_t depth) {
    for (std::int64_t k = 0; k < depth; ++k, b += b_stride) {
        const __m256 low = _mm256_loadu_ps(b), high = _mm256_loadu_ps(b + 8);
        for (int r = 0; r < Rows; ++r) {
            const __m256 factor = _mm256_broadcast_ss(a + r * a_stride + k);
            tile.low[r] = _mm256_fmadd_ps(factor, low, tile.low[r]);
            tile.high[r] = _mm256_fmadd_ps(factor, high, tile.high[r]);
        }
    }
}

template <int Rows>
inline void clear(Tile& tile) {
    for (int r = 0; r < Rows; ++r) tile.low[r] = tile.high[r] = _mm256_setzero_ps();
}

inline void store(float* to, __m256 low, __m256 high, std::int64_t width) {
    if (width >= kPanel) {
        _mm256_storeu_ps(to, low);
        _mm256_storeu_ps(to + 8, high);
        return;
    }
    float whole[kPanel];
    _mm256_storeu_ps(whole, low);
    _mm256_storeu_ps(whole + 8, high);
    std::memcpy(to, whole, std::size_t(width) * sizeof(float));
}

// Calls body.tile<R>(row) for tiles of R rows that cover [0, rows).
template <class Body>
inline void for_tiles(std::int64_t rows, const Body& body) {
    std::int64_t row = 0;
    // A tile of 2 rows waits for its own sums; two of 4 rows do not.
    const std::int64_t full = rows % kTileRows == 2 && rows > kTileRows ? rows - 8 : rows / kTileRows * kTileRows;
    for (; row < full; row += kTileRows) body.template tile<kTileRows>(row);
    for (; rows - row >= 4 && rows - row != 5; row += 4) body.template tile<4>(row);
    switch (rows - row) {
        case 1: return body.template tile<1>(row);
        case 2: return body.template tile<2>(row);
        case 3: return body.template tile<3>(row);
        case 5: return body.template tile<5>(row);
    }
}

// The working copies of one slice, reused by every call of a thread.
struct Scratch {
    float* query;   // (chunk, D), times scale
    float* key;     // (D, kTransposedStride): transposed
    float* scores;  // (chunk, chunk)
    float* value;   // panels of (chunk, 16)
    float* state;   // panels of (D, 16)

    Scratch(std::int64_t size, std::int64_t panels) {
        thread_local std::vector<float> memory;
        const std::int64_t query_size = kLinearChunk * size, key_size = size * kTransposedStride;
        const std::int64_t value_size = panels * kLinearChunk * kPanel, state_size = panels * size * kPanel;
        const std::int64_t scores_size = kLinearChunk * kLinearChunk;
        const std::int64_t total = query_size + key_size + scores_size + value_size + state_size + kPanel;
        if (std::int64_t(memory.size()) < total) memory.resize(std::size_t(total));
        const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
        query = memory.data() + (64 - address % 64) % 64 / sizeof(float);
        key = query + query_size;
        scores = key + key_size;
        value = scores + scores_size;
        state = value + value_size;
    }
};

// The state as panels of 16 columns: either a packed copy or the caller's memory.
struct State {
    float* data;
    std::int64_t stride, panel_stride;
};

struct Scores {
    const Scratch& scratch;
    const DecayPowers& powers;
    std::int64_t size;

    template <int Rows>
    void tile(std::int64_t row) const {
        for (std::int64_t first = 0; first < row + Rows; first += kPanel) {
            Tile tile;
            clear<Rows>(tile);
            multiply<Rows>(tile, scratch.query + row * size, size, scratch.key + first, kTransposedStride, size);
            for (int r = 0; r < Rows; ++r) {
                const float* decay = powers.before(row + r) + first;
                const __m256 low = _mm256_mul_ps(tile.low[r], _mm256_loadu_ps(decay));
                const __m256 high = _mm256_mul_ps(tile.high[r], _mm256_loadu_ps(decay + 8));
                store(scratch.scores + (row + r) * kLinearChunk + first, low, high, kPanel);
            }
        }
    }
};

struct Outputs {
    const Scratch& scratch;
    const DecayPowers& powers;
    const State& state;
    const LinearSlice& slice;
    std::int64_t start, panel;

    template <int Rows>
    void tile(std::int64_t row) const {
        Tile tile;
        clear<Rows>(tile);
        multiply<Rows>(tile, scratch.query + row * slice.size, slice.size, state.data + panel * state.panel_stride,
                       state.stride, slice.size);
        for (int r = 0; r < Rows; ++r) {
            const __m256 decay = _mm256_set1_ps(powers.at(row + r + 1));
            tile.low[r] = _mm256_mul_ps(tile.low[r], decay);
            tile.high[r] = _mm256_mul_ps(tile.high[r], decay);
        }
        multiply<Rows>(tile, scratch.scores + row * kLinearChunk, kLinearChunk,
                       scratch.value + panel * kLinearChunk * kPanel, kPanel, row + Rows);
        const std::int64_t column = panel * kPanel, width = slice.columns - column;
        for (int r = 0; r < Rows; ++r)
            store(slice.output + (start + row + r) * slice.output_stride + column, tile.low[r], tile.high[r], width);
    }
};

struct Update {
    const Scratch& scratch;
    const State& state;
    std::int64_t rows, panel;
    float keep;

    template <int Rows>
    void tile(std::int64_t row) const {
        float* target = state.data + panel * state.panel_stride + row * state.stride;
        const __m256 decay = _mm256_set1_ps(keep);
        Tile tile;
        for (int r = 0; r < Rows; ++r) {
            tile.low[r] = _mm256_mul_ps(decay, _mm256_loadu_ps(target + r * state.stride));
            tile.high[r] = _mm256_mul_ps(decay, _mm256_loadu_ps(target + r * state.stride + 8));
        }
        multiply<Rows>(tile, scratch.key + row * kTransposedStride, kTransposedStride,
                       scratch.value + panel * kLinearChunk * kPanel, kPanel, rows);
        for (int r = 0; r < Rows; ++r) store(target + r * state.stride, tile.low[r], tile.high[r], kPanel);
    }
};

inline void transpose8(const float* from, std::int64_t stride, float* to) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * stride);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * kTransposedStride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * kTransposedStride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// Columns [rows, next multiple of 16) of the result are 0: the micro-kernel reads them.
void transpose_keys(const float* key, std::int64_t stride, std::int64_t rows, std::int64_t size, float* to) {
    const std::int64_t end = (rows + kPanel - 1) / kPanel * kPanel, full = rows / 8 * 8, wide = size / 8 * 8;
    for (std::int64_t row = 0; row < full; row += 8)
        for (std::int64_t d = 0; d < wide; d += 8)
            transpose8(key + row * stride + d, stride, to + d * kTransposedStride + row);
    for (std::int64_t d = 0; d < size; ++d) {
        float* line = to + d * kTransposedStride;
        for (std::int64_t row = d < wide ? full : 0; row < rows; ++row) line[row] = key[row * stride + d];
        for (std::int64_t row = rows; row < end; ++row) line[row] = 0.0f;
    }
}

void scale_query(const float* query, std::int64_t stride, std::int64_t rows, std::int64_t size, float scale,
                 float* to) {
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t d = 0; d < size; ++d) to[row * size + d] = query[row * stride + d] * scale;
}

// (rows, columns) to panels, the last one filled up with 0.
void pack_panels(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* to,
                 std::int64_t panel_stride) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const float* line = from + row * stride;
        float* target = to + row * kPanel;
        std::int64_t c = 0;
        for (; c + kPanel <= columns; c += kPanel, target += panel_stride)
            store(target, _mm256_loadu_ps(line + c), _mm256_loadu_ps(line + c + 8), kPanel);
        if (c == columns) continue;
        std::memset(target, 0, kPanel * sizeof(float));
        std::memcpy(target, line + c, std::size_t(columns - c) * sizeof(float));
    }
}

void unpack_panels(const float* from, std::int64_t panel_stride, std::int64_t rows, std::int64_t columns, float* to,
                   std::int64_t stride) {
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t c = 0; c < columns; c += kPanel) {
            const float* line = from + c / kPanel * panel_stride + row * kPanel;
            store(to + row * stride + c, _mm256_loadu_ps(line), _mm256_loadu_ps(line + 8), columns - c);
        }
}

// Keys of the chunk times their decay up to the chunk's end.
void decay_keys(const DecayPowers& powers, std::int64_t rows, std::int64_t size, float* key) {
    const float* decay = powers.before(rows - 1);
    const std::int64_t end = (rows + 7) / 8 * 8;
    for (std::int64_t d = 0; d < size; ++d)
        for (std::int64_t row = 0; row < end; row += 8) {
            float* line = key + d * kTransposedStride + row;
            _mm256_storeu_ps(line, _mm256_mul_ps(_mm256_loadu_ps(line), _mm256_loadu_ps(decay + row)));
        }
}

void chunk(const LinearSlice& s, const DecayPowers& powers, const Scratch& scratch, const State& state,
           std::int64_t start, std::int64_t rows) {
    scale_query(s.query + start * s.query_stride, s.query_stride, rows, s.size, s.scale, scratch.query);
    transpose_keys(s.key + start * s.key_stride, s.key_stride, rows, s.size, scratch.key);
    pack_panels(s.value + start * s.value_stride, s.value_stride, rows, s.columns, scratch.value,
                kLinearChunk * kPanel);
    for_tiles(rows, Scores{scratch, powers, s.size});
    decay_keys(powers, rows, s.size, scratch.key);
    for (std::int64_t panel = 0; panel * kPanel < s.columns; ++panel) {
        for_tiles(rows, Outputs{scratch, powers, state, s, start, panel});
        for_tiles(s.size, Update{scratch, state, rows, panel, powers.at(rows)});
    }
}

void chunks(const LinearSlice& s) {
    const std::int64_t panels = (s.columns + kPanel - 1) / kPanel;
    const Scratch scratch(s.size, panels);
    const DecayPowers powers(s.decay);
    // A packed state stays in few cache sets; copying it pays from the second chunk on.
    const bool packed = s.rows > kLinearChunk || s.columns % kPanel != 0;
    const std::int64_t panel_stride = s.size * kPanel;
    const State state = packed ? State{scratch.state, kPanel, panel_stride} : State{s.state, s.state_stride, kPanel};
    if (packed) pack_panels(s.state, s.state_stride, s.size, s.columns, scratch.state, panel_stride);
    for (std::int64_t start = 0; start < s.rows; start += kLinearChunk)
        chunk(s, powers, scratch, state, start, std::min<std::int64_t>(kLinearChunk, s.rows - start));
    if (packed) unpack_panels(scratch.state, panel_stride, s.size, s.columns, s.state, s.state_stride);
}

// Decays, updates and multiplies the state by the query in one pass over memory, strictly from front to back:
// several rows at once would save loads of the output, but keep the hardware from streaming the state.
void step(const LinearSlice& s) {
    const float keep = std::exp(s.decay);
    const __m256 decay = _mm256_set1_ps(keep);
    const std::int64_t columns = s.columns, ahead = kRowsAhead * s.state_stride;
    const float* value = s.value;
    float *state = s.state, *output = s.output;
    std::memset(output, 0, std::size_t(columns) * sizeof(float));
    for (std::int64_t d = 0; d < s.size; ++d, state += s.state_stride) {
        const float key = s.key[d], query = s.query[d] * s.scale;
        const __m256 k = _mm256_set1_ps(key), q = _mm256_set1_ps(query);
        std::int64_t c = 0;
        for (; c + 8 <= columns; c += 8) {
            if (c % kPanel == 0) _mm_prefetch(reinterpret_cast<const char*>(state + ahead + c), _MM_HINT_T0);
            const __m256 kept = _mm256_mul_ps(decay, _mm256_loadu_ps(state + c));
            const __m256 now = _mm256_fmadd_ps(k, _mm256_loadu_ps(value + c), kept);
            _mm256_storeu_ps(state + c, now);
            _mm256_storeu_ps(output + c, _mm256_fmadd_ps(q, now, _mm256_loadu_ps(output + c)));
        }
        for (; c < columns; ++c) {
            state[c] = std::fma(key, value[c], keep * state[c]);
            output[c] = std::fma(query, state[c], output[c]);
        }
    }
}

}  // namespace

const LinearAttentionKernels kLinearAttentionAvx2 = {step, chunks};

}  // namespace cpm
