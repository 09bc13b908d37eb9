#include "kernels/latent_attention.h"

#include <algorithm>

#include "kernels/latent_attention_parts.h"
#include "kernels/rms_norm.h"

namespace cpm {
namespace {

const LatentKernels& latent_kernels(Isa isa) {
#if defined(CPM_X86)
    if (isa != Isa::scalar) return kLatentAvx2;
#else
    (void)isa;
#endif
    return kLatentScalar;
}

// Row t of the new ones into the cache.
void append(const LatentCall& call, RmsNorm norm, std::int64_t t) {
    const LatentSpec& spec = call.spec;
    const float* in = call.step.latent + t * call.step.latent_stride;
    thread_local FloatBuffer own;
    float* const row = own.at_least(std::size_t(spec.width()));
    norm(in, call.step.norm, spec.rank, spec.epsilon, 1.0f, row);
    turn(call, in + spec.rank, t, 1.0f, row + spec.rank);
    call.kernels.half.store_key(row, spec.width(), {call.cached(call.step.past + t), nullptr});
}

}  // namespace

void turn(const LatentCall& call, const float* in, std::int64_t row, float factor, float* out) {
    const int half = call.spec.rope / 2;
    const float *cosine = call.step.cosine + row * half, *sine = call.step.sine + row * half;
    for (int i = 0; i < half; ++i) {
        out[i] = (in[i] * cosine[i] - in[i + half] * sine[i]) * factor;
        out[i + half] = (in[i + half] * cosine[i] + in[i] * sine[i]) * factor;
    }
}

const float* pack_block(const LatentCall& call, std::int64_t block, bool fetch_next) {
    thread_local FloatBuffer own;
    thread_local std::vector<std::uint16_t> padded;
    const int width = call.spec.width(), count = call.count(block);
    float* const out = own.at_least(std::size_t(kLatentBlock) * width);
    Ahead ahead;
    if (fetch_next)
        ahead.add(call.cached((block + 1) * kLatentBlock), std::int64_t(call.count(block + 1)) * width * 2);
    std::uint16_t* rows = call.cached(block * kLatentBlock);
    if (count % kKeyPanel != 0) {  // the kernels' own rows of zeros are shorter than these
        padded.assign(std::size_t(round_up(count, kKeyPanel)) * width, 0);
        std::copy_n(rows, std::int64_t(count) * width, padded.begin());
        rows = padded.data();
    }
    call.kernels.half.pack_keys({rows, nullptr}, int(round_up(count, kKeyPanel)), width, out, ahead);
    return out;
}

void latent_attention(ThreadPool& pool, Isa isa, const LatentSpec& spec, const LatentStep& step) {
    if (step.rows == 0) return;
    const LatentCall call{pool, attention_kernels(isa), latent_kernels(isa), spec, step};
    const RmsNorm norm = rms_norm(isa);
    call.run(std::size_t(step.rows), step.rows * spec.width() * 16,
             [&](std::size_t t) { append(call, norm, std::int64_t(t)); });
    step.rows < kExpandedRows ? attend_absorbed(call) : attend_expanded(call);
}

}  // namespace cpm
