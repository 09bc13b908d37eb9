// The portable path, and the reference that the vector paths must equal bit by bit: integer sums are exact,
// and floats are combined in the same order with fused multiply-adds.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/half.h"
#include "kernels/matmul_nbits.h"

namespace cpm {
namespace {

template <int Bits>
int code_of(const std::uint8_t* codes, int row, int col) {
    constexpr int steps = 8 / Bits;
    const int quad = col / 4;
    const int byte = codes[quad / steps * 32 + 4 * row + col % 4];
    return (byte >> (Bits * (quad % steps))) & ((1 << Bits) - 1);
}

template <int Bits, bool Zeros, int Tile>
void panel_dot(const NBitsShape& shape, const std::uint8_t* panel, const Activations& tile, float* out) {
    const int width = shape.block();
    const std::int64_t blocks = shape.group_cols() / width;
    for (int i = 0; i < Tile * kPanelRows; ++i) out[i] = 0.0f;
    std::int64_t block = 0;
    for (std::int64_t g = 0; g < shape.groups(); ++g, block += blocks) {
        const std::uint8_t* scales = panel;
        const std::uint8_t* zeros = panel + 2 * kPanelRows;
        panel += 2 * kPanelRows + (Zeros ? kPanelRows : 0);
        for (int t = 0; t < Tile; ++t)
            for (int r = 0; r < kPanelRows; ++r) {
                float sum = 0.0f;
                for (std::int64_t b = 0; b < blocks; ++b) {
                    const std::uint8_t* codes = panel + b * kPanelRows * width * Bits / 8;
                    const std::int64_t at = (block + b) * Tile + t;
                    const std::int8_t* x = tile.codes + at * width;
                    std::int32_t dot = 0;
                    for (int k = 0; k < width; ++k) dot += (code_of<Bits>(codes, r, k) - (Bits == 8 ? 128 : 0)) * x[k];
                    float value;
                    if (Zeros)
                        value = std::fma(-float(zeros[r]), float(tile.offsets[at]), float(dot));
                    else
                        value = float(dot - tile.offsets[at]);
                    sum = std::fma(value, tile.scales[at], sum);
                }
                std::uint16_t half;
                std::memcpy(&half, scales + 2 * r, 2);
                float& total = out[t * kPanelRows + r];
                total = std::fma(sum, half_to_float(half), total);
            }
        panel += blocks * kPanelRows * width * Bits / 8;
    }
}

void quantize(const NBitsShape& shape, const float* x, int rows, std::int8_t* codes, float* scales,
              std::int32_t* offsets) {
    const int width = shape.block();
    for (std::int64_t start = 0; start < shape.cols; start += width) {
        const std::int64_t count = std::min<std::int64_t>(width, shape.cols - start);
        float peak = 0.0f;
        for (std::int64_t i = 0; i < count; ++i) peak = std::max(peak, std::fabs(x[start + i]));
        const float inverse = peak > kSmallestPeak ? 127.0f / peak : 0.0f;
        std::int32_t sum = 0;
        for (std::int64_t i = 0; i < width; ++i) {
            const float value = i < count ? std::nearbyint(x[start + i] * inverse) : 0.0f;
            codes[i] = std::int8_t(value);
            sum += std::int32_t(value);
        }
        *scales = peak / 127.0f;
        *offsets = shape.offset_factor() * sum;
        codes += rows * width;
        scales += rows;
        offsets += rows;
    }
}

void silu_mul(float* gate, const float* up, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

}  // namespace

#define CPM_TILES(Bits, Zeros)                                                                            \
    {                                                                                                     \
        panel_dot<Bits, Zeros, 1>, panel_dot<Bits, Zeros, 2>, panel_dot<Bits, Zeros, 3>,                  \
        panel_dot<Bits, Zeros, 4>, panel_dot<Bits, Zeros, 5>, panel_dot<Bits, Zeros, 6>                   \
    }

const NBitsKernels kNBitsScalar = {CPM_TILES(4, false), CPM_TILES(4, true), CPM_TILES(2, false),
                                   CPM_TILES(8, false), nullptr,            nullptr,           quantize, silu_mul};

}  // namespace cpm
