#include "kernels/matmul_nbits.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace cpm {
namespace {

constexpr std::int64_t kTileRows = 48;           // activation rows whose codes stay in the second-level cache
static_assert(kTileRows % kMaxTileRows == 0, "a task of rows begins with a tile");
constexpr std::int64_t kTaskBytes = 24 << 10;    // of weights: long enough to hide handing out the task
constexpr std::int64_t kSerialQuantize = 4;      // rows below which waking the pool costs more than it saves

std::uint8_t code_at(const NBitsShape& s, const std::uint8_t* codes, std::int64_t row, std::int64_t col, int flip) {
    if (row >= s.rows || col >= s.cols) return std::uint8_t(s.zero());
    const std::int64_t per_byte = 8 / s.bits, stride = (s.cols + per_byte - 1) / per_byte;
    const int byte = codes[row * stride + col / per_byte];
    const int mask = (1 << s.bits) - 1;
    return std::uint8_t(((byte >> (s.bits * int(col % per_byte))) & mask) ^ flip);
}

// 32 columns of 8 rows.
void pack_block(const NBitsShape& s, const std::uint8_t* codes, std::int64_t row, std::int64_t col, int flip,
                std::uint8_t* out) {
    const int steps = 8 / s.bits;  // quads of columns that share a vector
    std::memset(out, 0, std::size_t(kPanelRows * kBlock * s.bits / 8));
    for (int quad = 0; quad < kBlock / 4; ++quad)
        for (int r = 0; r < kPanelRows; ++r)
            for (int i = 0; i < 4; ++i) {
                const int code = code_at(s, codes, row + r, col + 4 * quad + i, flip);
                out[quad / steps * 32 + 4 * r + i] |= std::uint8_t(code << (s.bits * (quad % steps)));
            }
}

struct Scratch {
    std::vector<std::int8_t> codes;
    std::vector<float> scales;
    std::vector<std::int32_t> offsets;
};

Activations quantize_rows(ThreadPool& pool, const NBitsKernels& kernels, const NBitsShape& shape, const float* x,
                          std::int64_t m, Scratch& scratch) {
    const int block = shape.block();
    const std::int64_t blocks = shape.padded_cols() / block;
    scratch.codes.resize(std::size_t(m * blocks * block));
    scratch.scales.resize(std::size_t(m * blocks));
    scratch.offsets.resize(std::size_t(m * blocks));
    auto row = [&](std::size_t task, int) {
        const auto i = std::int64_t(task), first = i / kMaxTileRows * kMaxTileRows;
        const std::int64_t at = first * blocks + i - first;
        kernels.quantize(shape, x + i * shape.cols, int(std::min<std::int64_t>(kMaxTileRows, m - first)),
                         scratch.codes.data() + at * block, scratch.scales.data() + at, scratch.offsets.data() + at);
    };
    if (m < kSerialQuantize)
        for (std::int64_t i = 0; i < m; ++i) row(std::size_t(i), 0);
    else
        pool.run(std::size_t(m), row);
    return {scratch.codes.data(), scratch.scales.data(), scratch.offsets.data(), blocks, block};
}

NBitsKernels::PairDot pair_dot(const NBitsKernels& kernels, const NBitsShape& shape) {
    if (shape.bits == 2 && shape.block() == kWideBlock) return kernels.pair2;
    return shape.bits == 4 && shape.symmetric ? kernels.pair4 : nullptr;
}

// `count` results from place `at` of y on.
void finish(const Epilogue& epilogue, std::int64_t at, std::int64_t count, const float* result, float* y) {
    if (epilogue.kind == Epilogue::Kind::add)
        for (std::int64_t i = 0; i < count; ++i) y[at + i] = epilogue.residual[at + i] + epilogue.scale * result[i];
    else
        std::memcpy(y + at, result, std::size_t(count) * sizeof(float));
}

// Panels [begin, end) times one row, two at a time: neighbours, or those of gate and up.
void panel_pairs(const NBitsKernels& kernels, NBitsKernels::PairDot pair, const NBitsWeight& weight,
                 const NBitsWeight* up, const Activations& row, std::int64_t begin, std::int64_t end, float* y, const Epilogue& epilogue) {
    const NBitsShape& shape = weight.shape;
    const bool gated = epilogue.kind == Epilogue::Kind::silu_mul;
    float out[2 * kPanelRows];
    for (std::int64_t panel = begin; panel < end; panel += gated ? 1 : 2) {
        const std::uint8_t* first = weight.panels + panel * shape.panel_bytes();
        const std::int64_t start = panel * kPanelRows, rows = gated || panel + 1 == end ? kPanelRows : 2 * kPanelRows;
        if (gated)
            pair(shape, first, up->panels + panel * shape.panel_bytes(), row, out);
        else if (rows > kPanelRows)
            pair(shape, first, first + shape.panel_bytes(), row, out);
        else
            panel_dots(kernels, shape)[0](shape, first, row, out);
        if (gated) kernels.silu_mul(out, out + kPanelRows, kPanelRows);
        finish(epilogue, start, std::min(rows, shape.rows - start), out, y);
    }
}

}  // namespace

void pack_nbits(const NBitsShape& s, const std::uint8_t* codes, const std::uint16_t* scales,
                const std::uint8_t* zeros, int flip, std::uint8_t* panels) {
    const std::int64_t groups = s.groups(), group_cols = s.group_cols();
    const std::int64_t block_bytes = kPanelRows * kBlock * s.bits / 8;
    for (std::int64_t panel = 0; panel < s.panels(); ++panel) {
        std::uint8_t* out = panels + panel * s.panel_bytes();
        for (std::int64_t g = 0; g < groups; ++g) {
            for (int r = 0; r < kPanelRows; ++r) {
                const std::int64_t row = panel * kPanelRows + r;
                const std::uint16_t scale = row < s.rows ? scales[row * groups + g] : std::uint16_t(0);
                std::memcpy(out + 2 * r, &scale, 2);
            }
            out += 2 * kPanelRows;
            if (!s.symmetric) {
                for (int r = 0; r < kPanelRows; ++r) {
                    const std::int64_t row = panel * kPanelRows + r;
                    out[r] = row < s.rows ? zeros[row * groups + g] : std::uint8_t(s.zero());
                }
                out += kPanelRows;
            }
            for (std::int64_t col = g * group_cols; col < (g + 1) * group_cols; col += kBlock, out += block_bytes)
                pack_block(s, codes, panel * kPanelRows, col, flip, out);
        }
    }
}

const NBitsKernels::PanelDot* panel_dots(const NBitsKernels& kernels, const NBitsShape& shape) {
    if (shape.bits == 2) return kernels.dot2;
    if (shape.bits == 8) return kernels.dot8;
    return shape.symmetric ? kernels.dot4 : kernels.dot4_zeros;
}

const NBitsKernels& nbits_kernels(Isa isa) {
#if defined(CPM_X86)
    switch (isa) {
        case Isa::avx512vnni: return kNBitsAvx512Vnni;
        case Isa::avxvnni: return kNBitsAvxVnni;
        case Isa::avx2: return kNBitsAvx2;
        case Isa::scalar: break;
    }
#else
    (void)isa;
#endif
    return kNBitsScalar;
}

void matmul_nbits(ThreadPool& pool, Isa isa, const NBitsWeight& weight, const NBitsWeight* up, const float* x,
                  std::int64_t m, float* y, const Epilogue& epilogue) {
    const NBitsShape& shape = weight.shape;
    const NBitsKernels& kernels = nbits_kernels(isa);
    thread_local Scratch scratch;
    const Activations acts = quantize_rows(pool, kernels, shape, x, m, scratch);
    const auto* dots = panel_dots(kernels, shape);
    std::int64_t per_task = std::max<std::int64_t>(1, kTaskBytes / shape.panel_bytes());
    const auto pair = m == 1 ? pair_dot(kernels, shape) : nullptr;
    if (pair) per_task += per_task % 2;
    const std::int64_t chunks = (shape.panels() + per_task - 1) / per_task;
    const std::int64_t row_tiles = (m + kTileRows - 1) / kTileRows;

    if (row_tiles == 1) {
        const auto bytes = std::size_t(shape.bytes());
        pool.announce({{{weight.panels, bytes}, {up ? up->panels : nullptr, up ? bytes : 0}}});
    }
    pool.run(std::size_t(chunks * row_tiles), [&](std::size_t task, int) {
        // Neighbouring tasks share the activation rows and walk through the weights.
        const std::int64_t tile = std::int64_t(task) / chunks, chunk = std::int64_t(task) % chunks;
        const std::int64_t last_panel = std::min(shape.panels(), (chunk + 1) * per_task);
        const std::int64_t last_row = std::min(m, (tile + 1) * kTileRows);
        float out[kMaxTileRows * kPanelRows], up_out[kMaxTileRows * kPanelRows];
        if (pair) return panel_pairs(kernels, pair, weight, up, acts, chunk * per_task, last_panel, y, epilogue);
        for (std::int64_t panel = chunk * per_task; panel < last_panel; ++panel) {
            const std::int64_t first = panel * kPanelRows;
            const std::int64_t width = std::min<std::int64_t>(kPanelRows, shape.rows - first);
            for (std::int64_t row = tile * kTileRows; row < last_row;) {
                const int rows = int(std::min<std::int64_t>(kMaxTileRows, last_row - row));
                const std::int64_t offset = panel * shape.panel_bytes();
                dots[rows - 1](shape, weight.panels + offset, acts.from(row), out);
                if (epilogue.kind == Epilogue::Kind::silu_mul) {
                    dots[rows - 1](shape, up->panels + offset, acts.from(row), up_out);
                    kernels.silu_mul(out, up_out, std::int64_t(rows) * kPanelRows);
                }
                for (int r = 0; r < rows; ++r, ++row)
                    finish(epilogue, row * shape.rows + first, width, out + r * kPanelRows, y);
            }
        }
    });
}

}  // namespace cpm
