// One step of a layer of linear attention, as MiniCPM-SALA's lightning layers have it, between its two products:
//   q, k = rotate(rms_norm(q) * query_norm), rotate(rms_norm(k) * key_norm)      each head by itself
//   o    = linear_attention(q, k, v)                                             see kernels/linear_attention.h
//   y    = rms_norm(o) * output_norm * sigmoid(gate)                             all heads together
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

struct RecurrentStep {
    std::int64_t rows, heads, size;       // size of a head: even
    const float* mixed;                   // (rows, 4 * heads * size): queries, keys, values and gates of a row
    const float *query_norm, *key_norm;   // (size)
    const float* output_norm;             // (heads * size)
    const float *cosine, *sine;           // (rows, size / 2), to rotate by halves
    const float* decay;                   // (heads), logarithms
    float scale, epsilon;
    float* state;   // (heads, size, size), updated in place
    float* output;  // (rows, heads * size)
};

void recurrent_attention(ThreadPool& pool, Isa isa, const RecurrentStep& step);

}  // namespace cpm
