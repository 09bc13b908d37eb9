#include "kernels/linear_attention.h"

#include <algorithm>
#include <cmath>

namespace cpm {
namespace {

constexpr double kSmallestPower = 1e-30;
constexpr std::int64_t kSliceColumns = 16;  // slices begin at multiples of it: a cache line
constexpr std::int64_t kTasksPerThread = 2;  // aimed at when a head is cut, to even out the threads

// Pieces that a head's value columns are cut into: 1 when there are heads enough for all threads.
std::int64_t pieces_per_head(const LinearAttentionShape& s, int threads) {
    const std::int64_t heads = s.batch * s.heads, most = (s.value_size + kSliceColumns - 1) / kSliceColumns;
    if (threads == 1 || heads >= kTasksPerThread * threads) return 1;
    return std::min(most, (kTasksPerThread * threads + heads - 1) / heads);
}

LinearSlice slice_of(const LinearAttentionCall& call, std::int64_t batch, std::int64_t head, std::int64_t first,
                     std::int64_t columns) {
    const LinearAttentionShape& s = call.shape;
    LinearSlice slice;
    slice.rows = s.rows;
    slice.size = s.size;
    slice.columns = columns;
    slice.query_stride = s.query_stride;
    slice.key_stride = s.key_stride;
    slice.value_stride = s.value_stride;
    slice.state_stride = s.value_size;
    slice.output_stride = s.heads * s.value_size;
    slice.query = call.query + batch * s.rows * s.query_stride + head * s.size;
    slice.key = call.key + batch * s.rows * s.key_stride + head * s.size;
    slice.value = call.value + batch * s.rows * s.value_stride + head * s.value_size + first;
    slice.state = call.state + (batch * s.heads + head) * s.size * s.value_size + first;
    slice.output = call.output + batch * s.rows * slice.output_stride + head * s.value_size + first;
    slice.decay = call.decay[head];
    slice.scale = call.scale;
    return slice;
}

}  // namespace

DecayPowers::DecayPowers(float decay) {
    const auto power = [decay](int k) {
        const double value = std::exp(double(decay) * k);
        return value < kSmallestPower ? 0.0f : float(value);
    };
    for (int k = 0; k < kLinearChunk; ++k) falling_[kLinearChunk - 1 - k] = power(k);
    whole_ = power(kLinearChunk);
}

const LinearAttentionKernels& linear_attention_kernels(Isa isa) {
#if defined(CPM_X86)
    // Wider instruction sets add integer dot products, which floats do not need.
    if (isa != Isa::scalar) return kLinearAttentionAvx2;
#else
    (void)isa;
#endif
    return kLinearAttentionScalar;
}

void linear_attention(ThreadPool& pool, Isa isa, const LinearAttentionCall& call) {
    const LinearAttentionShape& s = call.shape;
    if (s.rows == 0) return;
    const LinearAttentionKernels& kernels = linear_attention_kernels(isa);
    const auto run = s.rows == 1 ? kernels.step : kernels.chunks;
    const std::int64_t lines = (s.value_size + kSliceColumns - 1) / kSliceColumns;
    const std::int64_t pieces = pieces_per_head(s, pool.threads());
    pool.run(std::size_t(s.batch * s.heads * pieces), [&](std::size_t task, int) {
        const std::int64_t piece = std::int64_t(task) % pieces, head = std::int64_t(task) / pieces;
        const std::int64_t first = piece * lines / pieces * kSliceColumns;
        const std::int64_t last = std::min(s.value_size, (piece + 1) * lines / pieces * kSliceColumns);
        run(slice_of(call, head / s.heads, head % s.heads, first, last - first));
    });
}

}  // namespace cpm
