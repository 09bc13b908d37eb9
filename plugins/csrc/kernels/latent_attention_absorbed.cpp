// Few new rows: the queries of all heads meet the cached rows. Tiles of neighbouring rows share a pass over the cache,
// and where there are few tiles the blocks are split among tasks whose results are merged by their log-sum-exp.
#include <cmath>

#include "kernels/latent_attention_parts.h"

namespace cpm {
namespace {

constexpr int kTileQueries = 128;           // rows times heads of a tile
constexpr std::int64_t kFewTiles = 16;      // below, the blocks of a tile are split
constexpr std::int64_t kMaxTasks = 64;      // splits times tiles
constexpr std::int64_t kBlocksPerTask = 4;  // no split has fewer

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The running sums of a task's queries: top and total of each, then the mixed latents (queries, rank).
struct Sums {
    float *top, *total, *values;
    Sums(float* data, std::int64_t queries) : top(data), total(data + queries), values(data + 2 * queries) {}
    static std::int64_t size(std::int64_t queries, int rank) { return queries * (rank + 2); }
};

// How the rows of a call are cut up. It depends on the call alone, not on the threads.
struct Plan {
    std::int64_t tile_rows, tiles, splits;
    explicit Plan(const LatentCall& call) {
        const std::int64_t rows = call.step.rows;
        tiles = ceil_div(rows, std::max(kTileQueries / call.spec.num_heads, 1));
        tile_rows = ceil_div(rows, tiles);
        tiles = ceil_div(rows, tile_rows);
        splits = 1;
        if (tiles < kFewTiles)
            splits = std::clamp<std::int64_t>(call.blocks() / kBlocksPerTask, 1, kMaxTasks / tiles);
    }
};

// out (rows, num_heads, width): the queries of one head, in units of ln 2.
void absorb(const LatentCall& call, int head, float* out) {
    const LatentSpec& spec = call.spec;
    const UpProjection up = call.up(head);
    const float factor = spec.scale * kLog2E;
    thread_local FloatBuffer own;
    float* const plain = own.at_least(std::size_t(spec.nope));
    for (std::int64_t t = 0; t < call.step.rows; ++t) {
        const float* query = call.step.query + t * call.step.query_stride + head * spec.query_size();
        float* target = out + (t * spec.num_heads + head) * spec.width();
        for (int i = 0; i < spec.nope; ++i) plain[i] = query[i] * factor;
        call.latent.combine(up.codes, up.scales, plain, spec.nope, spec.rank, spec.groups, target);
        turn(call, query + spec.nope, t, factor, target + spec.rank);
    }
}

// Rows [first, last) on blocks [from, to).
void mix(const LatentCall& call, const float* queries, std::int64_t first, std::int64_t last, std::int64_t from,
         std::int64_t to, const Sums& sums) {
    const LatentSpec& spec = call.spec;
    const int heads = spec.num_heads, count_rows = int(last - first) * heads;
    thread_local FloatBuffer score_buffer, value_buffer, rescale_buffer;
    float* const scores = score_buffer.at_least(std::size_t(count_rows) * kLatentBlock);
    float* const values = value_buffer.at_least(std::size_t(kLatentBlock) * spec.width());
    float* const rescale = rescale_buffer.at_least(std::size_t(count_rows));
    std::fill_n(sums.top, count_rows, kNone);
    std::fill_n(sums.total, count_rows, 0.0f);
    std::fill_n(sums.values, std::int64_t(count_rows) * spec.rank, 0.0f);
    const float* own = queries + first * heads * spec.width();
    Ahead none;
    for (std::int64_t block = from; block < to; ++block) {
        const std::int64_t start = block * kLatentBlock;
        if (start >= call.step.past + last) break;
        const int count = call.count(block);
        const float* keys = pack_block(call, block, block + 1 < to);
        call.kernels.scores(own, count_rows, spec.width(), keys, int(ceil_div(count, kKeyPanel)), scores, kLatentBlock,
                            none);
        std::int64_t blind = 0;  // queries of the first rows, which do not see the block
        for (std::int64_t t = first; t < last; ++t) {
            const std::int64_t visible = std::min<std::int64_t>(count, call.step.past + t + 1 - start);
            if (visible <= 0) {
                blind = (t + 1 - first) * heads;
                continue;
            }
            const std::int64_t at = (t - first) * heads;
            call.kernels.softmax(scores + at * kLatentBlock, heads, kLatentBlock, int(visible),
                                 int(round_up(count, 8)), sums.top + at, sums.total + at, rescale + at, none);
        }
        call.kernels.half.pack_values({call.cached(start), nullptr}, count, spec.width(), values);
        call.kernels.accumulate(scores + blind * kLatentBlock, count_rows - int(blind), kLatentBlock, count, values,
                                spec.rank, rescale + blind, sums.values + blind * spec.rank);
    }
}

// All splits of a tile into the first one's sums.
void merge(float* parts, std::int64_t stride, std::int64_t splits, std::int64_t queries, int rank) {
    const Sums first(parts, queries);
    for (std::int64_t q = 0; q < queries; ++q) {
        float top = kNone;
        for (std::int64_t s = 0; s < splits; ++s) top = std::max(top, parts[s * stride + q]);
        float total = 0.0f;
        float* sum = first.values + q * rank;
        for (std::int64_t s = 0; s < splits; ++s) {
            const Sums part(parts + s * stride, queries);
            const float weight = std::exp2(part.top[q] - top);
            const float* values = part.values + q * rank;
            total += weight * part.total[q];
            if (s == 0)
                for (int i = 0; i < rank; ++i) sum[i] *= weight;
            else
                for (int i = 0; i < rank; ++i) sum[i] += weight * values[i];
        }
        first.total[q] = total;
    }
}

}  // namespace

void attend_absorbed(const LatentCall& call) {
    const LatentSpec& spec = call.spec;
    const Plan plan(call);
    const std::int64_t rows = call.step.rows, heads = spec.num_heads, blocks = call.blocks();
    const std::int64_t stride = Sums::size(plan.tile_rows * heads, spec.rank);
    thread_local FloatBuffer query_buffer, part_buffer;
    float* const queries = query_buffer.at_least(std::size_t(rows * heads * spec.width()));
    float* const parts = part_buffer.at_least(std::size_t(plan.tiles * plan.splits * stride));
    const std::int64_t up_work = rows * heads * spec.nope * spec.rank;
    call.run(std::size_t(heads), up_work, [&](std::size_t head) { absorb(call, int(head), queries); });

    const std::int64_t work = rows * heads * (spec.width() + spec.rank) * call.length();
    call.run(std::size_t(plan.tiles * plan.splits), work, [&](std::size_t task) {
        const std::int64_t tile = std::int64_t(task) / plan.splits, split = std::int64_t(task) % plan.splits;
        const std::int64_t first = tile * plan.tile_rows, last = std::min(first + plan.tile_rows, rows);
        mix(call, queries, first, last, blocks * split / plan.splits, blocks * (split + 1) / plan.splits,
            Sums(parts + std::int64_t(task) * stride, (last - first) * heads));
    });

    if (plan.splits > 1)
        call.run(std::size_t(plan.tiles), plan.tiles * plan.splits * stride, [&](std::size_t tile) {
            const std::int64_t first = std::int64_t(tile) * plan.tile_rows;
            const std::int64_t last = std::min(first + plan.tile_rows, rows);
            merge(parts + std::int64_t(tile) * plan.splits * stride, stride, plan.splits, (last - first) * heads,
                  spec.rank);
        });

    call.run(std::size_t(heads), rows * heads * spec.value * spec.rank, [&](std::size_t head) {
        const UpProjection up = call.up_value(int(head));
        for (std::int64_t t = 0; t < rows; ++t) {
            const std::int64_t tile = t / plan.tile_rows, first = tile * plan.tile_rows;
            const std::int64_t last = std::min(first + plan.tile_rows, rows);
            const Sums sums(parts + tile * plan.splits * stride, (last - first) * heads);
            const std::int64_t q = (t - first) * heads + std::int64_t(head);
            float* out = call.step.output + (t * heads + std::int64_t(head)) * spec.value;
            call.latent.project(up.codes, up.scales, sums.values + q * spec.rank, spec.value, spec.rank, spec.groups,
                                out);
            for (int i = 0; i < spec.value; ++i) out[i] /= sums.total[q];
        }
    });
}

}  // namespace cpm
