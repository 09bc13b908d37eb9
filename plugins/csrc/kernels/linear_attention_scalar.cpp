// The portable path: the recurrence token by token.
#include <cmath>

#include "kernels/linear_attention.h"

namespace cpm {
namespace {

void recurrence(const LinearSlice& s) {
    const float keep = std::exp(s.decay);
    for (std::int64_t t = 0; t < s.rows; ++t) {
        const float *query = s.query + t * s.query_stride, *key = s.key + t * s.key_stride;
        const float* value = s.value + t * s.value_stride;
        float* output = s.output + t * s.output_stride;
        for (std::int64_t c = 0; c < s.columns; ++c) output[c] = 0.0f;
        for (std::int64_t d = 0; d < s.size; ++d) {
            float* state = s.state + d * s.state_stride;
            const float q = query[d] * s.scale, k = key[d];
            for (std::int64_t c = 0; c < s.columns; ++c) {
                state[c] = keep * state[c] + k * value[c];
                output[c] += q * state[c];
            }
        }
    }
}

}  // namespace

const LinearAttentionKernels kLinearAttentionScalar = {recurrence, recurrence};

}  // namespace cpm
