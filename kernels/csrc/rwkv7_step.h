// What the two halves of the fused RWKV-7 step share: rwkv7_step.cpp cuts a layer into phases and the phases into
// parts, rwkv7_step_simd.cpp computes one part.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"
#include "wkv7.h"

namespace wkv {

// The phases of a layer. Each needs the whole of the one before it.
//   project  attention norm, token shift, mixes; rows of r, k, v and of the four low-rank down projections
//   heads    low-rank up projections, the recurrence, group norm, bonus and gate of some heads
//   output   rows of o_proj, added to the residual
//   key      feed-forward norm, token shift, mix; rows of key, squared relu
//   value    hidden units' rows of value, summed up apart and then added to the residual, part after part
enum Rwkv7Phase { kProject, kHeads, kOutput, kKey, kValue, kRwkv7Phases };

// The vectors of one token, float32, one row for each of the B sequences; the tails of rows are zero.
struct Rwkv7Step {
    const wkv_rwkv7_step_args& args;
    int64_t A, Cp, Ap, Fp;
    // Padded ranks of w, a, v, g, and where each begins in a row of `low`.
    int64_t ranks[4], low_begin[4], low_size;
    float *residual, *shifted;       // (B, Cp); what the token shift of the next token needs
    float *r, *k, *v, *v_first, *y;  // (B, Ap)
    float* low;                      // (B, low_size)
    float* units;                    // (B, Fp), the activations of the feed-forward's hidden units

    explicit Rwkv7Step(const wkv_rwkv7_step_args& args)
        : args(args), A(args.H * args.K), Cp(padded(args.C)), Ap(padded(A)), Fp(padded(args.F)) {
        const int64_t sizes[] = {args.w_rank, args.a_rank, args.v_rank, args.g_rank};
        low_size = 0;
        for (int i = 0; i < 4; ++i) {
            ranks[i] = sizes[i];
            low_begin[i] = low_size;
            low_size += padded(sizes[i]);
        }
    }

    int64_t shared_size() const { return args.B * (2 * Cp + 5 * Ap + low_size + Fp); }

    // Memory of one thread, enough for any phase.
    int64_t local_size() const {
        const int64_t B = args.B, Kp = padded(args.K);
        const int64_t project = 7 * B * Cp, value = sums_begin() + B * Cp;
        const int64_t heads = B * low_size + (4 * B + 8) * Kp + wkv7_forward_scratch(args.K, args.K);
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
        residual = take(Cp), shifted = take(Cp);
        r = take(Ap), k = take(Ap), v = take(Ap), v_first = take(Ap), y = take(Ap);
        low = take(low_size);
        units = take(Fp);
    }

    // What a phase is cut along: rows of matrices, heads or channels.
    int64_t length(Rwkv7Phase phase) const {
        switch (phase) {
            case kProject:
                return 3 * A + ranks[0] + ranks[1] + ranks[2] + ranks[3];
            case kHeads:
                return args.H;
            case kKey:
            case kValue:
                return args.F;
            default:
                return args.C;
        }
    }
};

#define WKV_DECLARE(isa)                                                                                              \
    namespace isa {                                                                                                   \
    /* Reads the embeddings into the residual. */                                                                     \
    void rwkv7_begin(const Rwkv7Step& step);                                                                          \
    /* Computes in a thread's own memory what every part of a phase needs. */                                         \
    void rwkv7_prepare(const Rwkv7Step& step, Rwkv7Phase phase, int64_t layer, float* local);                         \
    /* Part [begin, end) of a phase. */                                                                               \
    void rwkv7_run(const Rwkv7Step& step, Rwkv7Phase phase, int64_t layer, int64_t begin, int64_t end, float* local); \
    /* Adds what the thread's last part of kValue left in its memory to the residual. */                              \
    void rwkv7_add(const Rwkv7Step& step, int64_t layer, float* local);                                               \
    /* Writes the normalised residual. */                                                                             \
    void rwkv7_end(const Rwkv7Step& step);                                                                            \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
