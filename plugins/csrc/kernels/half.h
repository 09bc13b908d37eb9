// IEEE half precision in plain C++, bit-exact with the hardware conversions. In an unnamed namespace, because files
// for different instruction sets include it.
#pragma once

#include <cstdint>
#include <cstring>

namespace cpm {
namespace {

inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16;
    std::uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else if (mantissa == 0) {
        bits = sign;
    } else {
        int shift = 0;
        while (!(mantissa & 0x400u)) {
            mantissa <<= 1;
            ++shift;
        }
        bits = sign | (std::uint32_t(113 - shift) << 23) | ((mantissa & 0x3ffu) << 13);
    }
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Rounds to nearest, ties to even.
inline std::uint16_t float_to_half(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return std::uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);
    if (bits >= 0x38800000u) {
        const std::uint32_t rounded = bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u);
        return std::uint16_t(sign | (rounded >> 13));
    }
    if (bits < 0x33000000u) return sign;
    const int shift = 126 - int(bits >> 23);
    const std::uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    const std::uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
    return std::uint16_t(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
}

}  // namespace
}  // namespace cpm
