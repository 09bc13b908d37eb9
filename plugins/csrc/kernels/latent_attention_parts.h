// What the two forms of latent attention share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

#include "kernels/latent_attention.h"
#include "kernels/sparse_attention_parts.h"

namespace cpm {

constexpr int kLatentBlock = 64;                    // keys of a step
constexpr std::int64_t kSerialLatentWork = 300000;  // multiply-adds that cost less than waking the pool

struct LatentCall {
    ThreadPool& pool;
    const AttentionKernels& kernels;
    const LatentKernels& latent;
    const LatentSpec& spec;
    const LatentStep& step;

    std::int64_t length() const { return step.past + step.rows; }
    std::int64_t blocks() const { return ceil_div(length(), kLatentBlock); }
    std::uint16_t* cached(std::int64_t row) const { return step.cache + row * spec.width(); }
    // Keys of block `block`.
    int count(std::int64_t block) const {
        return int(std::min<std::int64_t>(kLatentBlock, length() - block * kLatentBlock));
    }
    // First weight of a head's W_k; W_v follows `nope` rows later.
    UpProjection up(int head) const {
        const std::int64_t row = std::int64_t(head) * (spec.nope + spec.value);
        return {step.up.scales + row * spec.groups, step.up.codes + row * spec.rank};
    }
    UpProjection up_value(int head) const {
        const UpProjection key = up(head);
        return {key.scales + std::int64_t(spec.nope) * spec.groups, key.codes + std::int64_t(spec.nope) * spec.rank};
    }

    template <typename Body>
    void run(std::size_t tasks, std::int64_t work, const Body& body) const {
        if (work < kSerialLatentWork) {
            for (std::size_t task = 0; task < tasks; ++task) body(task);
            return;
        }
        const auto of_task = [&body](std::size_t task, int) { body(task); };
        pool.run(tasks, std::ref(of_task));  // by reference: nothing is allocated
    }
};

// Panels (width, 16) of a block's keys, the last one filled up with zeros; this thread's until its next call.
// fetch_next: the next block is read soon.
const float* pack_block(const LatentCall& call, std::int64_t block, bool fetch_next);

// out (rope) = factor * in, turned by the angles of row `row`.
void turn(const LatentCall& call, const float* in, std::int64_t row, float factor, float* out);

void attend_absorbed(const LatentCall& call);
void attend_expanded(const LatentCall& call);

}  // namespace cpm
