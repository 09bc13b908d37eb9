#include "capi.h"

#include <vector>

#include "kernels/cpu.h"
#include "kernels/latent_attention.h"
#include "kernels/linear_attention.h"
#include "kernels/matmul_nbits.h"
#include "kernels/mixture_of_experts.h"
#include "kernels/output_gate.h"
#include "kernels/probe.h"
#include "kernels/recurrent_attention.h"
#include "kernels/rms_norm.h"
#include "kernels/sparse_attention.h"
#include "kernels/sparse_mlp.h"
#include "kernels/thread_pool.h"

struct cpm_pool {
    explicit cpm_pool(int threads) : pool(threads) {}
    cpm::ThreadPool pool;
};

struct cpm_session {
    cpm_session(int threads, int layers)
        : pool(threads), caches(static_cast<std::size_t>(layers)), states(static_cast<std::size_t>(layers)) {}
    cpm_pool pool;
    cpm_sparsity sparsity{};
    std::vector<cpm_cache> caches;
    std::vector<float*> states;
};

namespace {

cpm::NBitsShape shape_of(const cpm_nbits_shape& s) {
    cpm::NBitsShape shape;
    shape.rows = s.rows;
    shape.cols = s.cols;
    shape.bits = s.bits;
    shape.group = s.group;
    shape.symmetric = s.symmetric != 0;
    return shape;
}

bool is_valid(const cpm_nbits_shape& s) {
    if (s.rows < 1 || s.cols < 1 || s.group < 0) return false;
    if (s.bits != 2 && s.bits != 4 && s.bits != 8) return false;
    if (!s.symmetric && s.bits != 4) return false;
    if (s.group == 0) return true;
    return s.group % cpm::kBlock == 0 && s.cols % s.group == 0;
}

int32_t check(const cpm_nbits_shape* shape, int32_t isa, int64_t m) {
    if (!is_valid(*shape) || m < 0) return CPM_BAD_SHAPE;
    return cpm_has_isa(isa) ? CPM_OK : CPM_BAD_ISA;
}

// A few rows are done sooner than other threads wake up.
template <class Row>
void run_rows(cpm_pool& pool, int64_t rows, const Row& row) {
    if (rows >= 4) return pool.pool.run(std::size_t(rows), row);
    for (int64_t i = 0; i < rows; ++i) row(std::size_t(i), 0);
}

bool is_valid(const cpm_attention_spec& s) {
    if (s.num_heads < 1 || s.kv_num_heads < 1 || s.num_heads % s.kv_num_heads != 0) return false;
    if (s.head_size < 8 || s.head_size > cpm::kMaxHeadSize || s.head_size % 8 != 0 || s.topk < 0) return false;
    if (s.topk == 0) return true;
    if (s.kernel_stride < 1 || s.kernel_size != 2 * s.kernel_stride || s.block_size != 4 * s.kernel_stride)
        return false;
    return s.window_size >= 0 && s.window_size % s.block_size == 0 && s.init_blocks >= 0 && s.topk > s.init_blocks;
}

bool is_valid(const cpm_cache& c, const cpm_attention_spec& s) {
    if (c.type != CPM_CACHE_FLOAT16 && c.type != CPM_CACHE_INT8) return false;
    const bool scaled = c.type == CPM_CACHE_INT8;
    if ((c.key_scales != nullptr) != scaled || (c.value_scales != nullptr) != scaled) return false;
    return c.key && c.value && (s.topk == 0 || c.pooled);
}

bool is_valid(const cpm_attention_rows& r, const cpm_attention_spec& s) {
    const int64_t query = int64_t(s.num_heads) * s.head_size, key = int64_t(s.kv_num_heads) * s.head_size;
    if (r.rows < 0 || r.past_length < 0 || (r.cosine == nullptr) != (r.sine == nullptr)) return false;
    return r.query_stride >= query && r.key_stride >= key && r.value_stride >= key;
}

bool is_valid(const cpm_latent_spec& s) {
    if (s.num_heads < 1 || s.nope_size < 1 || s.groups < 1) return false;
    if (s.rank < 8 || s.rank % s.groups != 0 || s.rank / s.groups % 8 != 0) return false;
    return s.rope_size >= 8 && s.rope_size % 8 == 0 && s.value_size >= 16 && s.value_size % 16 == 0;
}

bool is_valid(const cpm_latent_rows& r, const cpm_latent_spec& s) {
    if (r.rows < 0 || r.past_length < 0 || r.latent_stride < s.rank + s.rope_size) return false;
    return r.query_stride >= int64_t(s.num_heads) * (s.nope_size + s.rope_size);
}

}  // namespace

extern "C" {

int32_t cpm_abi_version(void) { return CPM_ABI_VERSION; }

const char* cpm_error_text(int32_t status) {
    switch (status) {
        case CPM_OK: return "ok";
        case CPM_BAD_SHAPE: return "the kernels do not take this shape";
        case CPM_BAD_ISA: return "this CPU lacks the instruction set";
        case CPM_CACHE_FULL: return "the new rows do not fit the cache";
    }
    return "unknown status";
}

int32_t cpm_best_isa(void) { return static_cast<int32_t>(cpm::best_isa()); }

int32_t cpm_has_isa(int32_t isa) {
    return isa >= 0 && isa <= static_cast<int32_t>(cpm::Isa::avx512vnni) && cpm::has_isa(static_cast<cpm::Isa>(isa));
}

cpm_pool* cpm_pool_create(int32_t threads) { return new cpm_pool(threads); }
void cpm_pool_destroy(cpm_pool* pool) { delete pool; }
int32_t cpm_pool_threads(const cpm_pool* pool) { return pool->pool.threads(); }
void cpm_pool_begin_step(cpm_pool* pool) { pool->pool.begin_step(); }
void cpm_pool_end_step(cpm_pool* pool) { pool->pool.end_step(); }

int64_t cpm_nbits_bytes(const cpm_nbits_shape* shape) { return is_valid(*shape) ? shape_of(*shape).bytes() : -1; }

int32_t cpm_nbits_pack(const cpm_nbits_shape* shape, const uint8_t* codes, const uint16_t* scales,
                       const uint8_t* zeros, int32_t flip, uint8_t* panels) {
    if (!is_valid(*shape) || (zeros == nullptr) != (shape->symmetric != 0)) return CPM_BAD_SHAPE;
    cpm::pack_nbits(shape_of(*shape), codes, scales, zeros, flip, panels);
    return CPM_OK;
}

int32_t cpm_nbits_matmul(cpm_pool* pool, int32_t isa, const cpm_nbits_shape* shape, const uint8_t* panels,
                         const float* x, int64_t m, float* y, const float* residual, float scale) {
    if (const int32_t status = check(shape, isa, m)) return status;
    cpm::Epilogue epilogue;
    if (residual) epilogue = {cpm::Epilogue::Kind::add, scale, residual};
    const cpm::NBitsWeight weight{shape_of(*shape), panels};
    cpm::matmul_nbits(pool->pool, static_cast<cpm::Isa>(isa), weight, nullptr, x, m, y, epilogue);
    return CPM_OK;
}

int32_t cpm_rms_norm(cpm_pool* pool, int32_t isa, const float* x, const float* weight, int64_t m, int64_t n,
                     float epsilon, float scale, float* y) {
    if (m < 0 || n < 1) return CPM_BAD_SHAPE;
    if (!cpm_has_isa(isa)) return CPM_BAD_ISA;
    const auto norm = cpm::rms_norm(static_cast<cpm::Isa>(isa));
    run_rows(*pool, m, [&](std::size_t i, int) {
        norm(x + int64_t(i) * n, weight, n, epsilon, scale, y + int64_t(i) * n);
    });
    return CPM_OK;
}

int32_t cpm_nbits_gated(cpm_pool* pool, int32_t isa, const cpm_nbits_shape* shape, const uint8_t* gate,
                        const uint8_t* up, const float* x, int64_t m, float* y) {
    if (const int32_t status = check(shape, isa, m)) return status;
    cpm::Epilogue epilogue;
    epilogue.kind = cpm::Epilogue::Kind::silu_mul;
    const cpm::NBitsWeight gate_weight{shape_of(*shape), gate}, up_weight{shape_of(*shape), up};
    cpm::matmul_nbits(pool->pool, static_cast<cpm::Isa>(isa), gate_weight, &up_weight, x, m, y, epilogue);
    return CPM_OK;
}

int32_t cpm_mixture_of_experts(cpm_pool* pool, int32_t isa, const cpm_experts* experts, const float* x, int64_t m,
                               const float* residual, float scale, float* y) {
    if (const int32_t status = check(&experts->inner, isa, m)) return status;
    if (const int32_t status = check(&experts->outer, isa, m)) return status;
    if (experts->count < 1 || experts->top_k < 1 || experts->top_k > experts->count) return CPM_BAD_SHAPE;
    if (experts->inner.rows != experts->outer.cols || experts->inner.cols != experts->outer.rows) return CPM_BAD_SHAPE;
    const cpm::Experts e{experts->count, experts->top_k, shape_of(experts->inner), shape_of(experts->outer),
                         experts->w1,    experts->w3,    experts->w2,              experts->router};
    cpm::mixture_of_experts(pool->pool, static_cast<cpm::Isa>(isa), e, x, m, residual, scale, y);
    return CPM_OK;
}

int64_t cpm_strips_bytes(const cpm_nbits_shape* shape) {
    return is_valid(*shape) ? shape->rows * cpm::strip_bytes(shape_of(*shape)) : -1;
}

int64_t cpm_slices_bytes(const cpm_nbits_shape* shape) {
    return is_valid(*shape) ? cpm::slices(shape_of(*shape)) * cpm::slice_bytes(shape_of(*shape)) : -1;
}

int32_t cpm_sparse_mlp(cpm_pool* pool, int32_t isa, const cpm_sparse_mlp_weights* weights, const float* x, int64_t m,
                       const float* residual, float scale, float* y, cpm_sparsity* count) {
    const cpm_nbits_shape &gate = weights->gate, &up = weights->up, &down = weights->down;
    for (const cpm_nbits_shape* shape : {&gate, &up, &down})
        if (const int32_t status = check(shape, isa, m)) return status;
    if (gate.rows != up.rows || gate.cols != up.cols || up.rows != down.cols || up.cols != down.rows)
        return CPM_BAD_SHAPE;
    const cpm::SparseMlp mlp{shape_of(gate),      shape_of(up),         shape_of(down),    weights->gate_panels,
                             weights->up_strips, weights->down_slices, weights->threshold};
    cpm::Sparsity own;
    cpm::sparse_mlp(pool->pool, static_cast<cpm::Isa>(isa), mlp, x, m, residual, scale, y, own);
    count->neurons += own.neurons;
    count->active += own.active;
    count->bytes += own.bytes;
    count->read += own.read;
    return CPM_OK;
}

cpm_session* cpm_session_create(int32_t threads, int32_t layers) { return new cpm_session(threads, layers); }
void cpm_session_destroy(cpm_session* session) { delete session; }
cpm_pool* cpm_session_pool(cpm_session* session) { return &session->pool; }
cpm_sparsity* cpm_session_sparsity(cpm_session* session) { return &session->sparsity; }

int32_t cpm_session_set_cache(cpm_session* session, int32_t layer, const cpm_cache* cache) {
    if (!cpm_session_cache(session, layer)) return CPM_BAD_SHAPE;
    session->caches[static_cast<std::size_t>(layer)] = *cache;
    return CPM_OK;
}

const cpm_cache* cpm_session_cache(const cpm_session* session, int32_t layer) {
    const auto index = static_cast<std::size_t>(layer);
    return layer >= 0 && index < session->caches.size() ? &session->caches[index] : nullptr;
}

int32_t cpm_session_set_state(cpm_session* session, int32_t layer, float* state) {
    if (!cpm_session_cache(session, layer)) return CPM_BAD_SHAPE;
    session->states[static_cast<std::size_t>(layer)] = state;
    return CPM_OK;
}

float* cpm_session_state(const cpm_session* session, int32_t layer) {
    return cpm_session_cache(session, layer) ? session->states[static_cast<std::size_t>(layer)] : nullptr;
}

int32_t cpm_linear_attention(cpm_pool* pool, int32_t isa, const cpm_linear_shape* shape, const float* query,
                             const float* key, const float* value, const float* decay, float scale, float* state,
                             float* output) {
    const cpm_linear_shape& s = *shape;
    if (s.batch < 1 || s.rows < 0 || s.heads < 1 || s.size < 1 || s.value_size < 1) return CPM_BAD_SHAPE;
    if (s.query_stride < s.heads * s.size || s.key_stride < s.heads * s.size) return CPM_BAD_SHAPE;
    if (s.value_stride < s.heads * s.value_size) return CPM_BAD_SHAPE;
    if (!cpm_has_isa(isa)) return CPM_BAD_ISA;
    cpm::LinearAttentionCall call{};
    call.shape = {s.batch, s.rows, s.heads, s.size, s.value_size, s.query_stride, s.key_stride, s.value_stride};
    call.query = query;
    call.key = key;
    call.value = value;
    call.decay = decay;
    call.scale = scale;
    call.state = state;
    call.output = output;
    cpm::linear_attention(pool->pool, static_cast<cpm::Isa>(isa), call);
    return CPM_OK;
}

int32_t cpm_recurrent_attention(cpm_pool* pool, int32_t isa, const cpm_recurrent_rows* rows, float* state) {
    const cpm_recurrent_rows& r = *rows;
    if (r.rows < 0 || r.heads < 1 || r.size < 2 || r.size % 2 != 0) return CPM_BAD_SHAPE;
    if (!cpm_has_isa(isa)) return CPM_BAD_ISA;
    const cpm::RecurrentStep step{r.rows,   r.heads, r.size,  r.mixed, r.query_norm, r.key_norm, r.output_norm,
                                  r.cosine, r.sine,  r.decay, r.scale, r.epsilon,    state,      r.output};
    cpm::recurrent_attention(pool->pool, static_cast<cpm::Isa>(isa), step);
    return CPM_OK;
}

int32_t cpm_output_gate(cpm_pool* pool, int32_t isa, const float* gate, int64_t gate_stride, int64_t m, int64_t n,
                        float* values) {
    if (m < 0 || n < 1 || gate_stride < n) return CPM_BAD_SHAPE;
    if (!cpm_has_isa(isa)) return CPM_BAD_ISA;
    const cpm::OutputGate function = cpm::output_gate(static_cast<cpm::Isa>(isa));
    run_rows(*pool, m, [&](std::size_t i, int) { function(gate + int64_t(i) * gate_stride, n, values + int64_t(i) * n); });
    return CPM_OK;
}

int32_t cpm_sparse_attention(cpm_pool* pool, int32_t isa, const cpm_attention_spec* spec, const cpm_cache* cache,
                             const cpm_attention_rows* rows) {
    if (!is_valid(*spec) || !is_valid(*rows, *spec) || !is_valid(*cache, *spec)) return CPM_BAD_SHAPE;
    if (rows->past_length > cache->capacity - rows->rows) return CPM_CACHE_FULL;
    if (!cpm_has_isa(isa)) return CPM_BAD_ISA;
    cpm::AttentionSpec s;
    s.num_heads = spec->num_heads;
    s.kv_heads = spec->kv_num_heads;
    s.head_size = spec->head_size;
    s.scale = spec->scale;
    s.topk = spec->topk;
    if (s.topk) {
        s.kernel_size = spec->kernel_size;
        s.kernel_stride = spec->kernel_stride;
        s.block_size = spec->block_size;
        s.init_blocks = spec->init_blocks;
        s.window_size = spec->window_size;
        s.dense_len = spec->dense_len;
        s.coarse_lse = spec->coarse_lse != 0;
    }
    cpm::AttentionStep step{};
    step.query = rows->query;
    step.key = rows->key;
    step.value = rows->value;
    step.query_stride = rows->query_stride;
    step.key_stride = rows->key_stride;
    step.value_stride = rows->value_stride;
    step.cosine = rows->cosine;
    step.sine = rows->sine;
    step.type = cache->type == CPM_CACHE_INT8 ? cpm::CacheType::int8 : cpm::CacheType::half;
    step.key_cache = {cache->key, cache->key_scales};
    step.value_cache = {cache->value, cache->value_scales};
    step.pooled_cache = s.topk ? cache->pooled : nullptr;
    step.capacity = cache->capacity;
    step.past = rows->past_length;
    step.rows = rows->rows;
    step.output = rows->output;
    step.selected = rows->selected;
    cpm::sparse_attention(pool->pool, static_cast<cpm::Isa>(isa), s, step);
    return CPM_OK;
}

int32_t cpm_latent_attention(cpm_pool* pool, int32_t isa, const cpm_latent_spec* spec, const cpm_cache* cache,
                             const cpm_latent_rows* rows) {
    const cpm_latent_spec& s = *spec;
    const cpm_latent_rows& r = *rows;
    if (!is_valid(s) || !is_valid(r, s) || cache->type != CPM_CACHE_FLOAT16) return CPM_BAD_SHAPE;
    if (r.past_length > cache->capacity - r.rows) return CPM_CACHE_FULL;
    if (!cpm_has_isa(isa)) return CPM_BAD_ISA;
    const cpm::LatentSpec sizes{s.num_heads, s.rank,   s.nope_size, s.rope_size,
                                s.value_size, s.groups, s.scale,     s.epsilon};
    const cpm::LatentStep step{r.query, r.latent, r.query_stride, r.latent_stride, r.norm, r.cosine, r.sine,
                               {r.scales, r.codes}, static_cast<uint16_t*>(cache->key), r.past_length, r.rows, r.output};
    cpm::latent_attention(pool->pool, static_cast<cpm::Isa>(isa), sizes, step);
    return CPM_OK;
}

uint64_t cpm_probe_read(cpm_pool* pool, int32_t isa, const uint8_t* data, int64_t bytes) {
    return cpm::read_all(pool->pool, static_cast<cpm::Isa>(isa), data, bytes);
}

int64_t cpm_probe_multiply_add(cpm_pool* pool, int32_t isa, int64_t rounds, float* sink) {
    return cpm::multiply_add(pool->pool, static_cast<cpm::Isa>(isa), rounds, sink);
}

}  // extern "C"
