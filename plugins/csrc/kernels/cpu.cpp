#include "kernels/cpu.h"

#include <cstdint>
#include <initializer_list>

#if defined(CPM_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace cpm {
namespace {

#if defined(CPM_X86)

struct Registers {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int out[4];
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {std::uint32_t(out[0]), std::uint32_t(out[1]), std::uint32_t(out[2]), std::uint32_t(out[3])};
#else
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

std::uint64_t enabled_state() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (std::uint64_t(high) << 32) | low;
#endif
}

bool bit(std::uint32_t word, int index) { return (word >> index) & 1u; }

struct Features {
    bool avx2 = false, avxvnni = false, avx512vnni = false;

    Features() {
        const Registers one = cpuid(1, 0);
        const bool xsave = bit(one.c, 27);
        const std::uint64_t state = xsave ? enabled_state() : 0;
        const bool saves_avx = (state & 0x6) == 0x6, saves_avx512 = (state & 0xe6) == 0xe6;
        const Registers seven = cpuid(7, 0), seven_one = cpuid(7, 1);
        const bool fma = bit(one.c, 12), f16c = bit(one.c, 29);
        avx2 = saves_avx && fma && f16c && bit(seven.b, 5);
        avxvnni = avx2 && bit(seven_one.a, 4);
        const bool f = bit(seven.b, 16), bw = bit(seven.b, 30), vl = bit(seven.b, 31);
        avx512vnni = avx2 && saves_avx512 && f && bw && vl && bit(seven.c, 11);
    }
};

const Features& features() {
    static const Features found;
    return found;
}

#endif

}  // namespace

bool has_isa(Isa isa) {
#if defined(CPM_X86)
    switch (isa) {
        case Isa::scalar: return true;
        case Isa::avx2: return features().avx2;
        case Isa::avxvnni: return features().avxvnni;
        case Isa::avx512vnni: return features().avx512vnni;
    }
    return false;
#else
    return isa == Isa::scalar;
#endif
}

Isa best_isa() {
    for (Isa isa : {Isa::avx512vnni, Isa::avxvnni, Isa::avx2})
        if (has_isa(isa)) return isa;
    return Isa::scalar;
}

}  // namespace cpm
