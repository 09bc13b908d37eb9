// The portable path.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/half.h"
#include "kernels/sparse_attention.h"

namespace cpm {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

void to_half(const float* in, std::int64_t n, std::uint16_t* out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
}

void mean(const std::uint16_t* rows, int count, int size, float* out) {
    for (int d = 0; d < size; ++d) {
        float sum = 0.0f;
        for (int i = 0; i < count; ++i) sum += half_to_float(rows[std::int64_t(i) * size + d]);
        out[d] = sum / float(count);
    }
}

float widen(float x) { return x; }
float widen(std::uint16_t x) { return half_to_float(x); }

template <typename T>
void pack(const T* keys, int n, int size, float* panels) {
    for (int first = 0; first < n; first += kKeyPanel)
        for (int d = 0; d < size; ++d)
            for (int i = 0; i < kKeyPanel; ++i)
                *panels++ = first + i < n ? widen(keys[std::int64_t(first + i) * size + d]) : 0.0f;
}

void pack_values(const std::uint16_t* values, int n, int size, float* panels) {
    for (int first = 0; first < size; first += kValuePanel)
        for (int i = 0; i < n; ++i)
            for (int d = first; d < std::min(first + kValuePanel, size); ++d)
                *panels++ = half_to_float(values[std::int64_t(i) * size + d]);
}

void pack_keys(const std::uint16_t* keys, int n, int size, float* panels, Ahead&) { pack(keys, n, size, panels); }

void scores(const float* queries, int rows, int size, const float* keys, int panels, float* out, std::int64_t ld,
            Ahead&) {
    for (int p = 0; p < panels; ++p, keys += kKeyPanel * size)
        for (int r = 0; r < rows; ++r) {
            float* target = out + r * ld + p * kKeyPanel;
            std::fill_n(target, kKeyPanel, 0.0f);
            for (int d = 0; d < size; ++d)
                for (int i = 0; i < kKeyPanel; ++i) target[i] += queries[r * size + d] * keys[d * kKeyPanel + i];
        }
}

template <typename T>
void direct_scores(const float* queries, int rows, int size, const T* keys, int n, float* out, std::int64_t ld,
                   Ahead&) {
    for (int k = 0; k < n; ++k, keys += size) {
        float key[kMaxHeadSize];
        for (int d = 0; d < size; ++d) key[d] = widen(keys[d]);
        for (int r = 0; r < rows; ++r) {
            float sum = 0.0f;
            for (int d = 0; d < size; ++d) sum += queries[r * size + d] * key[d];
            out[r * ld + k] = sum;
        }
    }
}

void softmax(float* scores, int rows, std::int64_t ld, int visible, int padded, float* top, float* total,
             float* rescale, Ahead&) {
    for (int r = 0; r < rows; ++r, scores += ld) {
        const float peak = std::max(top[r], *std::max_element(scores, scores + visible));
        rescale[r] = std::exp2(top[r] - peak);
        float sum = 0.0f;
        for (int i = 0; i < visible; ++i) sum += scores[i] = std::exp2(scores[i] - peak);
        std::fill(scores + visible, scores + padded, 0.0f);
        total[r] = total[r] * rescale[r] + sum;
        top[r] = peak;
    }
}

void accumulate(const float* weights, int rows, std::int64_t ld, int n, const float* values, int size,
                const float* rescale, float* sums) {
    for (int first = 0; first < size; first += kValuePanel) {
        const int width = std::min(kValuePanel, size - first);
        for (int r = 0; r < rows; ++r) {
            float* sum = sums + std::int64_t(r) * size + first;
            for (int d = 0; d < width; ++d) sum[d] *= rescale[r];
            for (int i = 0; i < n; ++i)
                for (int d = 0; d < width; ++d) sum[d] += weights[r * ld + i] * values[i * width + d];
        }
        values += n * width;
    }
}

void direct_accumulate(const float* weights, int rows, std::int64_t ld, int n, const std::uint16_t* values,
                       int size, const float* rescale, float* sums, Ahead&) {
    for (int r = 0; r < rows; ++r)
        for (int d = 0; d < size; ++d) sums[std::int64_t(r) * size + d] *= rescale[r];
    for (int i = 0; i < n; ++i, values += size)
        for (int d = 0; d < size; ++d) {
            const float value = half_to_float(values[d]);
            for (int r = 0; r < rows; ++r) sums[std::int64_t(r) * size + d] += weights[r * ld + i] * value;
        }
}

void normalizer(const float* scores, std::int64_t n, std::int64_t coarse, float* top, float* total) {
    const auto at = [&](std::int64_t j) {
        if (!coarse) return scores[j];
        const float* s = scores + 4 * j;
        return (s[0] + s[2] + s[4] + s[6]) * 0.25f;
    };
    const std::int64_t count = coarse ? coarse : n;
    float peak = kNone, sum = 0.0f;
    for (std::int64_t j = 0; j < count; ++j) peak = std::max(peak, at(j));
    for (std::int64_t j = 0; j < count; ++j) sum += std::exp2(at(j) - peak);
    *top = peak;
    *total = sum;
}

void probabilities(float* scores, std::int64_t n, float top, float limit, float factor) {
    for (std::int64_t j = 0; j < n; ++j) scores[j] = std::exp2(std::min(scores[j] - top, limit)) * factor;
}

void add(const float* values, std::int64_t n, float* sums) {
    for (std::int64_t j = 0; j < n; ++j) sums[j] += values[j];
}

}  // namespace

const AttentionKernels kAttentionScalar = {
    to_half,
    mean,
    pack_keys,
    pack<float>,
    pack_values,
    scores,
    direct_scores<std::uint16_t>,
    direct_scores<float>,
    softmax,
    accumulate,
    direct_accumulate,
    normalizer,
    probabilities,
    add,
};

}  // namespace cpm
