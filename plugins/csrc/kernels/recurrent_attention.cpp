#include "kernels/recurrent_attention.h"

#include <vector>

#include "kernels/linear_attention.h"
#include "kernels/output_gate.h"
#include "kernels/rms_norm.h"

namespace cpm {
namespace {

constexpr std::int64_t kSerialRows = 4;  // rows that are done sooner than other threads wake up

template <class Row>
void for_rows(ThreadPool& pool, std::int64_t rows, const Row& row) {
    if (rows >= kSerialRows) {
        pool.run(std::size_t(rows), [&row](std::size_t t, int) { row(std::int64_t(t)); });
        return;
    }
    for (std::int64_t t = 0; t < rows; ++t) row(t);
}

void rotate(const float* cosine, const float* sine, std::int64_t half, float* head) {
    for (std::int64_t i = 0; i < half; ++i) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + half] = second * cosine[i] + first * sine[i];
    }
}

// Queries and keys of row t, normalized and rotated: (2, heads, size).
void turn(const RecurrentStep& s, RmsNorm norm, std::int64_t t, float* out) {
    const std::int64_t half = s.size / 2;
    const float* in = s.mixed + 4 * t * s.heads * s.size;
    for (const float* weight : {s.query_norm, s.key_norm})
        for (std::int64_t head = 0; head < s.heads; ++head, in += s.size, out += s.size) {
            norm(in, weight, s.size, s.epsilon, 1.0f, out);
            rotate(s.cosine + t * half, s.sine + t * half, half, out);
        }
}

}  // namespace

void recurrent_attention(ThreadPool& pool, Isa isa, const RecurrentStep& s) {
    const std::int64_t width = s.heads * s.size;
    thread_local std::vector<float> memory;
    memory.resize(std::size_t(2 * s.rows * width));
    float* turned = memory.data();  // not thread-local in the tasks below
    const RmsNorm norm = rms_norm(isa);
    for_rows(pool, s.rows, [&](std::int64_t t) { turn(s, norm, t, turned + 2 * t * width); });

    LinearAttentionCall call{};
    call.shape = {1, s.rows, s.heads, s.size, s.size, 2 * width, 2 * width, 4 * width};
    call.query = turned;
    call.key = turned + width;
    call.value = s.mixed + 2 * width;
    call.decay = s.decay;
    call.scale = s.scale;
    call.state = s.state;
    call.output = s.output;
    linear_attention(pool, isa, call);

    const OutputGate gate = output_gate(isa);
    for_rows(pool, s.rows, [&](std::int64_t t) {
        float* row = s.output + t * width;
        norm(row, s.output_norm, width, s.epsilon, 1.0f, row);
        gate(s.mixed + (4 * t + 3) * width, width, row);
    });
}

}  // namespace cpm
