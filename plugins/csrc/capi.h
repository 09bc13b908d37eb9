/* C API of the CPU kernels: used by the tests through ctypes, and by the engine extensions.
 * Functions that can fail return 0 or an error code; cpm_error_text names it. Only sessions and programs keep
 * pointers. */
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define CPM_API __declspec(dllexport)
#else
#define CPM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum cpm_status { CPM_OK = 0, CPM_BAD_SHAPE = 1, CPM_BAD_ISA = 2, CPM_CACHE_FULL = 3 };

/* Grows with every change of a signature, a struct or a packed layout. */
#define CPM_ABI_VERSION 3
CPM_API int32_t cpm_abi_version(void);
CPM_API const char* cpm_error_text(int32_t status);

/* Instruction sets: 0 scalar, 1 AVX2, 2 AVX-VNNI, 3 AVX512-VNNI. */
CPM_API int32_t cpm_best_isa(void);
CPM_API int32_t cpm_has_isa(int32_t isa);

typedef struct cpm_pool cpm_pool;
CPM_API cpm_pool* cpm_pool_create(int32_t threads);
CPM_API void cpm_pool_destroy(cpm_pool* pool);
CPM_API int32_t cpm_pool_threads(const cpm_pool* pool);
CPM_API void cpm_pool_begin_step(cpm_pool* pool);
CPM_API void cpm_pool_end_step(cpm_pool* pool);

/* Weights (rows, cols) of 2, 4 or 8 bits; group: columns that share a scale, 0 for one scale a row. */
typedef struct {
    int64_t rows, cols;
    int32_t bits, group, symmetric;
} cpm_nbits_shape;

/* Bytes of the packed panels, or -1 for a shape the kernels do not take. */
CPM_API int64_t cpm_nbits_bytes(const cpm_nbits_shape* shape);

/* See kernels/matmul_nbits.h: pack_nbits. */
CPM_API int32_t cpm_nbits_pack(const cpm_nbits_shape* shape, const uint8_t* codes, const uint16_t* scales,
                               const uint8_t* zeros, int32_t flip, uint8_t* panels);

/* y (m, rows) = x (m, cols) . w^T; residual (m, rows) may be null: y = residual + scale * (x . w^T). */
CPM_API int32_t cpm_nbits_matmul(cpm_pool* pool, int32_t isa, const cpm_nbits_shape* shape, const uint8_t* panels,
                                 const float* x, int64_t m, float* y, const float* residual, float scale);

/* y (m, n) = scale * x / sqrt(mean(x^2) + epsilon) * weight, for each row of x (m, n). */
CPM_API int32_t cpm_rms_norm(cpm_pool* pool, int32_t isa, const float* x, const float* weight, int64_t m, int64_t n,
                             float epsilon, float scale, float* y);

/* y (m, rows) = silu(x . gate^T) * (x . up^T). */
CPM_API int32_t cpm_nbits_gated(cpm_pool* pool, int32_t isa, const cpm_nbits_shape* shape, const uint8_t* gate,
                                const uint8_t* up, const float* x, int64_t m, float* y);

/* Gated MLPs of which each row goes through top_k; see kernels/mixture_of_experts.h. w1 and w3 have the shape inner
 * (F, H), w2 the shape outer (H, F); their panels lie one expert behind the other. router: float32 (count, H). */
typedef struct {
    int64_t count, top_k;
    cpm_nbits_shape inner, outer;
    const uint8_t *w1, *w3, *w2;
    const float* router;
} cpm_experts;

/* y (m, H) = residual + scale * what the experts make of x (m, H); y may be the residual. */
CPM_API int32_t cpm_mixture_of_experts(cpm_pool* pool, int32_t isa, const cpm_experts* experts, const float* x,
                                       int64_t m, const float* residual, float scale, float* y);

/* A gated MLP with a threshold on the gate; see kernels/sparse_mlp.h. gate and up (F, H), down (H, F), equal bits. */
typedef struct {
    cpm_nbits_shape gate, up, down;
    const uint8_t *gate_panels, *up_strips, *down_slices;
    float threshold;
} cpm_sparse_mlp_weights;

/* Sums over the single rows that went through sparse MLPs: neurons and those whose gate passed, bytes of the up and
 * down projections and those that were read. */
typedef struct {
    int64_t neurons, active, bytes, read;
} cpm_sparsity;

/* Bytes of the strips of up and of the slices of down, or -1 for shapes the kernels do not take. */
CPM_API int64_t cpm_strips_bytes(const cpm_nbits_shape* shape);
CPM_API int64_t cpm_slices_bytes(const cpm_nbits_shape* shape);

/* y (m, H) = residual + scale * the MLP of x (m, H); y may be the residual. A single row is added to count. */
CPM_API int32_t cpm_sparse_mlp(cpm_pool* pool, int32_t isa, const cpm_sparse_mlp_weights* weights, const float* x,
                               int64_t m, const float* residual, float scale, float* y, cpm_sparsity* count);

/* What a graph op needs beside its tensors: a session's threads, caches and states. Graphs pass its address in a
 * tensor, so that sessions in one process share a compiled model but neither threads nor caches. */
typedef struct cpm_session cpm_session;

enum cpm_cache_type { CPM_CACHE_FLOAT16 = 0, CPM_CACHE_INT8 = 1 };

/* One layer's cache: keys and values (kv_heads, capacity, head size) and pooled keys float32. int8 is
 * code * scale: keys have a float16 scale every 32 columns, (kv_heads, capacity, ceil(head size / 32)), values one
 * a row, (kv_heads, capacity); float16 caches have no scales. */
typedef struct {
    int32_t type;
    void *key, *value;
    uint16_t *key_scales, *value_scales;
    float* pooled;
    int64_t capacity;
} cpm_cache;

CPM_API cpm_session* cpm_session_create(int32_t threads, int32_t layers);
CPM_API void cpm_session_destroy(cpm_session* session);
CPM_API cpm_pool* cpm_session_pool(cpm_session* session);
CPM_API int32_t cpm_session_set_cache(cpm_session* session, int32_t layer, const cpm_cache* cache);
/* Null for a layer that the session does not have. */
CPM_API const cpm_cache* cpm_session_cache(const cpm_session* session, int32_t layer);
/* A recurrent layer's state float32 (heads, size, size), which takes the place of a cache. */
CPM_API int32_t cpm_session_set_state(cpm_session* session, int32_t layer, float* state);
/* Null for a layer without one. */
CPM_API float* cpm_session_state(const cpm_session* session, int32_t layer);

/* What the session's sparse MLPs did so far; never null. */
CPM_API cpm_sparsity* cpm_session_sparsity(cpm_session* session);

/* Heads of D = size and Dv = value_size; strides are floats from one row to the next, so that query, key and
 * value may be columns of a wider matrix. */
typedef struct {
    int64_t batch, rows, heads, size, value_size;
    int64_t query_stride, key_stride, value_stride;
} cpm_linear_shape;

/* output (batch, rows, heads * Dv) from query, key (batch, rows, heads * D), value (batch, rows, heads * Dv) and
 * log decays (heads); state (batch, heads, D, Dv) is updated in place. See kernels/linear_attention.h. */
CPM_API int32_t cpm_linear_attention(cpm_pool* pool, int32_t isa, const cpm_linear_shape* shape, const float* query,
                                     const float* key, const float* value, const float* decay, float scale,
                                     float* state, float* output);

/* The new rows of one sequence in a recurrent layer, with heads of `size`, an even number. mixed (rows, 4 * heads *
 * size) holds queries, keys, values and output gates of each row; the norms (size), (size) and (heads * size); cosine
 * and sine (rows, size / 2); log decays (heads); output (rows, heads * size). */
typedef struct {
    int64_t rows, heads, size;
    const float* mixed;
    const float *query_norm, *key_norm, *output_norm;
    const float *cosine, *sine;
    const float* decay;
    float scale, epsilon;
    float* output;
} cpm_recurrent_rows;

/* Normalizes and rotates queries and keys, attends linearly, normalizes and gates the output; state (heads, size,
 * size) is updated in place. See kernels/recurrent_attention.h. */
CPM_API int32_t cpm_recurrent_attention(cpm_pool* pool, int32_t isa, const cpm_recurrent_rows* rows, float* state);

/* values (m, n) *= sigmoid(gate), row by row; gate_stride: floats from one row of gate to the next. */
CPM_API int32_t cpm_output_gate(cpm_pool* pool, int32_t isa, const float* gate, int64_t gate_stride, int64_t m,
                                int64_t n, float* values);

/* Multi-head latent attention: heads of nope_size + rope_size query columns and value_size values, which an
 * up-projection makes from latents of `rank` columns. groups: scales a row of it. See kernels/latent_attention.h. */
typedef struct {
    int32_t num_heads, rank, nope_size, rope_size, value_size, groups;
    float scale, epsilon;
} cpm_latent_spec;

/* The new rows of one sequence. query (rows, num_heads * (nope + rope)) and latent (rows, rank + rope) as the products
 * leave them; strides are floats from one row to the next. norm (rank); cosine and sine (rows, rope / 2). The
 * up-projection has num_heads * (nope + value) rows: scales (rows, groups), codes (rows, rank). output (rows,
 * num_heads * value). */
typedef struct {
    const float *query, *latent;
    int64_t query_stride, latent_stride;
    const float *norm, *cosine, *sine;
    const float* scales;
    const int8_t* codes;
    int64_t past_length, rows;
    float* output;
} cpm_latent_rows;

/* Appends the rows to cache->key (capacity, rank + rope), float16, and attends; cache->value is not used. rank, rope_size and
 * rank / groups: multiples of 8; value_size: a multiple of 16. */
CPM_API int32_t cpm_latent_attention(cpm_pool* pool, int32_t isa, const cpm_latent_spec* spec, const cpm_cache* cache,
                                     const cpm_latent_rows* rows);

/* The attributes of cpm.SparseAttention, in tokens and blocks as plugins/sparse_attention/spec.py has them.
 * head_size: a multiple of 8 up to 256. */
typedef struct {
    int32_t num_heads, kv_num_heads, head_size;
    float scale;
    int32_t kernel_size, kernel_stride, block_size, init_blocks, window_size, topk, dense_len, coarse_lse;
} cpm_attention_spec;

/* The new rows of one sequence. Strides are floats from one row to the next. cosine and sine (rows, head_size / 2)
 * rotate query and key by halves; null when they are rotated. selected (rows, kv_num_heads, budget) receives the
 * chosen blocks, -1 for none; may be null, and is left alone with topk 0. */
typedef struct {
    const float *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;
    const float *cosine, *sine;
    int64_t past_length, rows;
    float* output; /* (rows, num_heads * head_size) */
    int32_t* selected;
} cpm_attention_rows;

/* Appends the rows to the cache at past_length and attends. The pooled keys, (kv_num_heads,
 * capacity / kernel_stride, head_size), are needed unless topk is 0. CPM_CACHE_FULL, and nothing changed, when the
 * rows do not fit. See kernels/sparse_attention.h. */
CPM_API int32_t cpm_sparse_attention(cpm_pool* pool, int32_t isa, const cpm_attention_spec* spec,
                                     const cpm_cache* cache, const cpm_attention_rows* rows);

/* One decode step of a model: its ops in order, run without a framework between them. Activations are offsets into
 * the array of floats that cpm_program_run takes; an offset of -1 is an absent one. Structs are copied; weights, and
 * what the structs point to, must outlive the program. Sessions may share a program but not the array. */
typedef struct cpm_program cpm_program;

/* The row that an op normalizes first: scale * rms_norm(x) * weight, of `size` columns. */
typedef struct {
    int64_t x, size;
    const float* weight;
    float epsilon, scale;
} cpm_norm;

CPM_API cpm_program* cpm_program_create(void);
CPM_API void cpm_program_destroy(cpm_program* program);

/* y = n . w^T */
CPM_API void cpm_program_norm_linear(cpm_program* program, const cpm_norm* norm, const cpm_nbits_shape* shape,
                                     const uint8_t* panels, int64_t y);
/* y = residual + scale * (x . w^T) */
CPM_API void cpm_program_linear_add(cpm_program* program, int64_t x, int64_t residual, float scale,
                                    const cpm_nbits_shape* shape, const uint8_t* panels, int64_t y);
/* y = silu(n . gate^T) * (n . up^T) */
CPM_API void cpm_program_norm_gated(cpm_program* program, const cpm_norm* norm, const cpm_nbits_shape* shape,
                                    const uint8_t* gate, const uint8_t* up, int64_t y);
/* y = x + scale * what the experts make of n */
CPM_API void cpm_program_norm_experts(cpm_program* program, const cpm_norm* norm, const cpm_experts* experts,
                                      float scale, int64_t y);
/* y = residual + scale * the MLP of n */
CPM_API void cpm_program_norm_sparse_mlp(cpm_program* program, const cpm_norm* norm,
                                         const cpm_sparse_mlp_weights* weights, int64_t residual, float scale,
                                         int64_t y);
/* y (n) = x at these columns. */
CPM_API void cpm_program_gather(cpm_program* program, int64_t x, const int32_t* columns, int64_t n, int64_t y);
/* Attention of qkv, a query, a key and a value behind each other, and a gate of the output behind them if `gated`. */
CPM_API void cpm_program_attention(cpm_program* program, int32_t layer, const cpm_attention_spec* spec, int32_t gated,
                                   int64_t qkv, int64_t cosine, int64_t sine, int64_t output);
/* Of `constants`, the fields that are activations or count rows are not read. */
CPM_API void cpm_program_recurrent(cpm_program* program, int32_t layer, const cpm_recurrent_rows* constants,
                                   int64_t mixed, int64_t cosine, int64_t sine, int64_t output);
CPM_API void cpm_program_latent(cpm_program* program, int32_t layer, const cpm_latent_spec* spec,
                                const cpm_latent_rows* constants, int64_t query, int64_t latent, int64_t cosine,
                                int64_t sine, int64_t output);

/* Runs the ops for the token at past_length as one step of the session, on its caches and states. What an
 * op puts at offset -2 goes to `result`. */
CPM_API int32_t cpm_program_run(const cpm_program* program, cpm_session* session, int64_t past_length, float* values,
                                float* result);

/* The machine's limits, see kernels/probe.h: read `bytes` once; run multiply-adds on every thread (sink: a float
 * for each) and return how many there were. */
CPM_API uint64_t cpm_probe_read(cpm_pool* pool, int32_t isa, const uint8_t* data, int64_t bytes);
CPM_API int64_t cpm_probe_multiply_add(cpm_pool* pool, int32_t isa, int64_t rounds, float* sink);

#ifdef __cplusplus
}
#endif
