#include "kernels/probe.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace cpm {
namespace {

constexpr std::int64_t kPiece = 1 << 20;

std::uint64_t read_scalar(const std::uint8_t* data, std::int64_t bytes) {
    std::uint64_t sum = 0, word;
    for (std::int64_t i = 0; i + 8 <= bytes; i += 8) {
        std::memcpy(&word, data + i, 8);
        sum += word;
    }
    return sum;
}

std::int64_t multiply_add_scalar(std::int64_t rounds, float* sink) {
    float sums[8] = {};
    for (std::int64_t i = 0; i < rounds; ++i)
        for (float& sum : sums) sum = std::fma(sum, 0.5f, 1.0f);
    for (float sum : sums) *sink += sum;
    return rounds * 8;
}

const ProbeKernels& kernels(Isa isa) {
#if defined(CPM_X86)
    if (isa != Isa::scalar) return kProbeAvx2;
#else
    (void)isa;
#endif
    return kProbeScalar;
}

}  // namespace

std::uint64_t read_all(ThreadPool& pool, Isa isa, const std::uint8_t* data, std::int64_t bytes) {
    std::atomic<std::uint64_t> total{0};
    pool.run(std::size_t((bytes + kPiece - 1) / kPiece), [&](std::size_t piece, int) {
        const std::int64_t start = std::int64_t(piece) * kPiece;
        total += kernels(isa).read(data + start, std::min(kPiece, bytes - start));
    });
    return total;
}

std::int64_t multiply_add(ThreadPool& pool, Isa isa, std::int64_t rounds, float* sink) {
    std::atomic<std::int64_t> total{0};
    pool.run(std::size_t(pool.threads()), [&](std::size_t task, int) {
        total += kernels(isa).multiply_add(rounds, sink + task);
    });
    return total;
}

const ProbeKernels kProbeScalar = {read_scalar, multiply_add_scalar};

}  // namespace cpm
