// Many new rows: one task a head. A block of cached rows becomes keys and values of the head, in the panels that the
// attention kernels read, and all new rows meet it before the next one.
#include <cstring>

#include "kernels/latent_attention_parts.h"

namespace cpm {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

class Head {
public:
    Head(const LatentCall& call, int head) : call_(call), spec_(call.spec), head_(head) {}

    void run();

private:
    struct Scratch {
        FloatBuffer up_key, up_value, rows, keys, values, queries, scores, sums, top, total, rescale;
    };

    static Scratch& scratch() {
        thread_local Scratch own;
        return own;
    }
    void load_weights();
    void load_queries();
    void expand(std::int64_t block, bool fetch_next);
    void attend(std::int64_t block);
    void write() const;

    const LatentCall& call_;
    const LatentSpec& spec_;
    const int head_;
};

// W_k as rows, W_v as panels (rank, 16).
void Head::load_weights() {
    Scratch& own = scratch();
    const UpProjection key = call_.up(head_), value = call_.up_value(head_);
    float* const up_key = own.up_key.at_least(std::size_t(spec_.nope) * spec_.rank);
    call_.latent.dequantize(key.codes, key.scales, spec_.nope, spec_.rank, spec_.groups, up_key);
    float* const rows = own.rows.at_least(std::size_t(std::max(spec_.value, kLatentBlock)) * spec_.rank);
    call_.latent.dequantize(value.codes, value.scales, spec_.value, spec_.rank, spec_.groups, rows);
    float* const up_value = own.up_value.at_least(std::size_t(spec_.value) * spec_.rank);
    call_.kernels.pack_pooled(rows, spec_.value, spec_.rank, up_value);
}

// Rotated, in units of ln 2.
void Head::load_queries() {
    const float factor = spec_.scale * kLog2E;
    float* out = scratch().queries.at_least(std::size_t(call_.step.rows) * spec_.query_size());
    for (std::int64_t t = 0; t < call_.step.rows; ++t, out += spec_.query_size()) {
        const float* query = call_.step.query + t * call_.step.query_stride + head_ * spec_.query_size();
        for (int i = 0; i < spec_.nope; ++i) out[i] = query[i] * factor;
        turn(call_, query + spec_.nope, t, factor, out + spec_.nope);
    }
}

// Keys as panels (nope + rope, 16), values as panels (count, 16).
void Head::expand(std::int64_t block, bool fetch_next) {
    Scratch& own = scratch();
    const int count = call_.count(block), width = spec_.width(), size = spec_.query_size();
    const float* latents = pack_block(call_, block, fetch_next);
    float* keys = own.keys.at_least(std::size_t(kLatentBlock) * size);
    Ahead none;
    for (int first = 0; first < count; first += kKeyPanel, latents += kKeyPanel * width, keys += kKeyPanel * size) {
        call_.kernels.scores(own.up_key.data(), spec_.nope, spec_.rank, latents, 1, keys, kKeyPanel, none);
        std::memcpy(keys + spec_.nope * kKeyPanel, latents + spec_.rank * kKeyPanel,
                    std::size_t(spec_.rope) * kKeyPanel * sizeof(float));
    }
    const std::uint16_t* cached = call_.cached(block * kLatentBlock);
    for (int i = 0; i < count; ++i)
        call_.latent.widen(cached + std::int64_t(i) * width, spec_.rank, own.rows.data() + std::int64_t(i) * spec_.rank);
    float* values = own.values.at_least(std::size_t(kLatentBlock) * spec_.value);
    const float* up_value = own.up_value.data();
    for (int first = 0; first < spec_.value; first += kValuePanel) {
        call_.kernels.scores(own.rows.data(), count, spec_.rank, up_value, 1, values, kValuePanel, none);
        values += count * kValuePanel;
        up_value += kKeyPanel * spec_.rank;
    }
}

// The rows that see the block.
void Head::attend(std::int64_t block) {
    Scratch& own = scratch();
    const std::int64_t rows = call_.step.rows, before = block * kLatentBlock - call_.step.past;
    const std::int64_t first = std::max<std::int64_t>(before, 0);
    const int count = call_.count(block), padded = int(round_up(count, 8)), seeing = int(rows - first);
    float* const scores = own.scores.data();
    Ahead none;
    call_.kernels.scores(own.queries.data() + first * spec_.query_size(), seeing, spec_.query_size(), own.keys.data(),
                         int(ceil_div(count, kKeyPanel)), scores, kLatentBlock, none);
    // From row `whole` on all keys are visible.
    const std::int64_t whole = std::clamp<std::int64_t>(before + count - 1, first, rows);
    const auto soften = [&](std::int64_t t, std::int64_t n, int visible) {
        call_.kernels.softmax(scores + (t - first) * kLatentBlock, int(n), kLatentBlock, visible, padded,
                              own.top.data() + t, own.total.data() + t, own.rescale.data() + t, none);
    };
    for (std::int64_t t = first; t < whole; ++t) soften(t, 1, int(t + 1 - before));
    if (whole < rows) soften(whole, rows - whole, count);
    call_.kernels.accumulate(scores, seeing, kLatentBlock, count, own.values.data(), spec_.value,
                             own.rescale.data() + first, own.sums.data() + first * spec_.value);
}

void Head::write() const {
    const Scratch& own = scratch();
    for (std::int64_t t = 0; t < call_.step.rows; ++t) {
        const float* sums = own.sums.data() + t * spec_.value;
        float* out = call_.step.output + (t * spec_.num_heads + head_) * spec_.value;
        const float factor = 1.0f / own.total.data()[t];
        for (int i = 0; i < spec_.value; ++i) out[i] = sums[i] * factor;
    }
}

void Head::run() {
    Scratch& own = scratch();
    const std::size_t rows = std::size_t(call_.step.rows);
    load_weights();
    load_queries();
    own.scores.at_least(rows * kLatentBlock);
    own.rescale.at_least(rows);
    std::fill_n(own.top.at_least(rows), rows, kNone);
    std::fill_n(own.total.at_least(rows), rows, 0.0f);
    std::fill_n(own.sums.at_least(rows * std::size_t(spec_.value)), rows * std::size_t(spec_.value), 0.0f);
    for (std::int64_t block = 0; block < call_.blocks(); ++block) {
        expand(block, block + 1 < call_.blocks());
        attend(block);
    }
    write();
}

}  // namespace

void attend_expanded(const LatentCall& call) {
    call.run(std::size_t(call.spec.num_heads), kSerialLatentWork,
             [&](std::size_t head) { Head(call, int(head)).run(); });
}

}  // namespace cpm
