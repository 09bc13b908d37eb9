#include "kernels/mixture_of_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace cpm {
namespace {

constexpr std::int64_t kSerialRows = 4;  // rows that are routed sooner than other threads wake up
constexpr int kLanes = 8;

// Sums of their own for every lane, which compilers turn into vectors; the order is the same on every machine.
float dot(const float* a, const float* b, std::int64_t n) {
    float sums[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    double total = 0.0;
    for (float sum : sums) total += sum;
    for (; i < n; ++i) total += double(a[i]) * b[i];
    return float(total);
}

struct Memory {
    std::vector<std::int64_t> chosen;
    std::vector<float> logits, shares, rows, inner, outer;
    std::vector<std::int64_t> mine;
    std::vector<float> mine_shares;
};

void route(ThreadPool& pool, const Experts& e, const float* x, std::int64_t m, Memory& memory) {
    memory.logits.resize(std::size_t(m * e.count));
    memory.chosen.resize(std::size_t(m * e.top_k));
    memory.shares.resize(std::size_t(m * e.top_k));
    float* logits = memory.logits.data();  // the tasks below run in other threads, which have other memory
    std::int64_t* chosen = memory.chosen.data();
    float* shares = memory.shares.data();
    const std::int64_t hidden = e.inner.cols;
    auto row = [&](std::size_t task, int) {
        const auto i = std::int64_t(task);
        float* own = logits + i * e.count;
        for (std::int64_t j = 0; j < e.count; ++j) own[j] = dot(x + i * hidden, e.router + j * hidden, hidden);
        choose_experts(own, e.count, e.top_k, chosen + i * e.top_k, shares + i * e.top_k);
    };
    if (m < kSerialRows)
        for (std::int64_t i = 0; i < m; ++i) row(std::size_t(i), 0);
    else
        pool.run(std::size_t(m), row);
}

// The rows that chose an expert, and the shares it has of them.
void collect(const Memory& memory, std::int64_t m, std::int64_t top_k, std::int64_t expert, Memory& out) {
    out.mine.clear();
    out.mine_shares.clear();
    for (std::int64_t i = 0; i < m * top_k; ++i)
        if (memory.chosen[std::size_t(i)] == expert) {
            out.mine.push_back(i / top_k);
            out.mine_shares.push_back(memory.shares[std::size_t(i)]);
        }
}

const float* gather(const Memory& memory, const float* x, std::int64_t m, std::int64_t hidden, std::vector<float>& out) {
    const std::size_t count = memory.mine.size();
    if (count == std::size_t(m)) return x;
    out.resize(count * std::size_t(hidden));
    for (std::size_t i = 0; i < count; ++i)
        std::memcpy(out.data() + i * std::size_t(hidden), x + memory.mine[i] * hidden, std::size_t(hidden) * 4);
    return out.data();
}

}  // namespace

void choose_experts(const float* logits, std::int64_t count, std::int64_t top_k, std::int64_t* chosen, float* shares) {
    for (std::int64_t k = 0; k < top_k; ++k) {
        std::int64_t best = -1;
        for (std::int64_t e = 0; e < count; ++e) {
            if (std::find(chosen, chosen + k, e) != chosen + k) continue;
            if (best < 0 || logits[e] > logits[best]) best = e;
        }
        chosen[k] = best;
    }
    double total = 0.0;
    for (std::int64_t k = 0; k < top_k; ++k) total += std::exp(double(logits[chosen[k]]) - logits[chosen[0]]);
    for (std::int64_t k = 0; k < top_k; ++k)
        shares[k] = float(std::exp(double(logits[chosen[k]]) - logits[chosen[0]]) / total);
}

void mixture_of_experts(ThreadPool& pool, Isa isa, const Experts& e, const float* x, std::int64_t m,
                        const float* residual, float scale, float* y) {
    thread_local Memory memory;
    const std::int64_t hidden = e.inner.cols, wide = e.inner.rows;
    route(pool, e, x, m, memory);
    if (y != residual) std::memcpy(y, residual, std::size_t(m * hidden) * sizeof(float));
    Epilogue gated;
    gated.kind = Epilogue::Kind::silu_mul;
    for (std::int64_t expert = 0; expert < e.count; ++expert) {
        collect(memory, m, e.top_k, expert, memory);
        const auto rows = std::int64_t(memory.mine.size());
        if (rows == 0) continue;
        const NBitsWeight w1{e.inner, e.w1 + expert * e.inner.bytes()}, w3{e.inner, e.w3 + expert * e.inner.bytes()};
        const NBitsWeight w2{e.outer, e.w2 + expert * e.outer.bytes()};
        memory.inner.resize(std::size_t(rows * wide));
        memory.outer.resize(std::size_t(rows * hidden));
        const float* own = gather(memory, x, m, hidden, memory.rows);
        matmul_nbits(pool, isa, w1, &w3, own, rows, memory.inner.data(), gated);
        matmul_nbits(pool, isa, w2, nullptr, memory.inner.data(), rows, memory.outer.data(), Epilogue{});
        for (std::int64_t i = 0; i < rows; ++i) {
            float* target = y + memory.mine[std::size_t(i)] * hidden;
            const float* result = memory.outer.data() + i * hidden;
            const float share = scale * memory.mine_shares[std::size_t(i)];
            for (std::int64_t j = 0; j < hidden; ++j) target[j] += share * result[j];
        }
    }
}

}  // namespace cpm
