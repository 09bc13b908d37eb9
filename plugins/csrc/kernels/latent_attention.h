// Multi-head latent attention (DeepSeek-V2, section 2.1) on a cache of fixed capacity, one sequence. A cached row is
// what the keys and values of all heads are made of: a normalized latent c and one rotated key k, in float16. The
// up-projection of a head, W_k and W_v, makes its key [W_k c | k] and its value W_v c.
//
// Two forms that differ in rounding alone:
//   absorbed, few new rows: queries [W_k^T q | q_rope] meet the cached rows themselves, and W_v the mixed latents;
//   expanded, many: a block of cached rows becomes keys and values of one head, which all new rows meet at once.
// A query and a key cost 2 * (2 rank + rope) operations a head in the one and 2 * (nope + rope + value) in the other,
// a third of it, but expanding costs 2 * rank * (nope + value) a cached row and head. Calls split their work by rules
// that do not look at the number of threads, so results are equal whatever the pool.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

struct LatentSpec {
    int num_heads, rank, nope, rope, value;  // sizes of a latent and of the parts of a head
    int groups;                              // scales a row of the up-projection
    float scale, epsilon;

    int width() const { return rank + rope; }       // of a cached row
    int query_size() const { return nope + rope; }  // of a head
};

// The up-projection, for each head W_k (nope, rank), then W_v (value, rank): codes times the scale of their group.
struct UpProjection {
    const float* scales;       // (num_heads * (nope + value), groups)
    const std::int8_t* codes;  // (num_heads * (nope + value), rank)
};

// Rows [0, past) of the cache are valid; rows from past + rows on are never read.
struct LatentStep {
    const float* query;              // (rows, num_heads * (nope + rope)), to be rotated
    const float* latent;             // (rows, rank + rope), to be normalized and rotated
    std::int64_t query_stride, latent_stride;  // floats from one row to the next
    const float* norm;               // (rank)
    const float *cosine, *sine;      // (rows, rope / 2), to rotate by halves
    UpProjection up;
    std::uint16_t* cache;            // (capacity, rank + rope), float16 bits
    std::int64_t past, rows;
    float* output;                   // (rows, num_heads * value)
};

// rank and rope: multiples of 8; value: a multiple of 16; rank / groups: a multiple of 8.
void latent_attention(ThreadPool& pool, Isa isa, const LatentSpec& spec, const LatentStep& step);

// Rows that are taken in expanded form from this many on.
constexpr std::int64_t kExpandedRows = 96;

// The functions that exist once per instruction set, beside those of AttentionKernels. Codes are (n, size), their
// scales (n, groups).
struct LatentKernels {
    void (*widen)(const std::uint16_t* in, std::int64_t n, float* out);
    // out (n, size) = the weights.
    void (*dequantize)(const std::int8_t* codes, const float* scales, int n, int size, int groups, float* out);
    // out (size) = sum of factors[i] times row i.
    void (*combine)(const std::int8_t* codes, const float* scales, const float* factors, int n, int size, int groups,
                    float* out);
    // out (n) = dot products of the rows with x (size).
    void (*project)(const std::int8_t* codes, const float* scales, const float* x, int n, int size, int groups,
                    float* out);
};

extern const LatentKernels kLatentScalar;
#if defined(CPM_X86)
extern const LatentKernels kLatentAvx2;
#endif

}  // namespace cpm
