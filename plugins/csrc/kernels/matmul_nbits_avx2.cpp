#include <immintrin.h>

namespace cpm {
namespace {

// Codes up to 15 times int8: eight sums of two products (8 * 2 * 15 * 127 = 30,480) fit 16 bits.
struct Dot {
    using Sum = __m256i;
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum add(Sum sum, __m256i weights, __m256i x) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
    }
    static __m256i lanes(Sum sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

}  // namespace
}  // namespace cpm

#include "kernels/matmul_nbits_x86.h"

namespace cpm {
const NBitsKernels kNBitsAvx2 = CPM_NBITS_KERNELS;
}
