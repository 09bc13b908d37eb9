// cpm.SparseAttention on caches of fixed capacity, one sequence: append the new rows, choose key blocks for the
// rows beyond dense_len, attend. plugins/sparse_attention/spec.py states the semantics.
//
// Keys and values are kept in float16 or int8, pooled keys in float32: they are an eighth of the keys' float16 bytes,
// and the selection then depends on nothing but the stored keys. A call splits its work by rules that do not look at
// the number of threads, so results are equal whatever the pool.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

constexpr int kMaxHeadSize = 256;
constexpr int kKeyPanel = 16;    // keys side by side in a packed panel (head_size, 16)
constexpr int kValuePanel = 16;  // columns side by side in a packed panel (keys, 16)
constexpr int kScaleColumns = 32;  // columns of an int8 key that share a scale; a value has one for all

// Scales of an int8 key of `size` columns.
constexpr int key_scales(int size) { return (size + kScaleColumns - 1) / kScaleColumns; }

enum class CacheType : int { half = 0, int8 = 1 };

// Consecutive rows of one kv head in a cache.
struct CacheRows {
    void* data;             // (rows, head_size), float16 bits or int8
    std::uint16_t* scales;  // float16 bits, (rows, key_scales) of int8 keys or (rows) of int8 values; else null
};

struct AttentionSpec {
    int num_heads = 1, kv_heads = 1, head_size = 64;
    float scale = 1.0f;
    int kernel_size = 32, kernel_stride = 16, block_size = 64;
    int init_blocks = 1, window_size = 2048, topk = 64, dense_len = 8192;
    bool coarse_lse = true;

    int group() const { return num_heads / kv_heads; }
    int local_blocks() const { return window_size / block_size + 1; }
    int budget() const { return topk + window_size / block_size; }
    bool is_sparse(std::int64_t position) const { return topk > 0 && position + 1 >= dense_len; }
    // Complete windows of pooled keys among the first `length` rows.
    std::int64_t windows(std::int64_t length) const {
        return length < kernel_size ? 0 : (length - kernel_size) / kernel_stride + 1;
    }
    std::int64_t coarse_windows(std::int64_t length) const {
        return length < 4 * kernel_size ? 0 : (length - 4 * kernel_size) / (4 * kernel_stride) + 1;
    }
};

// The buffers of one call. Rows [0, past) of the caches are valid; rows from past + rows on are never read.
struct AttentionStep {
    const float* query;           // (rows, num_heads * head_size)
    const float *key, *value;     // (rows, kv_heads * head_size)
    std::int64_t query_stride, key_stride, value_stride;  // floats from one row to the next
    const float *cosine, *sine;   // (rows, head_size / 2) to rotate query and key by halves; null: rotated already
    CacheType type;
    CacheRows key_cache, value_cache;  // (kv_heads, capacity) rows
    float* pooled_cache;          // (kv_heads, capacity / kernel_stride, head_size); null with topk 0
    std::int64_t capacity, past, rows;
    float* output;                // (rows, num_heads * head_size)
    std::int32_t* selected;       // (rows, kv_heads, budget) chosen blocks, -1 for none; may be null
};

void sparse_attention(ThreadPool& pool, Isa isa, const AttentionSpec& spec, const AttentionStep& step);

// Memory that the next block needs. Kernels ask for a few lines of it between pieces of their own work: asked for at
// once, the lines would hold up everything behind them for as long as the memory takes.
struct Ahead {
    struct Range {
        const char *at = nullptr, *end = nullptr;
    };
    Range ranges[4];  // the first is under way; the unused ones come last

    void add(const void* from, std::int64_t bytes) {
        Range* range = ranges;
        while (range->at) ++range;
        range->at = static_cast<const char*>(from);
        range->end = range->at + bytes;
    }
};

// The functions that depend on the cache's type. Keys and values are `n` rows of `size` columns.
struct CacheKernels {
    int direct_keys;  // queries for which packing a block of keys does not pay
    // One row into the cache.
    void (*store_key)(const float* in, int size, const CacheRows& row);
    void (*store_value)(const float* in, int size, const CacheRows& row);
    // out (size) = mean of the keys.
    void (*mean)(const CacheRows& keys, int n, int size, float* out);
    // Keys to panels of 16, the last one filled up with zeros; a panel is (size, 16).
    void (*pack_keys)(const CacheRows& keys, int n, int size, float* panels, Ahead& ahead);
    // Values without their scales to panels (n, 16), the last one (n, 8) where size % 16 is 8.
    void (*pack_values)(const CacheRows& values, int n, int size, float* panels);
    // out (rows, n) with leading dimension `ld` = queries (rows, size) times the keys.
    void (*direct_scores)(const float* queries, int rows, int size, const CacheRows& keys, int n, float* out,
                          std::int64_t ld, Ahead& ahead);
    // weights (rows, n; ld) *= the values' scales, so that products need none. Null where values have no scales.
    void (*apply_scales)(float* weights, int rows, std::int64_t ld, int n, const CacheRows& values);
    // sums (rows, size) = rescale * sums + weights (rows, n; ld) times the values without their scales.
    void (*direct_accumulate)(const float* weights, int rows, std::int64_t ld, int n, const CacheRows& values,
                              int size, const float* rescale, float* sums, Ahead& ahead);
};

// The functions that exist once per instruction set. Scores are in units of ln 2: queries carry scale * log2(e).
struct AttentionKernels {
    CacheKernels half, int8;
    void (*pack_pooled)(const float* keys, int n, int size, float* panels);
    // out (rows, 16 * panels) with leading dimension `ld` = queries (rows, size) times the packed keys.
    void (*scores)(const float* queries, int rows, int size, const float* keys, int panels, float* out,
                   std::int64_t ld, Ahead& ahead);
    // The same with pooled keys: out (rows, n).
    void (*direct_pooled)(const float* queries, int rows, int size, const float* keys, int n, float* out,
                          std::int64_t ld, Ahead& ahead);
    // One block of the online softmax: scores (rows, ld), of which the first `visible` count, become weights,
    // the rest up to `padded` (a multiple of 8) 0. top and total are updated; rescale: what multiplies the sums.
    void (*softmax)(float* scores, int rows, std::int64_t ld, int visible, int padded, float* top, float* total,
                    float* rescale, Ahead& ahead);
    // sums (rows, size) = rescale * sums + weights (rows, n; ld) times packed values.
    void (*accumulate)(const float* weights, int rows, std::int64_t ld, int n, const float* values, int size,
                       const float* rescale, float* sums);
    // Maximum and sum of exponentials of n scores, or of their `coarse` windows when there are any:
    // window j is the mean of scores 4j, 4j + 2, 4j + 4 and 4j + 6.
    void (*normalizer)(const float* scores, std::int64_t n, std::int64_t coarse, float* top, float* total);
    // scores = exp(min(scores - top, limit)) * factor, in place.
    void (*probabilities)(float* scores, std::int64_t n, float top, float limit, float factor);
    // sums += values.
    void (*add)(const float* values, std::int64_t n, float* sums);

    const CacheKernels& of(CacheType type) const { return type == CacheType::int8 ? int8 : half; }
};

const AttentionKernels& attention_kernels(Isa isa);

extern const AttentionKernels kAttentionScalar;
#if defined(CPM_X86)
extern const AttentionKernels kAttentionAvx2;
#endif

}  // namespace cpm
