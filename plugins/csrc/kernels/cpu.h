// Which instruction set the kernels use on this machine.
#pragma once

namespace cpm {

enum class Isa : int { scalar = 0, avx2 = 1, avxvnni = 2, avx512vnni = 3 };

// The best one that the CPU and the operating system support.
Isa best_isa();

// Whether this machine can run it.
bool has_isa(Isa isa);

}  // namespace cpm
