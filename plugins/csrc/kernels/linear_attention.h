// Gated linear attention with a constant log decay g per head:
//   S_t = e^g S_{t-1} + k_t v_t^T,  o_t = scale * q_t^T S_t   (the current token is not decayed)
// Single tokens take the recurrence. More go in chunks of kLinearChunk tokens of three matrix products:
//   A = scale * (q k^T) o [i >= j] e^{g (i - j)},  o_i = A_i v + scale * e^{g (i + 1)} q_i^T S,
//   S = e^{g n} S + sum over j of e^{g (n - 1 - j)} k_j v_j^T
// Every exponent is 0 or less, so nothing overflows, however strong the decay.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

constexpr int kLinearChunk = 48;  // whole tiles of 6 rows; shorter chunks read the state more often

struct LinearAttentionShape {
    std::int64_t batch = 0, rows = 0, heads = 0;
    std::int64_t size = 0, value_size = 0;  // of a head: D of queries and keys, Dv of values
    // Floats from one row to the next: heads * size or more, so that inputs may be columns of a wider matrix.
    std::int64_t query_stride = 0, key_stride = 0, value_stride = 0;
};

struct LinearAttentionCall {
    LinearAttentionShape shape;
    const float *query, *key, *value;  // (batch, rows, heads * D or Dv), with the strides of the shape
    const float* decay;                // (heads), logarithms
    float scale;
    float* state;   // (batch, heads, D, Dv), updated in place
    float* output;  // (batch, rows, heads * Dv)
};

void linear_attention(ThreadPool& pool, Isa isa, const LinearAttentionCall& call);

// Powers e^{g k} of one head. Those too small to matter are 0: their products would be slow denormals.
class DecayPowers {
public:
    explicit DecayPowers(float decay);
    // e^{g k} for k in [0, kLinearChunk].
    float at(std::int64_t k) const { return k == kLinearChunk ? whole_ : falling_[kLinearChunk - 1 - k]; }
    // e^{g (row - j)} for j = 0, 1, ... kLinearChunk - 1, and 0 where j > row.
    const float* before(std::int64_t row) const { return falling_ + kLinearChunk - 1 - row; }

private:
    float falling_[2 * kLinearChunk] = {};
    float whole_ = 0.0f;
};

// Some value columns of one head of one sequence: what one task works on.
struct LinearSlice {
    std::int64_t rows, size, columns;
    std::int64_t query_stride, key_stride, value_stride, state_stride, output_stride;
    const float *query, *key, *value;
    float *state, *output;
    float decay, scale;
};

// The functions that exist once per instruction set.
struct LinearAttentionKernels {
    void (*step)(const LinearSlice& slice);    // one row
    void (*chunks)(const LinearSlice& slice);  // any number of rows
};

const LinearAttentionKernels& linear_attention_kernels(Isa isa);

extern const LinearAttentionKernels kLinearAttentionScalar;
#if defined(CPM_X86)
extern const LinearAttentionKernels kLinearAttentionAvx2;
#endif

}  // namespace cpm
