// The portable path.
#include <algorithm>

#include "kernels/half.h"
#include "kernels/latent_attention.h"

namespace cpm {
namespace {

void widen(const std::uint16_t* in, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}

void dequantize(const std::int8_t* codes, const float* scales, int n, int size, int groups, float* out) {
    const int width = size / groups;
    for (int row = 0; row < n * groups; ++row)
        for (int i = 0; i < width; ++i) *out++ = float(*codes++) * scales[row];
}

void combine(const std::int8_t* codes, const float* scales, const float* factors, int n, int size, int groups,
             float* out) {
    const int width = size / groups;
    std::fill_n(out, size, 0.0f);
    for (int row = 0; row < n; ++row)
        for (int g = 0; g < groups; ++g) {
            const float factor = factors[row] * scales[row * groups + g];
            for (int i = g * width; i < (g + 1) * width; ++i) out[i] += factor * float(codes[row * size + i]);
        }
}

void project(const std::int8_t* codes, const float* scales, const float* x, int n, int size, int groups, float* out) {
    const int width = size / groups;
    for (int row = 0; row < n; ++row) {
        float total = 0.0f;
        for (int g = 0; g < groups; ++g) {
            float sum = 0.0f;
            for (int i = g * width; i < (g + 1) * width; ++i) sum += x[i] * float(codes[row * size + i]);
            total += sum * scales[row * groups + g];
        }
        out[row] = total;
    }
}

}  // namespace

const LatentKernels kLatentScalar = {widen, dequantize, combine, project};

}  // namespace cpm
