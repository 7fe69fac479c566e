/* C interface of libwkv: pointers, sizes and strides; nothing of torch, no ownership, no global state that a caller
 * sees.
 *
 * Letters: B batch rows, T tokens, H heads, K key channels of a head, V value channels of a head, S the state (K, V).
 * Strides count elements. A function never keeps a pointer after it has returned.
 * Every field is 8 bytes wide, so that a caller in another language can write a structure as an array of 64-bit words.
 */
#ifndef WKV_H
#define WKV_H

#include <stdint.h>

#if defined(__GNUC__)
#define WKV_API __attribute__((visibility("default")))
#else
#define WKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { WKV_FLOAT32 = 0, WKV_BFLOAT16 = 1, WKV_FLOAT16 = 2 };

/* What a function returns. */
enum { WKV_OK = 0, WKV_NO_MEMORY = 1, WKV_BAD_CU_SEQLENS = 2 };

/* The version of the package that the library was built for. */
WKV_API const char* wkv_version(void);

/* The instruction set in use ("avx512", "avx2", "sse2", "neon", "generic"): the best that the machine has.
 * The environment variable WKV_ISA, meant for tests, forces one; NULL if that one cannot run here. */
WKV_API const char* wkv_isa(void);

/* The instruction sets that can run here, best first, separated by spaces. */
WKV_API const char* wkv_isas(void);

/* (B, T, H, N) with stride 1 in the last dimension. */
typedef struct {
    void* data;
    int64_t dtype;
    int64_t batch, token, head; /* strides */
} wkv_tensor;

/* (B, H, K, V) float32, the last two dimensions contiguous. */
typedef struct {
    float* data;
    int64_t batch, head; /* strides */
} wkv_state;

/* The arguments of wkv7. With cu_seqlens, n_seq sequences lie one after the other in one batch row of `length` tokens,
 * sequence i at [cu_seqlens[i], cu_seqlens[i + 1]), and states have n_seq rows; without, n_seq = B and length = T. */
typedef struct {
    int64_t n_seq, length, H, K, V;
    int64_t n_threads;
    const void* cu_seqlens;      /* n_seq + 1 integers, or NULL */
    int64_t cu_seqlens_is_int64; /* else they are 32 bits wide */
    wkv_tensor r, log_w, k, v, a, b;
    wkv_state state; /* data NULL: zeros */
} wkv7_inputs;

/* Per head, in float32, S the state and d = exp(log_w):
 *     sa = a S,   S <- diag(d) S + b^T sa + k^T v,   o = r S.
 * Writes o (B, T, H, V) and the state after the last token of each sequence. */
typedef struct {
    wkv7_inputs in;
    wkv_tensor o;
    wkv_state final_state;
} wkv7_forward_args;

WKV_API int wkv7_forward(const wkv7_forward_args* args);

/* Gradients of a loss, given those of o and of the final state (data NULL: zeros). The states are computed anew. */
typedef struct {
    wkv7_inputs in;
    wkv_tensor grad_o;
    wkv_state grad_final_state;
    wkv_tensor grad_r, grad_log_w, grad_k, grad_v, grad_a, grad_b;
    wkv_state grad_state; /* data NULL: not wanted */
} wkv7_backward_args;

WKV_API int wkv7_backward(const wkv7_backward_args* args);

/* One token of an RWKV-7 model, all layers: weights, and states that are overwritten. C residual width, A = H K, F
 * hidden units of the feed-forward, L layers. Matrices and vectors are of one dtype and contiguous, matrices row-major
 * (output channels, input channels) unless said otherwise; activations and sums are float32. */
typedef struct {
    const void *attn_norm_weight, *attn_norm_bias, *ffn_norm_weight, *ffn_norm_bias; /* (C) */
    const void *x_r, *x_w, *x_k, *x_v, *x_a, *x_g;                                   /* (C) */
    const void *k_k, *k_a, *r_k, *g_norm_weight, *g_norm_bias;                       /* (A) */
    const void *r_proj, *k_proj, *v_proj, *o_proj;
    const void *w_down, *w_up, *w_bias;
    const void *a_down, *a_up, *a_bias;
    const void *v_down, *v_up, *v_bias; /* not read in layer 0 */
    const void *g_down, *g_up;
    const void* ffn_x_k; /* (C) */
    const void *key, *value;
    int64_t value_by_unit; /* value is (F, C): hidden units whose activation is zero are not read */
} wkv_rwkv7_layer;

typedef struct {
    void *attn_shift, *ffn_shift; /* (B, C) of the weights' dtype */
    float* S;                     /* (B, H, K, K) */
} wkv_rwkv7_layer_state;

typedef struct {
    int64_t B, C, H, K, F, L;
    int64_t w_rank, a_rank, v_rank, g_rank;
    int64_t dtype;
    int64_t n_threads;
    double norm_eps, group_norm_eps;
    const void *pre_norm_weight, *pre_norm_bias, *norm_weight, *norm_bias; /* (C) */
    const wkv_rwkv7_layer* layers;
    const wkv_rwkv7_layer_state* states;
    const void* x; /* (B, C), the embeddings of the tokens */
    void* out;     /* (B, C), the last hidden state, normalised */
} wkv_rwkv7_step_args;

/* The result does not depend on n_threads. */
WKV_API int wkv_rwkv7_step(const wkv_rwkv7_step_args* args);

/* y = x weight^T for few vectors x: every weight is read once, in its own dtype; sums are float32. x (n_rows, n_in) and
 * y (n_rows, n_out) are of the weight's dtype, their rows x_row and y_row elements apart. */
typedef struct {
    int64_t n_rows, n_in, n_out;
    int64_t dtype;
    int64_t n_threads;
    const void* x;
    int64_t x_row;
    const void* weight; /* (n_out, n_in), contiguous */
    void* y;
    int64_t y_row;
} wkv_few_rows_linear_args;

WKV_API int wkv_few_rows_linear(const wkv_few_rows_linear_args* args);

/* What stands between the matrix products of a RWKV-7 block, everything computed in float32.
 * Sums over tokens, the gradients of parameters, do not depend on the number of threads. */

/* n values a token, (B, T, n) with stride 1 in the last dimension. */
typedef struct {
    void* data;
    int64_t dtype;
    int64_t batch, token; /* strides */
} wkv_rows;

/* A contiguous parameter, one value a channel, or its gradient. */
typedef struct {
    void* data;
    int64_t dtype;
} wkv_vector;

/* The A = H N channels of a token are H heads of N. */
typedef struct {
    int64_t B, T, H, N;
    int64_t n_threads;
} rwkv7_sizes;

enum { RWKV7_MAX_MIXES = 6 };

/* mixed[i] = x + (p - x) mixes[i], where p is the token before x: of the same row, or taken from `before`. */
typedef struct {
    rwkv7_sizes sizes; /* H = 1 */
    int64_t n_mixes;
    int64_t before_each; /* `before` has the p of every token; else one token a row, the p of its first */
    wkv_rows x, before;  /* before.data NULL: zeros */
    wkv_vector mixes[RWKV7_MAX_MIXES];
    wkv_rows mixed[RWKV7_MAX_MIXES]; /* in a backward pass, its gradients */
} rwkv7_shift_mix_args;

typedef struct {
    rwkv7_shift_mix_args of;
    wkv_rows grad_x, grad_before; /* grad_before.data NULL: not wanted */
    wkv_vector grad_mixes[RWKV7_MAX_MIXES];
} rwkv7_shift_mix_backward_args;

WKV_API int rwkv7_shift_mix(const rwkv7_shift_mix_args* args);
WKV_API int rwkv7_shift_mix_backward(const rwkv7_shift_mix_backward_args* args);

/* s = sigmoid, per head: log_w = -exp(-1/2) s(raw_w),  kk = raw_k k_k / |raw_k k_k|,  a = -kk,  b = kk s(raw_a),
 * k = raw_k (1 + (s(raw_a) - 1) k_a). */
typedef struct {
    rwkv7_sizes sizes;
    wkv_rows raw_w, raw_k, raw_a;
    wkv_vector k_k, k_a;
    wkv_rows log_w, k, a, b; /* in a backward pass, their gradients */
} rwkv7_key_stage_args;

typedef struct {
    rwkv7_key_stage_args of;
    wkv_rows grad_raw_w, grad_raw_k, grad_raw_a;
    wkv_vector grad_k_k, grad_k_a;
} rwkv7_key_stage_backward_args;

WKV_API int rwkv7_key_stage(const rwkv7_key_stage_args* args);
WKV_API int rwkv7_key_stage_backward(const rwkv7_key_stage_backward_args* args);

/* mixed = v + (v_first - v) sigmoid(raw). */
typedef struct {
    rwkv7_sizes sizes;
    wkv_rows v, v_first, raw;
    wkv_rows mixed; /* in a backward pass, its gradient */
} rwkv7_value_residual_args;

typedef struct {
    rwkv7_value_residual_args of;
    wkv_rows grad_v, grad_v_first, grad_raw;
} rwkv7_value_residual_backward_args;

WKV_API int rwkv7_value_residual(const rwkv7_value_residual_args* args);
WKV_API int rwkv7_value_residual_backward(const rwkv7_value_residual_backward_args* args);

/* Per head: y = (norm(o) weight + bias + (r k r_k summed) v) g, where norm(o) has mean 0 and variance 1. */
typedef struct {
    rwkv7_sizes sizes;
    double eps;
    wkv_rows o, r, k, v, g;
    wkv_vector r_k, weight, bias;
    wkv_rows y; /* in a backward pass, its gradient */
} rwkv7_out_stage_args;

typedef struct {
    rwkv7_out_stage_args of;
    wkv_rows grad_o, grad_r, grad_k, grad_v, grad_g;
    wkv_vector grad_r_k, grad_weight, grad_bias;
} rwkv7_out_stage_backward_args;

WKV_API int rwkv7_out_stage(const rwkv7_out_stage_args* args);
WKV_API int rwkv7_out_stage_backward(const rwkv7_out_stage_backward_args* args);

/* y = max(x, 0)^2. */
typedef struct {
    rwkv7_sizes sizes;
    wkv_rows x;
    wkv_rows y; /* in a backward pass, its gradient */
} rwkv7_relu_squared_args;

typedef struct {
    rwkv7_relu_squared_args of;
    wkv_rows grad_x;
} rwkv7_relu_squared_backward_args;

WKV_API int rwkv7_relu_squared(const rwkv7_relu_squared_args* args);
WKV_API int rwkv7_relu_squared_backward(const rwkv7_relu_squared_backward_args* args);

/* Cross-entropy of logits (n_rows, n_classes), their rows `row` elements apart, and targets in [0, n_classes). Writes
 * the loss of every row, and in place of the logits the gradient of the losses' sum, to which pull times the largest
 * logit is added where that stands (the first of equals). */
typedef struct {
    int64_t n_rows, n_classes;
    int64_t dtype;
    int64_t n_threads;
    void* logits;
    int64_t row;
    const int64_t* targets; /* (n_rows) */
    double pull;
    float* losses; /* (n_rows) */
} wkv_cross_entropy_args;

WKV_API int wkv_cross_entropy(const wkv_cross_entropy_args* args);

/* A trie of byte strings, in `words` that the caller owns. Piece i is bytes[ends[i - 1], ends[i]) and has id i; an
 * empty piece has no id, nor can piece 0 have one. All 256 single bytes must be among the pieces. Returns how many
 * words the trie takes, the rest of `capacity` may be cut off; -1 when they or the memory do not suffice. */
WKV_API int64_t wkv_trie_build(const uint8_t* bytes, const int64_t* ends, int64_t n_pieces, uint64_t* words,
                               int64_t capacity);

/* Greedy longest match. Text i is bytes[ends[i - 1], ends[i]); its counts[i] ids are written from ids[ends[i - 1]] on.
 * spans, or NULL, gets for each id the first character and the one after the last, counted in the text as UTF-8. */
WKV_API void wkv_trie_encode(const uint64_t* words, const uint8_t* bytes, const int64_t* ends, int64_t n_texts,
                             int32_t* ids, int32_t* spans, int64_t* counts, int64_t n_threads);

#ifdef __cplusplus
}
#endif

#endif
