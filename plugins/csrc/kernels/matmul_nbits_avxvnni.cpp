#include <immintrin.h>

namespace cpm {
namespace {

struct Dot {
    using Sum = __m256i;
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum add(Sum sum, __m256i weights, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
    static __m256i lanes(Sum sum) { return sum; }
};

}  // namespace
}  // namespace cpm

#include "kernels/matmul_nbits_x86.h"

namespace cpm {
const NBitsKernels kNBitsAvxVnni = CPM_NBITS_KERNELS;
}
