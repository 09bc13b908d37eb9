// Attention kernels on 256-bit vectors with fused multiply-add and float16 conversion.
#include <algorithm>
#include <limits>

#include "kernels/sparse_attention_pack_x86.h"
#include "kernels/sparse_attention_products_x86.h"

namespace cpm {
namespace {

// Scores of one row become weights; returns their sum. Two vectors at a time: each is one long chain.
inline float weigh(float* scores, int visible, int padded, float top) {
    const __m256 tops = _mm256_set1_ps(top);
    __m256 sum = _mm256_setzero_ps(), sum2 = sum;
    int i = 0;
    for (; i + 2 * kLanes <= visible; i += 2 * kLanes) {
        const __m256 first = exp2_8(_mm256_sub_ps(load8(scores + i), tops));
        const __m256 second = exp2_8(_mm256_sub_ps(load8(scores + i + kLanes), tops));
        _mm256_storeu_ps(scores + i, first);
        _mm256_storeu_ps(scores + i + kLanes, second);
        sum = _mm256_add_ps(sum, first);
        sum2 = _mm256_add_ps(sum2, second);
    }
    for (; i < padded; i += kLanes) {
        const __m256 weight = _mm256_and_ps(exp2_8(_mm256_sub_ps(load8(scores + i), tops)), first_lanes(visible - i));
        _mm256_storeu_ps(scores + i, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    return sum_of(_mm256_add_ps(sum, sum2));
}

inline float largest_of(const float* scores, int visible, float least) {
    __m256 peak = _mm256_set1_ps(least), peak2 = peak;
    int i = 0;
    for (; i + 2 * kLanes <= visible; i += 2 * kLanes) {
        peak = _mm256_max_ps(peak, load8(scores + i));
        peak2 = _mm256_max_ps(peak2, load8(scores + i + kLanes));
    }
    for (; i < visible; i += kLanes)
        peak = _mm256_max_ps(peak, _mm256_blendv_ps(peak, load8(scores + i), first_lanes(visible - i)));
    return largest(_mm256_max_ps(peak, peak2));
}

void softmax(float* scores, int rows, std::int64_t ld, int visible, int padded, float* top, float* total,
             float* rescale, Ahead& ahead) {
    // All maxima first: the exponentials of a row would wait for its own.
    for (int r = 0; r < rows; ++r) {
        const float now = largest_of(scores + r * ld, visible, top[r]);
        rescale[r] = now > top[r] ? exp2_1(top[r] - now) : 1.0f;
        top[r] = now;
    }
    for (int r = 0; r < rows; ++r) {
        fetch(ahead, kLinesPerSoftmax);
        total[r] = total[r] * rescale[r] + weigh(scores + r * ld, visible, padded, top[r]);
    }
}

// Windows 4j, 4j + 2, 4j + 4, 4j + 6 of eight j, in no particular order.
inline __m256 coarse8(const float* s) {
    __m256 u[4];
    CPM_UNROLL
    for (int i = 0; i < 4; ++i, s += kLanes)
        u[i] = _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(load8(s), load8(s + 2)), load8(s + 4)), load8(s + 6));
    const __m256 low = _mm256_shuffle_ps(u[0], u[1], 0), high = _mm256_shuffle_ps(u[2], u[3], 0);
    return _mm256_mul_ps(_mm256_shuffle_ps(low, high, 0x88), _mm256_set1_ps(0.25f));
}

// Applies body to vectors of the first `count` values that the normaliser is made of, then tail to each other one.
template <typename Body, typename Tail>
inline void each(const float* scores, std::int64_t n, std::int64_t coarse, Body body, Tail tail) {
    std::int64_t j = 0;
    if (coarse) {
        // Eight windows read 38 scores, the ones that they are made of and up to three beyond the last.
        for (; 4 * (j + kLanes) + 6 <= n; j += kLanes) body(coarse8(scores + 4 * j));
        for (; j < coarse; ++j) {
            const float* s = scores + 4 * j;
            tail((s[0] + s[2] + s[4] + s[6]) * 0.25f);
        }
    } else {
        for (; j + kLanes <= n; j += kLanes) body(load8(scores + j));
        for (; j < n; ++j) tail(scores[j]);
    }
}

void normalizer(const float* scores, std::int64_t n, std::int64_t coarse, float* top, float* total) {
    __m256 peak = _mm256_set1_ps(-std::numeric_limits<float>::infinity()), sum = _mm256_setzero_ps();
    float peak1 = -std::numeric_limits<float>::infinity(), sum1 = 0.0f;
    each(
        scores, n, coarse, [&](__m256 v) { peak = _mm256_max_ps(peak, v); },
        [&](float v) { peak1 = std::max(peak1, v); });
    *top = std::max(peak1, largest(peak));
    const __m256 all = _mm256_set1_ps(*top);
    each(
        scores, n, coarse, [&](__m256 v) { sum = _mm256_add_ps(sum, exp2_8(_mm256_sub_ps(v, all))); },
        [&](float v) { sum1 += exp2_1(v - *top); });
    *total = sum1 + sum_of(sum);
}

void probabilities(float* scores, std::int64_t n, float top, float limit, float factor) {
    const __m256 tops = _mm256_set1_ps(top), limits = _mm256_set1_ps(limit), factors = _mm256_set1_ps(factor);
    const auto of = [&](__m256 v) {
        return _mm256_mul_ps(exp2_8(_mm256_min_ps(_mm256_sub_ps(v, tops), limits)), factors);
    };
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) _mm256_storeu_ps(scores + j, of(load8(scores + j)));
    for (; j < n; ++j) scores[j] = _mm256_cvtss_f32(of(_mm256_set1_ps(scores[j])));
}

void add(const float* values, std::int64_t n, float* sums) {
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) _mm256_storeu_ps(sums + j, _mm256_add_ps(load8(sums + j), load8(values + j)));
    for (; j < n; ++j) sums[j] += values[j];
}

}  // namespace

const AttentionKernels kAttentionAvx2 = {
    {8, store_half, store_half, mean_half, pack_half_keys, pack_values<std::uint16_t>, direct_half_scores, nullptr,
     direct_accumulate<std::uint16_t>},
    {4, store_int8_key, store_int8_value, mean_int8, pack_int8_keys, pack_values<std::int8_t>, direct_int8_scores,
     apply_scales, direct_accumulate<std::int8_t>},
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
