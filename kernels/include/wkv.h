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
