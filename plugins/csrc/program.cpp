// A decode step without a framework between its ops: in one of OpenVINO's graphs each node costs 5 to 10 us of cold
// code, which at a hundred nodes is a tenth of a small model's step.
#include <cstdint>
#include <functional>
#include <vector>

#include "capi.h"

namespace {

struct Frame {
    cpm_session* session;
    cpm_pool* pool;
    std::int32_t isa;
    std::int64_t past;
    float *values, *result;

    const float* at(std::int64_t offset) const { return offset < 0 ? nullptr : values + offset; }
    float* out(std::int64_t offset) const { return offset == -2 ? result : values + offset; }
};

using Op = std::function<std::int32_t(const Frame&)>;

// Runs `use` on the normalized row.
template <class Use>
std::int32_t normalized(const Frame& frame, const cpm_norm& norm, const Use& use) {
    thread_local std::vector<float> row;
    row.resize(static_cast<std::size_t>(norm.size));
    const std::int32_t status = cpm_rms_norm(frame.pool, frame.isa, frame.at(norm.x), norm.weight, 1, norm.size,
                                             norm.epsilon, norm.scale, row.data());
    return status ? status : use(static_cast<const float*>(row.data()));
}

}  // namespace

struct cpm_program {
    std::vector<Op> ops;
};

extern "C" {

cpm_program* cpm_program_create(void) { return new cpm_program; }
void cpm_program_destroy(cpm_program* program) { delete program; }

void cpm_program_norm_linear(cpm_program* program, const cpm_norm* norm, const cpm_nbits_shape* shape,
                             const uint8_t* panels, int64_t y) {
    program->ops.push_back([=, norm = *norm, shape = *shape](const Frame& f) {
        return normalized(f, norm, [&](const float* row) {
            return cpm_nbits_matmul(f.pool, f.isa, &shape, panels, row, 1, f.out(y), nullptr, 1.0f);
        });
    });
}

void cpm_program_linear_add(cpm_program* program, int64_t x, int64_t residual, float scale,
                            const cpm_nbits_shape* shape, const uint8_t* panels, int64_t y) {
    program->ops.push_back([=, shape = *shape](const Frame& f) {
        return cpm_nbits_matmul(f.pool, f.isa, &shape, panels, f.at(x), 1, f.out(y), f.at(residual), scale);
    });
}

void cpm_program_norm_gated(cpm_program* program, const cpm_norm* norm, const cpm_nbits_shape* shape,
                            const uint8_t* gate, const uint8_t* up, int64_t y) {
    program->ops.push_back([=, norm = *norm, shape = *shape](const Frame& f) {
        return normalized(f, norm, [&](const float* row) {
            return cpm_nbits_gated(f.pool, f.isa, &shape, gate, up, row, 1, f.out(y));
        });
    });
}

void cpm_program_norm_experts(cpm_program* program, const cpm_norm* norm, const cpm_experts* experts, float scale,
                              int64_t y) {
    program->ops.push_back([=, norm = *norm, experts = *experts](const Frame& f) {
        return normalized(f, norm, [&](const float* row) {
            return cpm_mixture_of_experts(f.pool, f.isa, &experts, row, 1, f.at(norm.x), scale, f.out(y));
        });
    });
}

void cpm_program_norm_sparse_mlp(cpm_program* program, const cpm_norm* norm, const cpm_sparse_mlp_weights* weights,
                                 int64_t residual, float scale, int64_t y) {
    program->ops.push_back([=, norm = *norm, weights = *weights](const Frame& f) {
        return normalized(f, norm, [&](const float* row) {
            return cpm_sparse_mlp(f.pool, f.isa, &weights, row, 1, f.at(residual), scale, f.out(y),
                                  cpm_session_sparsity(f.session));
        });
    });
}

void cpm_program_gather(cpm_program* program, int64_t x, const int32_t* columns, int64_t n, int64_t y) {
    program->ops.push_back([=](const Frame& f) {
        const float* from = f.at(x);
        float* to = f.out(y);
        for (std::int64_t i = 0; i < n; ++i) to[i] = from[columns[i]];
        return static_cast<std::int32_t>(CPM_OK);
    });
}

void cpm_program_attention(cpm_program* program, int32_t layer, const cpm_attention_spec* spec, int32_t gated,
                           int64_t qkv, int64_t cosine, int64_t sine, int64_t output) {
    program->ops.push_back([=, spec = *spec](const Frame& f) {
        const cpm_cache* cache = cpm_session_cache(f.session, layer);
        if (!cache || !cache->key) return static_cast<std::int32_t>(CPM_BAD_SHAPE);
        const std::int64_t query = std::int64_t(spec.num_heads) * spec.head_size;
        const std::int64_t key = std::int64_t(spec.kv_num_heads) * spec.head_size;
        cpm_attention_rows rows{};
        rows.query = f.at(qkv);
        rows.key = rows.query + query;
        rows.value = rows.key + key;
        rows.query_stride = rows.key_stride = rows.value_stride = query + 2 * key;
        rows.cosine = f.at(cosine);
        rows.sine = f.at(sine);
        rows.past_length = f.past;
        rows.rows = 1;
        rows.output = f.out(output);
        const std::int32_t status = cpm_sparse_attention(f.pool, f.isa, &spec, cache, &rows);
        if (status || !gated) return status;
        return cpm_output_gate(f.pool, f.isa, rows.value + key, query, 1, query, rows.output);
    });
}

void cpm_program_recurrent(cpm_program* program, int32_t layer, const cpm_recurrent_rows* constants, int64_t mixed,
                           int64_t cosine, int64_t sine, int64_t output) {
    program->ops.push_back([=, constants = *constants](const Frame& f) {
        float* state = cpm_session_state(f.session, layer);
        if (!state) return static_cast<std::int32_t>(CPM_BAD_SHAPE);
        cpm_recurrent_rows rows = constants;
        rows.rows = 1;
        rows.mixed = f.at(mixed);
        rows.cosine = f.at(cosine);
        rows.sine = f.at(sine);
        rows.output = f.out(output);
        return cpm_recurrent_attention(f.pool, f.isa, &rows, state);
    });
}

void cpm_program_latent(cpm_program* program, int32_t layer, const cpm_latent_spec* spec,
                        const cpm_latent_rows* constants, int64_t query, int64_t latent, int64_t cosine, int64_t sine,
                        int64_t output) {
    program->ops.push_back([=, spec = *spec, constants = *constants](const Frame& f) {
        const cpm_cache* cache = cpm_session_cache(f.session, layer);
        if (!cache || !cache->key) return static_cast<std::int32_t>(CPM_BAD_SHAPE);
        cpm_latent_rows rows = constants;
        rows.query = f.at(query);
        rows.latent = f.at(latent);
        rows.query_stride = std::int64_t(spec.num_heads) * (spec.nope_size + spec.rope_size);
        rows.latent_stride = std::int64_t(spec.rank) + spec.rope_size;
        rows.cosine = f.at(cosine);
        rows.sine = f.at(sine);
        rows.past_length = f.past;
        rows.rows = 1;
        rows.output = f.out(output);
        return cpm_latent_attention(f.pool, f.isa, &spec, cache, &rows);
    });
}

int32_t cpm_program_run(const cpm_program* program, cpm_session* session, int64_t past_length, float* values,
                        float* result) {
    const Frame frame{session, cpm_session_pool(session), cpm_best_isa(), past_length, values, result};
    std::int32_t status = CPM_OK;
    cpm_pool_begin_step(frame.pool);
    for (auto op = program->ops.begin(); op != program->ops.end() && !status; ++op) status = (*op)(frame);
    cpm_pool_end_step(frame.pool);
    return status;
}

}  // extern "C"
