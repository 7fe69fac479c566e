// What the two halves of the fused step share: rwkv_step.cpp cuts a layer into phases and the phases into parts,
// rwkv_step_simd.cpp computes one part.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"
#include "wkv4.h"
#include "wkv6.h"
#include "wkv7.h"

namespace wkv {

// The phases of a layer. Each needs the whole of the one before it.
//   low      RWKV-6: attention norm, token shift, mix; the low-rank values that the other mixes depend on
//   mix      RWKV-6: these mixes
//   project  else attention norm, token shift, mixes; rows of the projections and of low-rank down projections
//   heads    low-rank up projections, the recurrence, group norm, bonus and gate of some heads
//   output   rows of the output projection, added to the residual
//   key      feed-forward norm, token shift, mixes; rows of key, squared relu; rows of receptance
//   value    hidden units' rows of value, summed up apart and then added to the residual, part after part
// Where adapters add to a phase's products, a phase before it computes their inner values, down x.
enum RwkvPhase {
    kLow,
    kMix,
    kProjectInner,
    kProject,
    kHeadsInner,
    kHeads,
    kOutputInner,
    kOutput,
    kKeyInner,
    kKey,
    kValueInner,
    kValue,
    kRwkvPhases
};

__attribute__((always_inline)) constexpr bool is_inner(int64_t phase) {
    return phase == kProjectInner || phase == kHeadsInner || phase == kOutputInner || phase == kKeyInner ||
           phase == kValueInner;
}

// The phase that computes the product with a matrix.
__attribute__((always_inline)) constexpr RwkvPhase phase_of(int64_t matrix) {
    return matrix < WKV_W_UP        ? kProject
           : matrix < WKV_OUTPUT    ? kHeads
           : matrix < WKV_FFN_KEY   ? kOutput
           : matrix < WKV_FFN_VALUE ? kKey
                                    : kValue;
}

// Mixes of RWKV-6 that depend on the token: w, k, v, r, g.
constexpr int64_t kTokenMixes = 5;

// The vectors of one token, float32, one row for each of the B sequences; the tails of rows are zero.
struct RwkvStep {
    const rwkv_step_args& args;
    int64_t A, Cp, Ap, Fp;
    // Low-rank values by kind, and where each begins in a row of `low`.
    int64_t ranks[4], low_begin[4], low_size;
    int64_t inner_size;
    bool has_gate, has_receptance;
    float *residual, *shifted;           // (B, Cp); what the token shift of the next token needs
    float *r, *k, *v, *g, *v_first, *y;  // (B, Ap)
    float* low;                          // (B, low_size)
    float* units;                        // (B, Fp), the activations of the feed-forward's hidden units
    float* receptance;                   // (B, Cp), of the feed-forward
    float* mixed;                        // (kTokenMixes, B, Cp)
    float* inner;                        // of the terms of a layer one after the other, each (B, padded(rank))

    explicit RwkvStep(const rwkv_step_args& args)
        : args(args), A(args.H * args.K), Cp(padded(args.C)), Ap(padded(A)), Fp(padded(args.F)) {
        low_size = 0;
        for (int i = 0; i < 4; ++i) {
            ranks[i] = args.ranks[i] * (args.generation == 6 && i == 0 ? kTokenMixes : 1);
            low_begin[i] = low_size;
            low_size += padded(ranks[i]);
        }
        inner_size = 0;
        for (int64_t i = 0; i < args.L; ++i) {
            int64_t size = 0;
            for (int64_t t = 0; t < args.layers[i].n_terms; ++t) size += padded(args.layers[i].terms[t].rank);
            if (size > inner_size) inner_size = size;
        }
        const bool as_rwkv6 = args.generation == 5 || args.generation == 6;
        has_gate = as_rwkv6 && static_cast<const rwkv6_time_mix*>(args.time_mixes)->gate != nullptr;
        has_receptance = args.generation != 7;
    }

    int64_t mixed_size() const { return args.generation == 6 ? kTokenMixes * Cp : 0; }
    int64_t shared_size() const { return args.B * (3 * Cp + 6 * Ap + low_size + Fp + mixed_size() + inner_size); }

    // Memory of one thread, enough for any phase.
    int64_t local_size() const {
        const int64_t B = args.B, K = args.K, Kp = padded(K);
        const int64_t project = B * (7 * Cp + low_size), value = sums_begin() + B * Cp;
        const int64_t recurrences[] = {wkv4_forward_scratch(kWkv4Widest), wkv6_forward_scratch(K, K),
                                       wkv7_forward_scratch(K, K)};
        int64_t heads = 0;
        for (int64_t n : recurrences) heads = n > heads ? n : heads;
        heads += B * low_size + (4 * B + 8) * Kp;
        const int64_t larger = project > value ? project : value;
        return padded(larger > heads ? larger : heads);
    }

    // Where a part of `value` leaves its sums in the memory of its thread: behind the list of its units.
    __attribute__((always_inline)) int64_t sums_begin() const { return (1 + args.B) * Fp; }

    void place(float* memory) {
        const auto take = [&](int64_t n) {
            float* taken = memory;
            memory += args.B * n;
            return taken;
        };
        residual = take(Cp), shifted = take(Cp), receptance = take(Cp);
        r = take(Ap), k = take(Ap), v = take(Ap), g = take(Ap), v_first = take(Ap), y = take(Ap);
        low = take(low_size);
        units = take(Fp);
        mixed = take(mixed_size());
        inner = take(inner_size);
    }

    // What a phase is cut along: rows or columns of matrices, heads or channels; 0 where there is no such phase.
    int64_t length(RwkvPhase phase) const {
        if (is_inner(phase)) return inner_length(static_cast<RwkvPhase>(phase + 1));
        switch (phase) {
            case kLow:
                return args.generation == 6 ? ranks[0] : 0;
            case kMix:
                return args.generation == 6 ? args.C : 0;
            case kProject:
                return (has_gate ? 4 : 3) * A + (args.generation == 6 ? 0 : ranks[0]) + ranks[1] + ranks[2] + ranks[3];
            case kHeads:
                return args.H;
            case kKey:
                return args.F + (has_receptance ? args.C : 0);
            case kValue:
                return args.F;
            default:
                return args.C;
        }
    }

    // The inner values of a phase's terms, of the layer that has most.
    int64_t inner_length(RwkvPhase phase) const {
        int64_t longest = 0;
        for (int64_t i = 0; i < args.L; ++i) {
            int64_t n = 0;
            for (int64_t t = 0; t < args.layers[i].n_terms; ++t) {
                const wkv_low_rank& term = args.layers[i].terms[t];
                if (phase_of(term.matrix) == phase) n += term.rank;
            }
            if (n > longest) longest = n;
        }
        return longest;
    }
};

#define WKV_DECLARE(isa)                                                                                 \
    namespace isa {                                                                                      \
    /* Reads the embeddings into the residual. */                                                        \
    void rwkv_step_begin(const RwkvStep& step);                                                          \
    /* Computes in a thread's own memory what every part of a phase, and of its inner values, needs. */  \
    void rwkv_step_prepare(const RwkvStep& step, RwkvPhase phase, int64_t layer, float* local);          \
    /* Part [begin, end) of a phase. */                                                                  \
    void rwkv_step_run(const RwkvStep& step, RwkvPhase phase, int64_t layer, int64_t begin, int64_t end, \
                       float* local);                                                                    \
    /* Adds what the thread's last part of kValue left in its memory to the residual. */                 \
    void rwkv_step_add(const RwkvStep& step, int64_t layer, float* local);                               \
    /* Writes the normalised residual. */                                                                \
    void rwkv_step_end(const RwkvStep& step);                                                            \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
