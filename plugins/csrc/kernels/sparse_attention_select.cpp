// Which key blocks a row beyond dense_len attends to.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/sparse_attention_parts.h"

namespace cpm {
namespace {

constexpr float kExponentLimit = 80.0f * kLog2E;
constexpr std::int64_t kChunk = 256;         // pooled keys of one task; a multiple of kKeyPanel
constexpr std::int64_t kStep = 32;          // of them at a time: they stay in the first-level cache
constexpr std::int64_t kRowsPerTask = 4;     // positions whose scores stay in the second-level cache
constexpr std::int64_t kFewTasks = 8;        // fewer tasks of positions than this: split the pooled keys instead
constexpr std::int64_t kSerialKeys = 256;    // pooled keys times heads: below, one thread does it all

struct Scratch {
    FloatBuffer queries, scores, panels;
};

// Scores of the blocks [first, last), their bits as integers of the same order: no score is negative but -inf.
void block_scores(const float* probabilities, std::int64_t windows, std::int64_t first, std::int64_t last,
                  std::vector<std::int32_t>& scores) {
    scores.resize(std::size_t(last - first));
    for (std::int64_t b = first; b < last; ++b) {
        float score = -std::numeric_limits<float>::infinity();
        const std::int64_t stop = std::min(4 * b + 4, windows);
        for (std::int64_t j = std::max<std::int64_t>(4 * b - 1, 0); j < stop; ++j)
            score = std::max(score, probabilities[j]);
        std::memcpy(&scores[std::size_t(b - first)], &score, sizeof score);
    }
}

// The blocks of the row at `position`, ascending; probabilities are already summed over the group.
void choose(const AttentionSpec& spec, std::int64_t position, const float* probabilities, std::int64_t windows,
            std::int32_t* blocks) {
    const std::int64_t count = position / spec.block_size + 1, budget = spec.budget();
    std::int32_t* const end = blocks + budget;
    if (count <= budget) {
        for (std::int64_t b = 0; b < count; ++b) *blocks++ = std::int32_t(b);
        std::fill(blocks, end, -1);
        return;
    }
    // The forced blocks never exceed the budget (topk > init_blocks), so here they do not overlap.
    const std::int64_t first = spec.init_blocks, last = count - spec.local_blocks();
    std::int64_t wanted = budget - spec.init_blocks - spec.local_blocks();
    for (std::int64_t b = 0; b < first; ++b) *blocks++ = std::int32_t(b);
    if (wanted > 0) {
        thread_local std::vector<std::int32_t> scores, order;
        block_scores(probabilities, windows, first, last, scores);
        order = scores;
        std::nth_element(order.begin(), order.begin() + (wanted - 1), order.end(), std::greater<std::int32_t>());
        const std::int32_t least = order[std::size_t(wanted - 1)];
        std::int64_t ties = wanted - std::count_if(order.begin(), order.begin() + wanted,
                                                   [least](std::int32_t score) { return score > least; });
        for (std::int64_t b = first; b < last; ++b) {
            const std::int32_t score = scores[std::size_t(b - first)];
            if (score > least || (score == least && ties-- > 0)) *blocks++ = std::int32_t(b);
        }
    }
    for (std::int64_t b = last; b < count; ++b) *blocks++ = std::int32_t(b);
}

// Scores of one head (windows) to its share of the probabilities, in place.
void to_probabilities(const AttentionCall& call, float* scores, std::int64_t windows, std::int64_t length) {
    const std::int64_t coarse = call.spec.coarse_lse ? call.spec.coarse_windows(length) : 0;
    float top, total;
    call.kernels.normalizer(scores, windows, coarse, &top, &total);
    call.kernels.probabilities(scores, windows, top, kExponentLimit, 1.0f / total);
}

// Few rows over many pooled keys: the keys of each row are split over the threads.
void select_row(const AttentionCall& call, std::int64_t row, BlockLists& lists) {
    const AttentionSpec& spec = call.spec;
    const int size = spec.head_size, group = spec.group();
    const std::int64_t position = call.step.past + row, windows = spec.windows(position + 1);
    const std::int64_t ld = round_up(windows, kKeyPanel), chunks = ceil_div(windows, kChunk);
    const bool serial = windows * spec.num_heads < kSerialKeys * 16;
    thread_local Scratch own;
    float* const queries = own.queries.at_least(std::size_t(spec.num_heads) * size);
    float* const scores = own.scores.at_least(std::size_t(spec.num_heads * ld));
    for (int h = 0; h < spec.kv_heads; ++h) load_queries(call, h, row, row + 1, queries + h * group * size);

    call.run(std::size_t(chunks * spec.kv_heads), serial, [&](std::size_t task) {
        const int kv_head = int(std::int64_t(task) / chunks);
        const std::int64_t first = std::int64_t(task) % chunks * kChunk, last = std::min(first + kChunk, windows);
        for (std::int64_t j = first; j < last; j += kStep) {
            const float* keys = call.pooled(kv_head, j);
            const std::int64_t count = std::min(kStep, last - j), next = std::min(kStep, windows - j - count);
            Ahead ahead;
            ahead.add(keys + count * size, next * size * std::int64_t(sizeof(float)));
            call.kernels.direct_pooled(queries + kv_head * group * size, group, size, keys, int(count),
                                       scores + kv_head * group * ld + j, ld, ahead);
        }
    });
    if (windows)
        call.run(std::size_t(spec.num_heads), serial, [&](std::size_t head) {
            to_probabilities(call, scores + std::int64_t(head) * ld, windows, position + 1);
        });
    call.run(std::size_t(spec.kv_heads), serial, [&](std::size_t kv_head) {
        float* sum = scores + std::int64_t(kv_head) * group * ld;
        for (int g = 1; g < group; ++g) call.kernels.add(sum + g * ld, windows, sum);
        choose(spec, position, sum, windows, lists.of(row, int(kv_head)));
    });
}

// The pooled keys of all kv heads in panels: (kv_heads, panels, size, 16).
const float* pack_all(const AttentionCall& call, std::int64_t windows, Scratch& scratch) {
    const int size = call.spec.head_size;
    const std::int64_t chunks = ceil_div(windows, kChunk), ld = round_up(windows, kKeyPanel);
    float* const panels = scratch.panels.at_least(std::size_t(call.spec.kv_heads * ld * size));
    call.run(std::size_t(chunks * call.spec.kv_heads), false, [&](std::size_t task) {
        const int kv_head = int(std::int64_t(task) / chunks);
        const std::int64_t first = std::int64_t(task) % chunks * kChunk;
        call.kernels.pack_pooled(call.pooled(kv_head, first), int(std::min(kChunk, windows - first)), size,
                                 panels + (kv_head * ld + first) * size);
    });
    return panels;
}

// Rows [first, last) on one kv head.
void select_rows(const AttentionCall& call, const float* panels, int kv_head, std::int64_t first,
                 std::int64_t last, BlockLists& lists) {
    const AttentionSpec& spec = call.spec;
    const int size = spec.head_size, group = spec.group(), rows = int(last - first) * group;
    const std::int64_t ld = round_up(spec.windows(call.step.past + last), kKeyPanel);
    thread_local Scratch own;
    float* const queries = own.queries.at_least(std::size_t(rows) * size);
    float* const scores = own.scores.at_least(std::size_t(rows * ld));
    load_queries(call, kv_head, first, last, queries);
    Ahead none;
    call.kernels.scores(queries, rows, size, panels, int(ld / kKeyPanel), scores, ld, none);
    for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t position = call.step.past + row, windows = spec.windows(position + 1);
        float* sum = scores + (row - first) * group * ld;
        for (int g = 0; g < group && windows; ++g) {
            to_probabilities(call, sum + g * ld, windows, position + 1);
            if (g) call.kernels.add(sum + g * ld, windows, sum);
        }
        choose(spec, position, sum, windows, lists.of(row, kv_head));
    }
}

}  // namespace

void select_blocks(const AttentionCall& call, BlockLists& lists) {
    const std::int64_t first = lists.first_row, rows = call.step.rows - first;
    const int kv_heads = call.spec.kv_heads;
    if (rows * kv_heads < kFewTasks) {
        for (std::int64_t row = first; row < call.step.rows; ++row) select_row(call, row, lists);
        return;
    }
    const std::int64_t windows = call.spec.windows(call.length()), ld = round_up(windows, kKeyPanel);
    thread_local Scratch shared;
    const float* const panels = pack_all(call, windows, shared);
    const std::int64_t groups = ceil_div(rows, kRowsPerTask);
    call.run(std::size_t(groups * kv_heads), false, [&](std::size_t task) {
        const int kv_head = int(std::int64_t(task) / groups);
        const std::int64_t start = first + std::int64_t(task) % groups * kRowsPerTask;
        select_rows(call, panels + kv_head * ld * call.spec.head_size, kv_head, start,
                    std::min(start + kRowsPerTask, call.step.rows), lists);
    });
}

}  // namespace cpm
