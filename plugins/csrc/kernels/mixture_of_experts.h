// y = residual + scale * sum over chosen experts e of share_e * W2_e (silu(W1_e x) * W3_e x): see the specification
// in plugins/mixture_of_experts/spec.py. Rows are grouped by expert, so an expert's weights are read once a call, and
// those of experts that no row chose are not read at all.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/matmul_nbits.h"
#include "kernels/thread_pool.h"

namespace cpm {

struct Experts {
    std::int64_t count, top_k;
    NBitsShape inner;               // of each W1 and W3: (F, H)
    NBitsShape outer;               // of each W2: (H, F)
    const std::uint8_t *w1, *w3, *w2;  // panels, one expert behind the other
    const float* router;            // (count, H)
};

// For one row of logits (count): the top_k largest, ties to the lowest index, in `chosen`, and their softmax among
// themselves in `shares`.
void choose_experts(const float* logits, std::int64_t count, std::int64_t top_k, std::int64_t* chosen, float* shares);

// x and residual (m, H), y (m, H), which may be the residual.
void mixture_of_experts(ThreadPool& pool, Isa isa, const Experts& experts, const float* x, std::int64_t m,
                        const float* residual, float scale, float* y);

}  // namespace cpm
