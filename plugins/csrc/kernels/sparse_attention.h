// cpm.SparseAttention on caches of fixed capacity, one sequence: append the new rows, choose key blocks for the
// rows beyond dense_len, attend. plugins/sparse_attention/spec.py states the semantics.
//
// Keys and values are kept in float16, pooled keys in float32: they are an eighth of the keys' bytes, and the
// selection then depends on nothing but the stored keys. A call splits its work by rules that do not look at the
// number of threads, so results are equal whatever the pool.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

constexpr int kMaxHeadSize = 256;
constexpr int kKeyPanel = 16;    // keys side by side in a packed panel (head_size, 16)
constexpr int kValuePanel = 16;  // columns side by side in a packed panel (keys, 16)

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
    std::uint16_t* key_cache;     // (kv_heads, capacity, head_size), float16 bits
    std::uint16_t* value_cache;   // likewise
    float* pooled_cache;          // (kv_heads, capacity / kernel_stride, head_size); null with topk 0
    std::int64_t capacity, past, rows;
    float* output;                // (rows, num_heads * head_size)
    std::int32_t* selected;       // (rows, kv_heads, budget) chosen blocks, -1 for none; may be null
};

void sparse_attention(ThreadPool& pool, Isa isa, const AttentionSpec& spec, const AttentionStep& step);

// Memory that the next block needs. Kernels ask for a few lines of it between pieces of their own work: asked for at
// once, the lines would hold up everything behind them for as long as the memory takes.
struct Ahead {
    const char *at = nullptr, *end = nullptr;      // first this range
    const char *then = nullptr, *then_end = nullptr;
};

// The functions that exist once per instruction set. Scores are in units of ln 2: queries carry scale * log2(e).
struct AttentionKernels {
    void (*to_half)(const float* in, std::int64_t n, std::uint16_t* out);
    // out (size) = mean of `count` rows (size) of halves.
    void (*mean)(const std::uint16_t* rows, int count, int size, float* out);
    // Keys (n, size) to panels of 16, the last one filled up with zeros; a panel is (size, 16).
    void (*pack_keys)(const std::uint16_t* keys, int n, int size, float* panels, Ahead& ahead);
    void (*pack_pooled)(const float* keys, int n, int size, float* panels);
    // Values (n, size) to panels (n, 16), the last one (n, 8) where size % 16 is 8.
    void (*pack_values)(const std::uint16_t* values, int n, int size, float* panels);
    // out (rows, 16 * panels) with leading dimension `ld` = queries (rows, size) times the packed keys.
    void (*scores)(const float* queries, int rows, int size, const float* keys, int panels, float* out,
                   std::int64_t ld, Ahead& ahead);
    // The same straight from the cache: out (rows, n).
    void (*direct_scores)(const float* queries, int rows, int size, const std::uint16_t* keys, int n, float* out,
                          std::int64_t ld, Ahead& ahead);
    void (*direct_pooled)(const float* queries, int rows, int size, const float* keys, int n, float* out,
                          std::int64_t ld, Ahead& ahead);
    // One block of the online softmax: scores (rows, ld), of which the first `visible` count, become weights,
    // the rest up to `padded` (a multiple of 8) 0. top and total are updated; rescale: what multiplies the sums.
    void (*softmax)(float* scores, int rows, std::int64_t ld, int visible, int padded, float* top, float* total,
                    float* rescale, Ahead& ahead);
    // sums (rows, size) = rescale * sums + weights (rows, n; ld) times packed values.
    void (*accumulate)(const float* weights, int rows, std::int64_t ld, int n, const float* values, int size,
                       const float* rescale, float* sums);
    // The same straight from the cache.
    void (*direct_accumulate)(const float* weights, int rows, std::int64_t ld, int n, const std::uint16_t* values,
                              int size, const float* rescale, float* sums, Ahead& ahead);
    // Maximum and sum of exponentials of n scores, or of their `coarse` windows when there are any:
    // window j is the mean of scores 4j, 4j + 2, 4j + 4 and 4j + 6.
    void (*normalizer)(const float* scores, std::int64_t n, std::int64_t coarse, float* top, float* total);
    // scores = exp(min(scores - top, limit)) * factor, in place.
    void (*probabilities)(float* scores, std::int64_t n, float top, float limit, float factor);
    // sums += values.
    void (*add)(const float* values, std::int64_t n, float* sums);
};

const AttentionKernels& attention_kernels(Isa isa);

extern const AttentionKernels kAttentionScalar;
#if defined(CPM_X86)
extern const AttentionKernels kAttentionAvx2;
#endif

}  // namespace cpm
