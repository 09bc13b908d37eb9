// Attention over chosen blocks: tiles of neighbouring rows share the blocks that any of them needs, and where
// there are few tiles the blocks are split among tasks whose results are merged by their log-sum-exp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/sparse_attention_parts.h"

namespace cpm {
namespace {

constexpr int kDenseBlock = 64;               // keys of a step where the spec has no blocks
constexpr int kTileQueries = 128;             // rows times group heads of a tile
constexpr int kMaxTileRows = 32;              // bits of a mask
constexpr int kDirectValues = 8;              // queries for which packing a block of values does not pay
constexpr std::int64_t kFewTiles = 16;        // below, the blocks of a tile are split
constexpr std::int64_t kMaxTasks = 64;        // splits times tiles
constexpr std::int64_t kBlocksPerTask = 8;    // no split has fewer
constexpr std::int64_t kSerialWork = 600000;  // multiply-adds that cost less than waking the pool

constexpr float kNone = -std::numeric_limits<float>::infinity();

// How the rows of a call are cut up. It depends on the call alone, not on the threads.
struct Plan {
    int unit;                  // keys of a block
    std::int64_t tile_rows, tiles, splits;
    bool serial;
};

Plan make_plan(const AttentionCall& call) {
    const AttentionSpec& spec = call.spec;
    const std::int64_t rows = call.step.rows, length = call.length();
    Plan plan;
    plan.unit = spec.topk ? spec.block_size : kDenseBlock;
    const std::int64_t most = std::clamp(kTileQueries / spec.group(), 1, kMaxTileRows);
    plan.tiles = ceil_div(rows, most);
    plan.tile_rows = ceil_div(rows, plan.tiles);
    plan.tiles = ceil_div(rows, plan.tile_rows);
    const std::int64_t tasks = plan.tiles * spec.kv_heads;
    std::int64_t blocks = ceil_div(length, plan.unit);
    if (spec.is_sparse(call.step.past)) blocks = std::min(blocks, spec.budget() * plan.tile_rows);
    plan.splits = 1;
    if (tasks < kFewTiles) plan.splits = std::clamp<std::int64_t>(blocks / kBlocksPerTask, 1, kMaxTasks / tasks);
    plan.serial = rows * spec.num_heads * 2 * spec.head_size * blocks * plan.unit < kSerialWork;
    return plan;
}

struct MaskedBlock {
    std::int32_t block;
    std::uint32_t rows;  // bit i: row i of the tile attends to it
};

// The running sums of a tile's queries: top and total of each, then the weighted sums of values (queries, size).
struct Sums {
    float *top, *total, *values;
    Sums(float* data, int queries) : top(data), total(data + queries), values(data + 2 * queries) {}
};

class Tile {
public:
    Tile(const AttentionCall& call, const Plan& plan, int kv_head, std::int64_t first)
        : call_(call), spec_(call.spec), unit_(plan.unit), kv_head_(kv_head), first_(first),
          last_(std::min(first + plan.tile_rows, call.step.rows)), size_(call.spec.head_size),
          group_(call.spec.group()) {}

    int queries() const { return int(last_ - first_) * group_; }

    // Part `split` of `splits` of the blocks that the rows need.
    void run(const BlockLists& lists, std::int64_t split, std::int64_t splits, const Sums& sums);

    // Divides the sums into the output.
    void write(const Sums& sums) const;

private:
    struct Scratch {
        FloatBuffer queries, scores, keys, values, rescale;
        std::vector<std::uint32_t> masks;
        std::vector<MaskedBlock> blocks;
    };

    static Scratch& scratch() {
        thread_local Scratch own;
        return own;
    }
    void list_blocks(const BlockLists& lists);
    void unite_blocks(const BlockLists& lists);
    Ahead memory_of(const MaskedBlock& masked) const;
    void attend_block(const MaskedBlock& masked, const Sums& sums, Ahead& ahead);
    void attend_rows(const MaskedBlock& masked, int from, int to, const float* keys, const float* values,
                     const Sums& sums, Ahead& ahead);

    const AttentionCall& call_;
    const AttentionSpec& spec_;
    const int unit_, kv_head_;
    const std::int64_t first_, last_;
    const int size_, group_;
};

// The blocks of a tile of one row.
void Tile::list_blocks(const BlockLists& lists) {
    std::vector<MaskedBlock>& blocks = scratch().blocks;
    blocks.clear();
    if (first_ < lists.first_row) {
        const std::int64_t count = (call_.step.past + first_) / unit_ + 1;
        for (std::int64_t b = 0; b < count; ++b) blocks.push_back({std::int32_t(b), 1});
    } else {
        const std::int32_t* list = lists.of(first_, kv_head_);
        for (int i = 0; i < lists.budget && list[i] >= 0; ++i) blocks.push_back({list[i], 1});
    }
}

// The blocks that any row needs.
void Tile::unite_blocks(const BlockLists& lists) {
    std::vector<MaskedBlock>& blocks = scratch().blocks;
    blocks.clear();
    std::vector<std::uint32_t>& masks = scratch().masks;
    masks.assign(std::size_t(ceil_div(call_.step.past + last_, unit_)), 0);
    for (std::int64_t row = first_; row < last_; ++row) {
        const std::uint32_t bit = std::uint32_t(1) << (row - first_);
        if (row < lists.first_row) {
            const std::int64_t count = (call_.step.past + row) / unit_ + 1;
            for (std::int64_t b = 0; b < count; ++b) masks[std::size_t(b)] |= bit;
        } else {
            const std::int32_t* list = lists.of(row, kv_head_);
            for (int i = 0; i < lists.budget && list[i] >= 0; ++i) masks[std::size_t(list[i])] |= bit;
        }
    }
    for (std::size_t b = 0; b < masks.size(); ++b)
        if (masks[b]) blocks.push_back({std::int32_t(b), masks[b]});
}

// Rows [from, to) of the tile on one block.
void Tile::attend_rows(const MaskedBlock& masked, int from, int to, const float* keys, const float* values,
                       const Sums& sums, Ahead& ahead) {
    const std::int64_t start = std::int64_t(masked.block) * unit_;
    const int count = int(std::min<std::int64_t>(unit_, call_.step.past + last_ - start));
    const std::int64_t ld = round_up(unit_, kKeyPanel);
    const int q = from * group_, rows = (to - from) * group_;
    const float* queries = scratch().queries.data() + std::int64_t(q) * size_;
    float* scores = scratch().scores.data();
    float* rescale = scratch().rescale.data();
    const AttentionKernels& kernels = call_.kernels;
    if (keys)
        kernels.scores(queries, rows, size_, keys, int(ceil_div(count, kKeyPanel)), scores, ld, ahead);
    else
        call_.cache.direct_scores(queries, rows, size_, call_.keys(kv_head_, start), count, scores, ld, ahead);
    for (int row = from; row < to; ++row) {
        const int visible = int(std::min<std::int64_t>(count, call_.step.past + first_ + row + 1 - start));
        const int at = (row - from) * group_;
        kernels.softmax(scores + at * ld, group_, ld, visible, int(round_up(count, 8)), sums.top + q + at,
                        sums.total + q + at, rescale + at, ahead);
    }
    const CacheRows cached = call_.values(kv_head_, start);
    if (call_.cache.apply_scales) call_.cache.apply_scales(scores, rows, ld, count, cached);
    float* target = sums.values + std::int64_t(q) * size_;
    if (values)
        kernels.accumulate(scores, rows, ld, count, values, size_, rescale, target);
    else
        call_.cache.direct_accumulate(scores, rows, ld, count, cached, size_, rescale, target, ahead);
}

void Tile::attend_block(const MaskedBlock& masked, const Sums& sums, Ahead& ahead) {
    const std::int64_t start = std::int64_t(masked.block) * unit_;
    const int count = int(std::min<std::int64_t>(unit_, call_.step.past + last_ - start));
    int active = 0;
    for (std::uint32_t bits = masked.rows; bits; bits &= bits - 1) active += group_;
    float *keys = nullptr, *values = nullptr;
    if (active > call_.cache.direct_keys) {
        keys = scratch().keys.data();
        call_.cache.pack_keys(call_.keys(kv_head_, start), count, size_, keys, ahead);
    }
    if (active > kDirectValues) {
        values = scratch().values.data();
        call_.cache.pack_values(call_.values(kv_head_, start), count, size_, values);
    }
    const int rows = int(last_ - first_);
    for (int from = 0; from < rows;) {
        if (!(masked.rows >> from & 1)) {
            ++from;
            continue;
        }
        int to = from + 1;
        while (to < rows && (masked.rows >> to & 1)) ++to;
        attend_rows(masked, from, to, keys, values, sums, ahead);
        from = to;
    }
}

Ahead Tile::memory_of(const MaskedBlock& masked) const {
    const std::int64_t start = std::int64_t(masked.block) * unit_;
    const std::int64_t rows = std::min<std::int64_t>(unit_, call_.step.past + last_ - start);
    const CacheRows keys = call_.keys(kv_head_, start), values = call_.values(kv_head_, start);
    Ahead ahead;
    ahead.add(keys.data, rows * size_ * call_.element_bytes());
    if (keys.scales) ahead.add(keys.scales, rows * key_scales(size_) * 2);
    ahead.add(values.data, rows * size_ * call_.element_bytes());
    if (values.scales) ahead.add(values.scales, rows * 2);
    return ahead;
}

void Tile::run(const BlockLists& lists, std::int64_t split, std::int64_t splits, const Sums& sums) {
    Scratch& own = scratch();
    const std::size_t rows = std::size_t(queries()), padded = std::size_t(round_up(unit_, kKeyPanel));
    load_queries(call_, kv_head_, first_, last_, own.queries.at_least(rows * size_));
    own.scores.at_least(rows * padded);
    own.keys.at_least(padded * size_);
    own.values.at_least(padded * size_);
    own.rescale.at_least(rows);
    std::fill_n(sums.top, rows, kNone);
    std::fill_n(sums.total, rows, 0.0f);
    std::fill_n(sums.values, rows * size_, 0.0f);
    last_ - first_ == 1 ? list_blocks(lists) : unite_blocks(lists);
    const std::int64_t count = std::int64_t(own.blocks.size());
    const std::int64_t last = count * (split + 1) / splits;
    for (std::int64_t i = count * split / splits; i < last; ++i) {
        Ahead ahead;
        if (i + 1 < last) ahead = memory_of(own.blocks[std::size_t(i + 1)]);
        attend_block(own.blocks[std::size_t(i)], sums, ahead);
    }
}

void Tile::write(const Sums& sums) const {
    for (int q = 0; q < queries(); ++q) {
        const std::int64_t head = (first_ + q / group_) * spec_.num_heads + kv_head_ * group_ + q % group_;
        float* out = call_.step.output + head * size_;
        const float* values = sums.values + std::int64_t(q) * size_;
        const float factor = 1.0f / sums.total[q];
        for (int d = 0; d < size_; ++d) out[d] = values[d] * factor;
    }
}

// All splits of a tile into the first one's sums.
void merge(float* parts, std::int64_t stride, std::int64_t splits, int queries, int size) {
    const Sums first(parts, queries);
    for (int q = 0; q < queries; ++q) {
        float top = kNone;
        for (std::int64_t s = 0; s < splits; ++s) top = std::max(top, parts[s * stride + q]);
        float total = 0.0f;
        float* sum = first.values + std::int64_t(q) * size;
        for (std::int64_t s = 0; s < splits; ++s) {
            const Sums part(parts + s * stride, queries);
            const float weight = std::exp2(part.top[q] - top);
            const float* values = part.values + std::int64_t(q) * size;
            total += weight * part.total[q];
            if (s == 0)
                for (int d = 0; d < size; ++d) sum[d] *= weight;
            else
                for (int d = 0; d < size; ++d) sum[d] += weight * values[d];
        }
        first.total[q] = total;
    }
}

}  // namespace

void attend(const AttentionCall& call, const BlockLists& lists) {
    const Plan plan = make_plan(call);
    const int size = call.spec.head_size, kv_heads = call.spec.kv_heads;
    const std::int64_t queries = plan.tile_rows * call.spec.group(), stride = queries * (size + 2);
    const std::int64_t tiles = plan.tiles * kv_heads;
    // The last tile sees most keys: it goes first, so that no thread ends long after the others.
    const auto tile_of = [&](std::int64_t i) {
        return Tile(call, plan, int(i % kv_heads), (plan.tiles - 1 - i / kv_heads) * plan.tile_rows);
    };
    if (plan.splits == 1) {
        call.run(std::size_t(tiles), plan.serial, [&](std::size_t i) {
            thread_local FloatBuffer own;
            Tile tile = tile_of(std::int64_t(i));
            const Sums sums(own.at_least(std::size_t(stride)), tile.queries());
            tile.run(lists, 0, 1, sums);
            tile.write(sums);
        });
        return;
    }
    thread_local FloatBuffer shared;
    float* const parts = shared.at_least(std::size_t(tiles * plan.splits * stride));
    call.run(std::size_t(tiles * plan.splits), plan.serial, [&](std::size_t task) {
        Tile tile = tile_of(std::int64_t(task) / plan.splits);
        const Sums sums(parts + std::int64_t(task) * stride, tile.queries());
        tile.run(lists, std::int64_t(task) % plan.splits, plan.splits, sums);
    });
    call.run(std::size_t(tiles), plan.serial, [&](std::size_t i) {
        const Tile tile = tile_of(std::int64_t(i));
        float* const first = parts + std::int64_t(i) * plan.splits * stride;
        merge(first, stride, plan.splits, tile.queries(), size);
        tile.write(Sums(first, tile.queries()));
    });
}

}  // namespace cpm
