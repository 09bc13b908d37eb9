// The portable path.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/half.h"
#include "kernels/int8_codes.h"
#include "kernels/sparse_attention.h"

namespace cpm {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Rows as floats: row i, column d.
struct FloatRows {
    const float* at;
    int size;
    float operator()(int i, int d) const { return at[std::int64_t(i) * size + d]; }
};

struct HalfRows {
    const std::uint16_t* at;
    int size;
    HalfRows(const CacheRows& rows, int size) : at(static_cast<const std::uint16_t*>(rows.data)), size(size) {}
    float operator()(int i, int d) const { return half_to_float(at[std::int64_t(i) * size + d]); }
};

// int8 without their scales: values, which the weights carry.
struct CodeRows {
    const std::int8_t* at;
    int size;
    CodeRows(const CacheRows& rows, int size) : at(static_cast<const std::int8_t*>(rows.data)), size(size) {}
    float operator()(int i, int d) const { return float(at[std::int64_t(i) * size + d]); }
};

struct Int8Keys {
    CodeRows codes;
    const std::uint16_t* scales;
    Int8Keys(const CacheRows& rows, int size) : codes(rows, size), scales(rows.scales) {}
    float operator()(int i, int d) const {
        return codes(i, d) * half_to_float(scales[std::int64_t(i) * key_scales(codes.size) + d / kScaleColumns]);
    }
};

void store_half(const float* in, int size, const CacheRows& row) {
    std::uint16_t* out = static_cast<std::uint16_t*>(row.data);
    for (int d = 0; d < size; ++d) out[d] = float_to_half(in[d]);
}

// Codes of n floats; returns their scale. The largest magnitude is taken from the bits, where NaN is larger than all
// others, so that it ends up in the scale.
std::uint16_t quantize(const float* in, int n, std::int8_t* codes) {
    std::uint32_t peak = 0;
    for (int d = 0; d < n; ++d) {
        std::uint32_t bits;
        std::memcpy(&bits, in + d, sizeof bits);
        peak = std::max(peak, bits & 0x7fffffffu);
    }
    float magnitude;
    std::memcpy(&magnitude, &peak, sizeof magnitude);
    const std::uint16_t scale = code_scale(magnitude);
    const float factor = code_factor(scale);
    for (int d = 0; d < n; ++d) {
        const long code = factor == 0.0f ? 0 : std::lrint(in[d] * factor);
        codes[d] = std::int8_t(std::clamp(code, long(-kMaxCode), long(kMaxCode)));
    }
    return scale;
}

void store_int8_key(const float* in, int size, const CacheRows& row) {
    std::int8_t* codes = static_cast<std::int8_t*>(row.data);
    for (int d = 0; d < size; d += kScaleColumns)
        row.scales[d / kScaleColumns] = quantize(in + d, std::min(kScaleColumns, size - d), codes + d);
}

void store_int8_value(const float* in, int size, const CacheRows& row) {
    *row.scales = quantize(in, size, static_cast<std::int8_t*>(row.data));
}

template <typename Rows>
void mean(const CacheRows& keys, int n, int size, float* out) {
    const Rows rows(keys, size);
    for (int d = 0; d < size; ++d) {
        float sum = 0.0f;
        for (int i = 0; i < n; ++i) sum += rows(i, d);
        out[d] = sum / float(n);
    }
}

template <typename Rows>
void pack(const Rows& keys, int n, int size, float* panels) {
    for (int first = 0; first < n; first += kKeyPanel)
        for (int d = 0; d < size; ++d)
            for (int i = 0; i < kKeyPanel; ++i) *panels++ = first + i < n ? keys(first + i, d) : 0.0f;
}

template <typename Rows>
void pack_keys(const CacheRows& keys, int n, int size, float* panels, Ahead&) {
    pack(Rows(keys, size), n, size, panels);
}

void pack_pooled(const float* keys, int n, int size, float* panels) { pack(FloatRows{keys, size}, n, size, panels); }

template <typename Rows>
void pack_values(const CacheRows& values, int n, int size, float* panels) {
    const Rows rows(values, size);
    for (int first = 0; first < size; first += kValuePanel)
        for (int i = 0; i < n; ++i)
            for (int d = first; d < std::min(first + kValuePanel, size); ++d) *panels++ = rows(i, d);
}

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

template <typename Rows>
void score_rows(const float* queries, int rows, int size, const Rows& keys, int n, float* out, std::int64_t ld) {
    for (int k = 0; k < n; ++k) {
        float key[kMaxHeadSize];
        for (int d = 0; d < size; ++d) key[d] = keys(k, d);
        for (int r = 0; r < rows; ++r) {
            float sum = 0.0f;
            for (int d = 0; d < size; ++d) sum += queries[r * size + d] * key[d];
            out[r * ld + k] = sum;
        }
    }
}

template <typename Rows>
void direct_scores(const float* queries, int rows, int size, const CacheRows& keys, int n, float* out,
                   std::int64_t ld, Ahead&) {
    score_rows(queries, rows, size, Rows(keys, size), n, out, ld);
}

void direct_pooled(const float* queries, int rows, int size, const float* keys, int n, float* out, std::int64_t ld,
                   Ahead&) {
    score_rows(queries, rows, size, FloatRows{keys, size}, n, out, ld);
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

void apply_scales(float* weights, int rows, std::int64_t ld, int n, const CacheRows& values) {
    for (int i = 0; i < n; ++i) {
        const float scale = half_to_float(values.scales[i]);
        for (int r = 0; r < rows; ++r) weights[r * ld + i] *= scale;
    }
}

template <typename Rows>
void direct_accumulate(const float* weights, int rows, std::int64_t ld, int n, const CacheRows& cached, int size,
                       const float* rescale, float* sums, Ahead&) {
    const Rows values(cached, size);
    for (int r = 0; r < rows; ++r)
        for (int d = 0; d < size; ++d) sums[std::int64_t(r) * size + d] *= rescale[r];
    for (int i = 0; i < n; ++i)
        for (int d = 0; d < size; ++d) {
            const float value = values(i, d);
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
    {8, store_half, store_half, mean<HalfRows>, pack_keys<HalfRows>, pack_values<HalfRows>, direct_scores<HalfRows>,
     nullptr, direct_accumulate<HalfRows>},
    {8, store_int8_key, store_int8_value, mean<Int8Keys>, pack_keys<Int8Keys>, pack_values<CodeRows>,
     direct_scores<Int8Keys>, apply_scales, direct_accumulate<CodeRows>},
    pack_pooled,
    scores,
    direct_pooled,
    softmax,
    accumulate,
    normalizer,
    probabilities,
    add,
};

}  // namespace cpm
