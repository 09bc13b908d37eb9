// How floats become int8 codes: value = code * scale, the scale in float16 as it is stored.
#pragma once

#include <limits>

#include "kernels/half.h"

namespace cpm {
namespace {

constexpr int kMaxCode = 127;

inline std::uint16_t code_scale(float magnitude) { return float_to_half(magnitude / float(kMaxCode)); }

// What floats are multiplied by before they are rounded to the nearest code, ties to even; 0 where all codes are 0:
// the floats are zeros, or not finite, which then the scale tells.
inline float code_factor(std::uint16_t scale) {
    const float step = half_to_float(scale);
    return step > 0.0f && step < std::numeric_limits<float>::infinity() ? 1.0f / step : 0.0f;
}

}  // namespace
}  // namespace cpm
