// The portable path, and the reference of the vector path: the same floats, combined in the same order as in
// matmul_nbits_scalar.cpp.
#include <cmath>
#include <cstring>

#include "kernels/half.h"
#include "kernels/sparse_mlp.h"

namespace cpm {
namespace {

std::int64_t select(const float* gate, std::int64_t n, float threshold, std::int32_t* neurons) {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        neurons[count] = std::int32_t(i);
        count += gate[i] > threshold;
    }
    return count;
}

void gather_panel(const NBitsShape& s, const std::uint8_t* const rows[kPanelRows], std::uint8_t* panel) {
    const std::int64_t words = s.group_cols() * s.bits / 32, codes = s.padded_cols() * s.bits / 8;
    for (std::int64_t g = 0; g < s.groups(); ++g) {
        for (int r = 0; r < kPanelRows; ++r, panel += 2) std::memcpy(panel, rows[r] + codes + 2 * g, 2);
        if (!s.symmetric)
            for (int r = 0; r < kPanelRows; ++r) *panel++ = rows[r][codes + 2 * s.groups() + g];
        for (std::int64_t word = g * words; word < (g + 1) * words; ++word)
            for (int r = 0; r < kPanelRows; ++r, panel += 4) std::memcpy(panel, rows[r] + 4 * word, 4);
    }
}

int code_of(const NBitsShape& s, const std::uint8_t* column, int row) {
    const std::uint8_t* chunk = column + row / kChunkRows * kChunkRows * s.bits / 8;
    const int bytes = 8 * s.bits, at = row % kChunkRows;  // bytes of a chunk
    return (chunk[at % bytes] >> (at / bytes * s.bits)) & ((1 << s.bits) - 1);
}

float scale_of(const std::uint8_t* header, int row) {
    std::uint16_t half;
    std::memcpy(&half, header + 2 * row, 2);
    return half_to_float(half);
}

void slice_dot(const NBitsShape& s, const std::uint8_t* slice, const ActiveColumns& x, float* out) {
    const std::int64_t blocks = s.group_cols() / s.block(), header = slice_header_bytes(s), size = column_bytes(s);
    const int signed_zero = s.bits == 8 ? 128 : 0;
    for (std::int64_t row = 0; row < kSliceRows; ++row) out[row] = 0.0f;
    for (std::int64_t g = 0; g < s.groups(); ++g, slice += header + s.group_cols() * size) {
        if (x.first[g * blocks] == x.first[(g + 1) * blocks]) continue;
        for (int row = 0; row < kSliceRows; ++row) {
            float sum = 0.0f;
            for (std::int64_t b = g * blocks; b < (g + 1) * blocks; ++b) {
                std::int32_t dot = 0;
                for (std::int32_t i = x.first[b]; i < x.first[b + 1]; ++i) {
                    const std::int64_t column = x.columns[i];
                    const std::uint8_t* codes = slice + header + (column - g * s.group_cols()) * size;
                    dot += (code_of(s, codes, row) - signed_zero) * x.codes[column];
                }
                float value = float(dot - x.offsets[b]);
                if (!s.symmetric)
                    value = std::fma(-float(slice[2 * kSliceRows + row]), float(x.offsets[b]), float(dot));
                sum = std::fma(value, x.scales[b], sum);
            }
            out[row] = std::fma(sum, scale_of(slice, row), out[row]);
        }
    }
}

void slice_panels(const NBitsShape& s, const std::uint8_t* slice, std::uint8_t* panels) {
    const std::int64_t header = slice_header_bytes(s), size = column_bytes(s), width = s.group_cols();
    const int steps = 8 / s.bits;
    for (int panel = 0; panel < kSliceRows / kPanelRows; ++panel) {
        const std::uint8_t* group = slice;
        const int first = panel * kPanelRows;
        for (std::int64_t g = 0; g < s.groups(); ++g, group += header + width * size) {
            std::memcpy(panels, group + 2 * first, 2 * kPanelRows);
            panels += 2 * kPanelRows;
            if (!s.symmetric) {
                std::memcpy(panels, group + 2 * kSliceRows + first, kPanelRows);
                panels += kPanelRows;
            }
            for (std::int64_t column = 0; column < width; column += 4 * steps, panels += 4 * kPanelRows)
                for (int r = 0; r < kPanelRows; ++r)
                    for (int i = 0; i < 4; ++i) {
                        int byte = 0;
                        for (int step = 0; step < steps; ++step) {
                            const std::uint8_t* codes = group + header + (column + 4 * step + i) * size;
                            byte |= code_of(s, codes, first + r) << (s.bits * step);
                        }
                        panels[4 * r + i] = std::uint8_t(byte);
                    }
        }
    }
}

}  // namespace

const SparseMlpKernels kSparseMlpScalar = {select, gather_panel, slice_dot, slice_panels};

}  // namespace cpm
