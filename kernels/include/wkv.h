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

/* The size of a recurrence. With cu_seqlens, n_seq sequences lie one after the other in one batch row of `length`
 * tokens, sequence i at [cu_seqlens[i], cu_seqlens[i + 1]), and states have n_seq rows; without, n_seq = B and length =
 * T. */
typedef struct {
    int64_t n_seq, length, H, K, V;
    int64_t n_threads;
    const void* cu_seqlens;      /* n_seq + 1 integers, or NULL */
    int64_t cu_seqlens_is_int64; /* else they are 32 bits wide */
} wkv_sizes;

typedef struct {
    wkv_sizes sizes;
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

/* wkv4, of RWKV-4. In sizes, V is the number of channels, H = K = 1; tensors have one head. u has one row (strides 0).
 * The token or batch stride of log_w is 0 where tokens or rows share a decay. A channel's state is a, b, p, for A = a
 * e^p and B = b e^p; where b is 0 it is empty, whatever p. */
typedef struct {
    wkv_sizes sizes;
    wkv_tensor log_w, u, k, v;
    wkv_state state; /* (n_seq, V, 3); data NULL: empty */
} wkv4_inputs;

/* Per channel, in float32:
 *     o = (A + e^(u + k) v) / (B + e^(u + k)),   A <- e^log_w A + e^k v,   B <- e^log_w B + e^k. */
typedef struct {
    wkv4_inputs in;
    wkv_tensor o;
    wkv_state final_state;
} wkv4_forward_args;

WKV_API int wkv4_forward(const wkv4_forward_args* args);

/* Gradients; those of log_w and u as for wkv6. The p of the final state counts as a constant: the gradients of its a
 * and b are taken at that p, its own is not read. */
typedef struct {
    wkv4_inputs in;
    wkv_tensor grad_o;
    wkv_state grad_final_state;
    wkv_tensor grad_log_w, grad_u, grad_k, grad_v;
    wkv_state grad_state; /* data NULL: not wanted */
} wkv4_backward_args;

WKV_API int wkv4_backward(const wkv4_backward_args* args);

/* wkv6, of RWKV-6 and RWKV-5. u has one row a head (strides of batch and token 0). The token or batch stride of log_w
 * is 0 where tokens or rows share a decay. */
typedef struct {
    wkv_sizes sizes;
    wkv_tensor r, log_w, u, k, v;
    wkv_state state; /* data NULL: zeros */
} wkv6_inputs;

/* Per head, in float32, S the state and d = exp(log_w):
 *     o = r (S + diag(u) k^T v),   S <- diag(d) S + k^T v.
 * Writes o (B, T, H, V) and the state after the last token of each sequence. */
typedef struct {
    wkv6_inputs in;
    wkv_tensor o;
    wkv_state final_state;
} wkv6_forward_args;

WKV_API int wkv6_forward(const wkv6_forward_args* args);

/* Gradients, as for wkv7. That of log_w is summed over the tokens of a sequence where its token stride is 0, then over
 * sequences too where its batch stride is 0; that of u is summed over both. */
typedef struct {
    wkv6_inputs in;
    wkv_tensor grad_o;
    wkv_state grad_final_state;
    wkv_tensor grad_r, grad_log_w, grad_u, grad_k, grad_v;
    wkv_state grad_state; /* data NULL: not wanted */
} wkv6_backward_args;

WKV_API int wkv6_backward(const wkv6_backward_args* args);

/* One token of a model of RWKV-4, 5, 6 or 7, all layers: weights, and states that are overwritten. C residual width,
 * A = H K (RWKV-4: heads of one channel), F hidden units of the feed-forward, L layers. Matrices and vectors are of one
 * dtype and contiguous, matrices row-major (output channels, input channels) unless said otherwise; activations and
 * sums are float32. The mixes x_* count the current token in RWKV-4 and 5, the one before in later ones. */
typedef struct wkv_low_rank wkv_low_rank;

typedef struct {
    const void *attn_norm_weight, *attn_norm_bias, *ffn_norm_weight, *ffn_norm_bias; /* (C) */
    const void* output;
    const void *ffn_x_k, *ffn_x_r;                    /* (C) */
    const void *ffn_key, *ffn_receptance, *ffn_value; /* RWKV-7 has no receptance */
    int64_t value_by_unit;     /* value is (F, C): hidden units whose activation is zero are not read */
    const wkv_low_rank* terms; /* in the order of their matrices */
    int64_t n_terms;
} rwkv_step_layer;

/* The matrices of a layer. Down and up are those of RWKV-7's own low-rank values. */
enum {
    WKV_RECEPTANCE,
    WKV_KEY,
    WKV_VALUE,
    WKV_GATE,
    WKV_W_DOWN,
    WKV_A_DOWN,
    WKV_V_DOWN,
    WKV_G_DOWN,
    WKV_W_UP,
    WKV_A_UP,
    WKV_V_UP,
    WKV_G_UP,
    WKV_OUTPUT,
    WKV_FFN_KEY,
    WKV_FFN_RECEPTANCE,
    WKV_FFN_VALUE
};

/* What an adapter adds to the product of a matrix with x: scale * up (down x). A matrix may have several. */
struct wkv_low_rank {
    int64_t matrix, rank;
    double scale;
    const void *down, *up; /* (rank, input channels), (output channels, rank), contiguous */
    int64_t down_dtype, up_dtype;
};

typedef struct {
    const void *x_r, *x_k, *x_v; /* (C) */
    const void *receptance, *key, *value;
    const void *decay, *bonus; /* (A): log_w = -exp(decay) */
} rwkv4_time_mix;

/* RWKV-5 has no mix or decay by the token, RWKV-5.0 no gate. */
typedef struct {
    const void *x_r, *x_k, *x_v, *x_g; /* (C) */
    const void *receptance, *key, *value, *gate;
    const void *decay, *bonus;           /* (A), or one value a head */
    const void *norm_weight, *norm_bias; /* (A) */
    const void *x_x, *x_w;               /* (C) */
    const void *mix_w1, *mix_w2;         /* (C, 5 R), (5, R, C), for w, k, v, r, g */
    const void *decay_w1, *decay_w2;     /* (C, rank), (rank, A) */
} rwkv6_time_mix;

typedef struct {
    const void *x_r, *x_w, *x_k, *x_v, *x_a, *x_g;             /* (C) */
    const void *k_k, *k_a, *r_k, *g_norm_weight, *g_norm_bias; /* (A) */
    const void *receptance, *key, *value;
    const void *w_down, *w_up, *w_bias;
    const void *a_down, *a_up, *a_bias;
    const void *v_down, *v_up, *v_bias; /* not read in layer 0 */
    const void *g_down, *g_up;
} rwkv7_time_mix;

typedef struct {
    void *attn_shift, *ffn_shift; /* (B, C) of the weights' dtype */
    float* S;                     /* (B, H, K, K), RWKV-4: (B, A, 3) as in wkv4 */
} rwkv_step_state;

typedef struct {
    int64_t generation; /* 4 to 7 */
    int64_t B, C, H, K, F, L;
    int64_t ranks[4]; /* RWKV-7: of w, a, v, g; RWKV-6: R, and that of the decay; else 0 */
    int64_t per_head,
        bonus_is_log; /* RWKV-5: decay and bonus have one value a head; the bonus is exp of what is given */
    int64_t dtype;
    int64_t n_threads;
    double norm_eps, group_norm_eps;
    const void *pre_norm_weight, *pre_norm_bias, *norm_weight, *norm_bias; /* (C) */
    const rwkv_step_layer* layers;
    const void* time_mixes; /* of the layers: rwkv4_time_mix, rwkv6_time_mix (RWKV-5 too) or rwkv7_time_mix */
    const rwkv_step_state* states;
    const void* x; /* (B, C), the embeddings of the tokens */
    void* out;     /* (B, C), the last hidden state, normalised */
} rwkv_step_args;

/* The result does not depend on n_threads. */
WKV_API int rwkv_step(const rwkv_step_args* args);

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
