// y = x . dequantize(w)^T for weights of 2, 4 or 8 bits, activations quantized to int8 in blocks of 32, or of 128 where
// 2-bit weights share a scale for as many columns.
//
// Weights are packed into panels of 8 rows, read from front to back exactly once per use. A panel is, for each
// group of columns: 8 float16 scales, for asymmetric weights 8 zero points, then the codes in blocks of 32
// columns. A block is a run of 32-byte vectors whose 32-bit lane r belongs to row r of the panel:
//   bits 4: vector v holds columns 8v+0..3 in the low nibbles and 8v+4..7 in the high ones
//   bits 2: vector v holds columns 16v+4j+0..3 in bits 2j and 2j+1 of its bytes
//   bits 8: vector v holds columns 4v+0..3
// Rows are filled up to 8 with the zero code and scale 0, columns to 32 with the zero code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

constexpr int kPanelRows = 8;
constexpr int kBlock = 32;       // columns of a run of codes
constexpr int kWideBlock = 128;  // a whole number of them
constexpr int kMaxTileRows = 6;  // activation rows that one call of a panel kernel takes

// Activations below this count as zero: 127 / peak must stay a finite float.
constexpr float kSmallestPeak = 1.0f / (std::uint64_t(1) << 60) / (std::uint64_t(1) << 60);

struct NBitsShape {
    std::int64_t rows = 0, cols = 0;
    int bits = 4;
    int group = 32;  // columns that share a scale; a multiple of 32, or 0 for one scale per row
    bool symmetric = true;

    std::int64_t padded_cols() const { return (cols + kBlock - 1) / kBlock * kBlock; }
    std::int64_t group_cols() const { return group ? group : padded_cols(); }
    // Columns that share an activation scale.
    int block() const { return bits == 2 && group_cols() % kWideBlock == 0 ? kWideBlock : kBlock; }
    std::int64_t groups() const { return padded_cols() / group_cols(); }
    std::int64_t panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
    std::int64_t group_bytes() const {
        return kPanelRows * 2 + (symmetric ? 0 : kPanelRows) + kPanelRows * group_cols() * bits / 8;
    }
    std::int64_t panel_bytes() const { return groups() * group_bytes(); }
    std::int64_t bytes() const { return panels() * panel_bytes(); }
    int zero() const { return bits == 4 ? 8 : bits == 2 ? 1 : 128; }
    // What the kernels still have to subtract from a dot product, in sums of activation codes: nothing from codes of
    // 8 bits, which they make signed first; stored zero points are multiplied group by group.
    int offset_factor() const { return bits == 8 ? 0 : symmetric ? zero() : 1; }
};

// Activation rows in int8: scale = max |x| / 127 of each block. Rows lie in tiles of up to kMaxTileRows, block by
// block: of each block the codes of every row of the tile, so that a kernel reads one stream.
struct Activations {
    const std::int8_t* codes;     // a tile: (blocks, rows of the tile, columns of a block)
    const float* scales;          // a tile: (blocks, rows of the tile)
    const std::int32_t* offsets;  // likewise: the sums of the codes, times the zero code of symmetric weights
    std::int64_t blocks;          // of a row
    int block;                    // columns of each

    // The same from a row on that begins a tile.
    Activations from(std::int64_t row) const {
        return {codes + row * blocks * block, scales + row * blocks, offsets + row * blocks, blocks, block};
    }
};

// What happens to a row of results.
struct Epilogue {
    enum class Kind : int { store = 0, add = 1, silu_mul = 2 } kind = Kind::store;
    float scale = 1.0f;               // add: y = residual + scale * result
    const float* residual = nullptr;  // add: (M, rows); may be y itself
};

// One weight matrix in panels.
struct NBitsWeight {
    NBitsShape shape;
    const std::uint8_t* panels;
};

// The panels of a matrix.
//   codes   bits 8: (rows, cols) bytes; bits 4: two a byte, low nibble first; bits 2: four a byte
//   scales  float16 bits (rows, groups); zeros (rows, groups) bytes, null when symmetric
//   flip    xor-ed onto every code: 8 turns two's complement int4 into codes 0..15, 128 likewise for int8
void pack_nbits(const NBitsShape& shape, const std::uint8_t* codes, const std::uint16_t* scales,
                const std::uint8_t* zeros, int flip, std::uint8_t* panels);

// y (m, rows) from x (m, cols). With silu_mul, `up` is a second matrix of the same shape and
// y = silu(x . w^T) * (x . up^T).
void matmul_nbits(ThreadPool& pool, Isa isa, const NBitsWeight& weight, const NBitsWeight* up, const float* x,
                  std::int64_t m, float* y, const Epilogue& epilogue);

// The functions that exist once per instruction set.
struct NBitsKernels {
    // out (tile, 8): one panel times a tile of activation rows; indexed by rows - 1.
    using PanelDot = void (*)(const NBitsShape&, const std::uint8_t* panel, const Activations& tile, float* out);
    PanelDot dot4[kMaxTileRows], dot4_zeros[kMaxTileRows], dot2[kMaxTileRows], dot8[kMaxTileRows];
    // out (2, 8): two panels times one row, for symmetric codes of 2 bits in wide blocks and of 4 bits; null where an
    // instruction set gains nothing.
    using PairDot = void (*)(const NBitsShape&, const std::uint8_t* first, const std::uint8_t* second,
                             const Activations& row, float* out);
    PairDot pair2, pair4;
    // One row of x, filled up to whole blocks, for weights of this shape. Neighbouring blocks are `rows` apart in the
    // tile; offsets are the sums of the codes times the zero code.
    void (*quantize)(const NBitsShape&, const float* x, int rows, std::int8_t* codes, float* scales,
                     std::int32_t* offsets);
    // out = silu(gate) * up over n values; in place on gate.
    void (*silu_mul)(float* gate, const float* up, std::int64_t n);
};

const NBitsKernels& nbits_kernels(Isa isa);

// Those for weights of this shape, by rows - 1 of the tile.
const NBitsKernels::PanelDot* panel_dots(const NBitsKernels& kernels, const NBitsShape& shape);

extern const NBitsKernels kNBitsScalar;
#if defined(CPM_X86)
extern const NBitsKernels kNBitsAvx2, kNBitsAvxVnni, kNBitsAvx512Vnni;
#endif

}  // namespace cpm
