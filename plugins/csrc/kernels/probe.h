// What the machine can do at most: the roofs that the benchmarks compare the kernels with.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace cpm {

// Reads `bytes` (a multiple of 128) once with all threads; returns something that depends on all of them.
std::uint64_t read_all(ThreadPool& pool, Isa isa, const std::uint8_t* data, std::int64_t bytes);

// Runs `rounds` rounds of 80 independent 8-lane fused multiply-adds (8 for scalar, one lane) on every thread;
// returns how many lanes' multiply-adds that were.
std::int64_t multiply_add(ThreadPool& pool, Isa isa, std::int64_t rounds, float* sink);

struct ProbeKernels {
    std::uint64_t (*read)(const std::uint8_t* data, std::int64_t bytes);
    std::int64_t (*multiply_add)(std::int64_t rounds, float* sink);
};

extern const ProbeKernels kProbeScalar;
#if defined(CPM_X86)
extern const ProbeKernels kProbeAvx2;
#endif

}  // namespace cpm
