#include "kernels/sparse_attention.h"

#include <algorithm>

#include "kernels/sparse_attention_parts.h"

namespace cpm {
namespace {

constexpr std::int64_t kSerialAppend = 32;  // rows times kv heads below which one thread appends them all

void append(const AttentionCall& call, int kv_head) {
    const AttentionStep& step = call.step;
    const int size = call.spec.head_size;
    for (std::int64_t t = 0; t < step.rows; ++t) {
        float rotated[kMaxHeadSize];
        rotate(call, step.key + t * step.key_stride + kv_head * size, t, 1.0f, rotated);
        call.cache.store_key(rotated, size, call.keys(kv_head, step.past + t));
        const float* value = step.value + t * step.value_stride + kv_head * size;
        call.cache.store_value(value, size, call.values(kv_head, step.past + t));
    }
    if (!step.pooled_cache) return;
    // Only the windows that the new rows completed.
    const std::int64_t last = call.spec.windows(call.length());
    for (std::int64_t j = call.spec.windows(step.past); j < last; ++j)
        call.cache.mean(call.keys(kv_head, j * call.spec.kernel_stride), call.spec.kernel_size, size,
                          const_cast<float*>(call.pooled(kv_head, j)));
}

void report(const AttentionCall& call, const BlockLists& lists) {
    const std::int64_t per_row = std::int64_t(call.spec.kv_heads) * lists.budget;
    std::int32_t* sparse = call.step.selected + lists.first_row * per_row;
    std::fill(call.step.selected, sparse, -1);
    std::copy_n(lists.blocks.data(), (call.step.rows - lists.first_row) * per_row, sparse);
}

}  // namespace

void rotate(const AttentionCall& call, const float* in, std::int64_t row, float factor, float* out) {
    const int size = call.spec.head_size, half = size / 2;
    if (!call.step.cosine) {
        for (int i = 0; i < size; ++i) out[i] = in[i] * factor;
        return;
    }
    const float *cosine = call.step.cosine + row * half, *sine = call.step.sine + row * half;
    for (int i = 0; i < half; ++i) {
        out[i] = (in[i] * cosine[i] - in[i + half] * sine[i]) * factor;
        out[i + half] = (in[i + half] * cosine[i] + in[i] * sine[i]) * factor;
    }
}

void load_queries(const AttentionCall& call, int kv_head, std::int64_t first, std::int64_t last, float* out) {
    const int size = call.spec.head_size, group = call.spec.group();
    for (std::int64_t t = first; t < last; ++t)
        for (int g = 0; g < group; ++g, out += size) {
            const float* query = call.step.query + t * call.step.query_stride + (kv_head * group + g) * size;
            rotate(call, query, t, call.spec.scale * kLog2E, out);
        }
}

void sparse_attention(ThreadPool& pool, Isa isa, const AttentionSpec& spec, const AttentionStep& step) {
    if (step.rows == 0) return;
    const AttentionCall call{pool, attention_kernels(isa), spec, step};
    call.run(std::size_t(spec.kv_heads), step.rows * spec.kv_heads < kSerialAppend,
             [&call](std::size_t kv_head) { append(call, int(kv_head)); });

    thread_local BlockLists lists;
    const std::int64_t dense_rows = spec.topk ? std::max<std::int64_t>(spec.dense_len - 1 - step.past, 0) : step.rows;
    lists.first_row = std::min(dense_rows, step.rows);
    lists.kv_heads = spec.kv_heads;
    lists.budget = spec.topk ? spec.budget() : 0;
    lists.blocks.resize(std::size_t((step.rows - lists.first_row) * spec.kv_heads * lists.budget));
    if (lists.first_row < step.rows) select_blocks(call, lists);
    if (step.selected && spec.topk) report(call, lists);
    attend(call, lists);
}

const AttentionKernels& attention_kernels(Isa isa) {
#if defined(CPM_X86)
    if (isa != Isa::scalar) return kAttentionAvx2;
#else
    (void)isa;
#endif
    return kAttentionScalar;
}

}  // namespace cpm
