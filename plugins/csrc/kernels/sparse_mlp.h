// y = residual + scale * W_down (g * W_up x) with g = W_gate x where that is above a threshold, else 0 (FATReLU).
//
// A gate of zero makes its neuron, a row of W_up and a column of W_down, meaningless. One row of activations reads the
// neurons that pass and no others; with several rows some row needs nearly every neuron, so both matrices are made into
// the panels of matmul_nbits first. Both ways give the same floats. W_gate has panels.
//
// W_up lies in strips, one row behind the other: the codes, in the order of a panel (32-bit words that a panel has one
// row beside the other); then a float16 scale for each group; then for asymmetric weights a zero point for each group.
//
// W_down lies in slices of 128 rows. A slice is, for each group of columns: 128 float16 scales, for asymmetric weights
// 128 zero points, then column by column the codes of its rows, 64 rows at a time:
//   bits 4: 32 bytes, of which byte j has row j in the low nibble and row j + 32 in the high one
//   bits 2: 16 bytes, of which byte j has row j + 16 i in bits 2i and 2i + 1
//   bits 8: 64 bytes
// Rows are filled up to 128 with the zero code and scale 0, columns to 32 with the zero code.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/matmul_nbits.h"
#include "kernels/thread_pool.h"

namespace cpm {

constexpr std::int64_t kSliceRows = 128;
constexpr std::int64_t kChunkRows = 64;

// Bytes of one row of a matrix in strips.
inline std::int64_t strip_bytes(const NBitsShape& s) {
    return s.padded_cols() * s.bits / 8 + s.groups() * (s.symmetric ? 2 : 3);
}
// Bytes of one column of a slice, of what comes before the columns of a group, of a whole slice, of all slices.
inline std::int64_t column_bytes(const NBitsShape& s) { return kSliceRows * s.bits / 8; }
inline std::int64_t slice_header_bytes(const NBitsShape& s) { return kSliceRows * (s.symmetric ? 2 : 3); }
inline std::int64_t slice_bytes(const NBitsShape& s) {
    return s.groups() * slice_header_bytes(s) + s.padded_cols() * column_bytes(s);
}
inline std::int64_t slices(const NBitsShape& s) { return (s.rows + kSliceRows - 1) / kSliceRows; }

struct SparseMlp {
    NBitsShape gate, up, down;    // (F, H), (F, H), (H, F)
    const std::uint8_t* gate_panels;
    const std::uint8_t* up_strips;
    const std::uint8_t* down_slices;
    float threshold;
};

// What single rows made of the weights so far.
struct Sparsity {
    std::int64_t neurons = 0, active = 0;  // of all layers and rows
    std::int64_t bytes = 0, read = 0;      // of W_up and W_down
};

// x (m, H) and residual (m, H), y (m, H), which may be the residual. A single row is counted.
void sparse_mlp(ThreadPool& pool, Isa isa, const SparseMlp& mlp, const float* x, std::int64_t m, const float* residual,
                float scale, float* y, Sparsity& count);

// One row of activations whose codes are mostly 0.
struct ActiveColumns {
    const std::int32_t* columns;  // those that are not, ascending
    const std::int32_t* first;    // (blocks + 1): where each block of activations begins among them
    const std::int8_t* codes;     // all, as Activations has a single row
    const float* scales;
    const std::int32_t* offsets;
};

// The functions that exist once per instruction set.
struct SparseMlpKernels {
    // The neurons above the threshold; returns how many.
    std::int64_t (*select)(const float* gate, std::int64_t n, float threshold, std::int32_t* neurons);
    // The panel of eight rows in strips.
    void (*gather_panel)(const NBitsShape&, const std::uint8_t* const rows[kPanelRows], std::uint8_t* panel);
    // out (128): one slice times the active columns.
    void (*slice_dot)(const NBitsShape&, const std::uint8_t* slice, const ActiveColumns& x, float* out);
    // The 16 panels of a slice.
    void (*slice_panels)(const NBitsShape&, const std::uint8_t* slice, std::uint8_t* panels);
};

const SparseMlpKernels& sparse_mlp_kernels(Isa isa);

extern const SparseMlpKernels kSparseMlpScalar;
#if defined(CPM_X86)
extern const SparseMlpKernels kSparseMlpAvx2;
#endif

}  // namespace cpm
