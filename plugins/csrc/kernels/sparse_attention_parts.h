// What the stages of one SparseAttention call share.
#pragma once

#include <cstddef>
#include <functional>
#include <new>
#include <vector>

#include "kernels/sparse_attention.h"

namespace cpm {

// Floats at a cache line's boundary, kept from call to call and only ever grown. Contents do not survive growth.
class FloatBuffer {
public:
    FloatBuffer() = default;
    ~FloatBuffer() { release(); }
    FloatBuffer(const FloatBuffer&) = delete;
    FloatBuffer& operator=(const FloatBuffer&) = delete;

    float* at_least(std::size_t count) {
        if (count > size_) {
            release();
            data_ = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
            size_ = count;
        }
        return data_;
    }

    float* data() const { return data_; }

private:
    static constexpr std::align_val_t kAlignment{64};
    void release() {
        if (data_) ::operator delete(data_, kAlignment);
        data_ = nullptr;
        size_ = 0;
    }
    float* data_ = nullptr;
    std::size_t size_ = 0;
};

struct AttentionCall {
    ThreadPool& pool;
    const AttentionKernels& kernels;
    const AttentionSpec& spec;
    const AttentionStep& step;
    const CacheKernels& cache = kernels.of(step.type);

    std::int64_t length() const { return step.past + step.rows; }
    // Rows from `row` on.
    CacheRows keys(int kv_head, std::int64_t row) const {
        return rows_of(step.key_cache, key_scales(spec.head_size), kv_head, row);
    }
    CacheRows values(int kv_head, std::int64_t row) const { return rows_of(step.value_cache, 1, kv_head, row); }
    std::int64_t element_bytes() const { return step.type == CacheType::int8 ? 1 : 2; }
    const float* pooled(int kv_head, std::int64_t window) const {
        return step.pooled_cache + (kv_head * (step.capacity / spec.kernel_stride) + window) * spec.head_size;
    }

    // Runs body(task) for every task; `serial` where waking the pool would cost more than it saves.
    template <typename Body>
    void run(std::size_t tasks, bool serial, const Body& body) const {
        if (serial) {
            for (std::size_t task = 0; task < tasks; ++task) body(task);
            return;
        }
        const auto of_task = [&body](std::size_t task, int) { body(task); };
        pool.run(tasks, std::ref(of_task));  // by reference: nothing is allocated
    }

private:
    CacheRows rows_of(const CacheRows& cache, int scales, int kv_head, std::int64_t row) const {
        const std::int64_t index = kv_head * step.capacity + row;
        char* const data = static_cast<char*>(cache.data) + index * spec.head_size * element_bytes();
        return {data, cache.scales ? cache.scales + index * scales : nullptr};
    }
};

// Chosen blocks of the sparse rows, which are the last ones of a call: ascending, then -1 up to the budget.
struct BlockLists {
    std::int64_t first_row = 0;
    int kv_heads = 0, budget = 0;
    std::vector<std::int32_t> blocks;  // (rows - first_row, kv_heads, budget)

    std::int32_t* of(std::int64_t row, int kv_head) {
        return blocks.data() + ((row - first_row) * kv_heads + kv_head) * budget;
    }
    const std::int32_t* of(std::int64_t row, int kv_head) const {
        return blocks.data() + ((row - first_row) * kv_heads + kv_head) * budget;
    }
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

constexpr float kLog2E = 1.44269504f;

// out (size) = factor * in, turned by the angles of row `row` if the step has any.
void rotate(const AttentionCall& call, const float* in, std::int64_t row, float factor, float* out);

// out ((last - first) * group, size): the queries of rows [first, last) on one kv head, rotated, in units of ln 2.
void load_queries(const AttentionCall& call, int kv_head, std::int64_t first, std::int64_t last, float* out);

// Fills `lists` for every sparse row. The new keys are in the cache already.
void select_blocks(const AttentionCall& call, BlockLists& lists);

// The outputs of all rows.
void attend(const AttentionCall& call, const BlockLists& lists);

}  // namespace cpm
