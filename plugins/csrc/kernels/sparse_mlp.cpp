#include "kernels/sparse_mlp.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace cpm {
namespace {

// Of one step, kept by the thread that runs it; tasks in other threads get pointers.
struct Memory {
    std::vector<float> gate, up, inner;
    std::vector<std::int32_t> neurons, first;
    std::vector<std::int8_t> codes;
    std::vector<float> scales;
    std::vector<std::int32_t> offsets;
    std::vector<std::uint8_t> panels;
};

// One row in int8, as matmul_nbits has it.
Activations quantized(const NBitsKernels& kernels, const NBitsShape& shape, const float* x, Memory& memory) {
    const int block = shape.block();
    const std::int64_t blocks = shape.padded_cols() / block;
    memory.codes.resize(std::size_t(blocks * block));
    memory.scales.resize(std::size_t(blocks));
    memory.offsets.resize(std::size_t(blocks));
    kernels.quantize(shape, x, 1, memory.codes.data(), memory.scales.data(), memory.offsets.data());
    return {memory.codes.data(), memory.scales.data(), memory.offsets.data(), blocks, block};
}

// inner[i] = gate[i] * (W_up x)[i] for the neurons, eight of which are made into a panel at a time.
void active_rows(ThreadPool& pool, Isa isa, const SparseMlp& mlp, const float* x, std::int64_t active, Memory& memory) {
    const NBitsKernels& kernels = nbits_kernels(isa);
    const NBitsShape& shape = mlp.up;
    const Activations acts = quantized(kernels, shape, x, memory);
    const auto dot = panel_dots(kernels, shape)[0];
    const auto gather = sparse_mlp_kernels(isa).gather_panel;
    const std::int32_t* neurons = memory.neurons.data();
    const float* gate = memory.gate.data();
    float* inner = memory.inner.data();
    const std::int64_t size = strip_bytes(shape);
    pool.run(std::size_t((active + kPanelRows - 1) / kPanelRows), [&](std::size_t task, int) {
        thread_local std::vector<std::uint8_t> panel;
        panel.resize(std::size_t(shape.panel_bytes()));
        const std::int64_t start = std::int64_t(task) * kPanelRows, count = std::min(active - start, std::int64_t(kPanelRows));
        const std::uint8_t* rows[kPanelRows];
        for (std::int64_t r = 0; r < kPanelRows; ++r)
            rows[r] = mlp.up_strips + neurons[start + std::min(r, count - 1)] * size;
        gather(shape, rows, panel.data());
        float out[kPanelRows];
        dot(shape, panel.data(), acts, out);
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int32_t neuron = neurons[start + r];
            inner[neuron] = gate[neuron] * out[r];
        }
    });
}

// y = residual + scale * W_down inner; returns the bytes of W_down that were read.
std::int64_t active_columns(ThreadPool& pool, Isa isa, const SparseMlp& mlp, std::int64_t active, const float* residual,
                            float scale, float* y, Memory& memory) {
    const NBitsShape& shape = mlp.down;
    const Activations acts = quantized(nbits_kernels(isa), shape, memory.inner.data(), memory);
    memory.first.resize(std::size_t(acts.blocks + 1));
    std::int32_t at = 0;
    for (std::int64_t block = 0; block <= acts.blocks; ++block) {
        while (at < active && memory.neurons[std::size_t(at)] < block * acts.block) ++at;
        memory.first[std::size_t(block)] = at;
    }
    const ActiveColumns x{memory.neurons.data(), memory.first.data(), acts.codes, acts.scales, acts.offsets};
    const auto dot = sparse_mlp_kernels(isa).slice_dot;
    pool.run(std::size_t(slices(shape)), [&](std::size_t task, int) {
        const std::int64_t start = std::int64_t(task) * kSliceRows;
        float out[kSliceRows];
        dot(shape, mlp.down_slices + std::int64_t(task) * slice_bytes(shape), x, out);
        for (std::int64_t i = 0; i < std::min(kSliceRows, shape.rows - start); ++i)
            y[start + i] = residual[start + i] + scale * out[i];
    });
    const std::int64_t blocks = shape.group_cols() / acts.block;
    std::int64_t groups = 0;
    for (std::int64_t g = 0; g < shape.groups(); ++g) groups += x.first[g * blocks] != x.first[(g + 1) * blocks];
    return slices(shape) * (groups * slice_header_bytes(shape) + active * column_bytes(shape));
}

void single_row(ThreadPool& pool, Isa isa, const SparseMlp& mlp, const float* x, const float* residual, float scale,
                float* y, Memory& memory, Sparsity& count) {
    const std::int64_t wide = mlp.up.rows;
    memory.neurons.resize(std::size_t(wide));
    const std::int64_t active =
        sparse_mlp_kernels(isa).select(memory.gate.data(), wide, mlp.threshold, memory.neurons.data());
    memory.inner.assign(std::size_t(wide), 0.0f);
    active_rows(pool, isa, mlp, x, active, memory);
    count.neurons += wide;
    count.active += active;
    count.bytes += wide * strip_bytes(mlp.up) + slices(mlp.down) * slice_bytes(mlp.down);
    count.read += active * strip_bytes(mlp.up);
    count.read += active_columns(pool, isa, mlp, active, residual, scale, y, memory);
}

const std::uint8_t* up_panels(ThreadPool& pool, Isa isa, const SparseMlp& mlp, std::vector<std::uint8_t>& out) {
    const NBitsShape& shape = mlp.up;
    out.resize(std::size_t(shape.bytes()));
    std::uint8_t* panels = out.data();
    const auto gather = sparse_mlp_kernels(isa).gather_panel;
    const std::int64_t size = strip_bytes(shape);
    pool.run(std::size_t(shape.panels()), [&](std::size_t task, int) {
        const std::int64_t first = std::int64_t(task) * kPanelRows;
        const std::uint8_t* rows[kPanelRows];
        // Rows behind the last one give results that nobody takes.
        for (std::int64_t r = 0; r < kPanelRows; ++r)
            rows[r] = mlp.up_strips + std::min(first + r, shape.rows - 1) * size;
        gather(shape, rows, panels + std::int64_t(task) * shape.panel_bytes());
    });
    return panels;
}

const std::uint8_t* down_panels(ThreadPool& pool, Isa isa, const SparseMlp& mlp, std::vector<std::uint8_t>& out) {
    const NBitsShape& shape = mlp.down;
    const std::int64_t size = kSliceRows / kPanelRows * shape.panel_bytes();
    out.resize(std::size_t(slices(shape) * size));
    std::uint8_t* panels = out.data();
    const auto convert = sparse_mlp_kernels(isa).slice_panels;
    pool.run(std::size_t(slices(shape)), [&](std::size_t task, int) {
        convert(shape, mlp.down_slices + std::int64_t(task) * slice_bytes(shape), panels + std::int64_t(task) * size);
    });
    return panels;
}

void many_rows(ThreadPool& pool, Isa isa, const SparseMlp& mlp, const float* x, std::int64_t m, const float* residual,
               float scale, float* y, Memory& memory) {
    const std::int64_t wide = mlp.up.rows;
    memory.up.resize(std::size_t(m * wide));
    const NBitsWeight up{mlp.up, up_panels(pool, isa, mlp, memory.panels)};
    matmul_nbits(pool, isa, up, nullptr, x, m, memory.up.data(), Epilogue{});
    float* inner = memory.up.data();
    const float* gate = memory.gate.data();
    pool.run(std::size_t(m), [&](std::size_t row, int) {
        for (std::int64_t i = std::int64_t(row) * wide; i < std::int64_t(row + 1) * wide; ++i)
            inner[i] = gate[i] > mlp.threshold ? gate[i] * inner[i] : 0.0f;
    });
    const NBitsWeight down{mlp.down, down_panels(pool, isa, mlp, memory.panels)};
    matmul_nbits(pool, isa, down, nullptr, inner, m, y, {Epilogue::Kind::add, scale, residual});
}

}  // namespace

const SparseMlpKernels& sparse_mlp_kernels(Isa isa) {
#if defined(CPM_X86)
    if (isa != Isa::scalar) return kSparseMlpAvx2;
#else
    (void)isa;
#endif
    return kSparseMlpScalar;
}

void sparse_mlp(ThreadPool& pool, Isa isa, const SparseMlp& mlp, const float* x, std::int64_t m, const float* residual,
                float scale, float* y, Sparsity& count) {
    thread_local Memory memory;
    memory.gate.resize(std::size_t(m * mlp.gate.rows));
    matmul_nbits(pool, isa, {mlp.gate, mlp.gate_panels}, nullptr, x, m, memory.gate.data(), Epilogue{});
    if (m == 1)
        single_row(pool, isa, mlp, x, residual, scale, y, memory, count);
    else
        many_rows(pool, isa, mlp, x, m, residual, scale, y, memory);
}

}  // namespace cpm
