// What the forward and the backward pass of wkv7 share: reading the inputs, and one step of the recurrence.
//
// Letters: S state, d = exp(log_w), sa = a S_{t-1}, y = r S_t; ld distance between rows.
#pragma once

#include "wkv7.h"
#include "wkv_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The inputs of one segment in float32, one row of padded(K) or padded(n_v) per token. `a` has one row more than the
// others: the first token of the next segment, zeros at the end.
struct Segment {
    float *r, *d, *k, *b, *a, *v;
};

Segment take_segment(float*& scratch, int64_t Kp, int64_t Vp) {
    Segment x;
    x.r = take(scratch, kSegment * Kp);
    x.d = take(scratch, kSegment * Kp);
    x.k = take(scratch, kSegment * Kp);
    x.b = take(scratch, kSegment * Kp);
    x.a = take(scratch, (kSegment + 1) * Kp);
    x.v = take(scratch, kSegment * Vp);
    return x;
}

// Tokens [begin, end) of the task, end - begin <= kSegment.
void read_segment(const Segment& x, const wkv7_inputs& in, const Task& task, int64_t begin, int64_t end) {
    const int64_t K = in.sizes.K, Kp = padded(K);
    read_rows(x.r, in.r, task, begin, end, 0, K);
    read_rows(x.d, in.log_w, task, begin, end, 0, K);
    read_rows(x.k, in.k, task, begin, end, 0, K);
    read_rows(x.a, in.a, task, begin, end < task.length ? end + 1 : end, 0, K);
    read_rows(x.b, in.b, task, begin, end, 0, K);
    read_rows(x.v, in.v, task, begin, end, task.v_begin, task.v_end - task.v_begin);
    for (int64_t i = 0; i < (end - begin) * Kp; i += kLanes) store(x.d + i, exp(load(x.d + i)));
}

// sa = a S for n_v value channels, a multiple of kLanes.
void read_out(float* sa, const float* a, const float* S, int64_t ld, int64_t K, int64_t n_v) {
    for (int64_t j = 0; j < n_v; j += kLanes) {
        Vec even{}, odd{};
        int64_t i = 0;
        for (; i + 1 < K; i += 2) {
            even += a[i] * load(S + i * ld + j);
            odd += a[i + 1] * load(S + (i + 1) * ld + j);
        }
        if (i < K) even += a[i] * load(S + i * ld + j);
        store(sa + j, even + odd);
    }
}

struct Step {
    const float *d, *k, *b, *r, *a_next;
    const float *v, *sa;
    float *sa_next, *y;
};

// One token for kN vectors of value channels, in one sweep over the state: the new state, what it reads out through r
// and, for the token that follows, through a.
template <int kN, bool kOutput, bool kNext>
WKV_INLINE void step_columns(const Step& x, const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t K) {
    Vec sa[kN], v[kN], y[kN], next[kN];
    for (int j = 0; j < kN; ++j) {
        sa[j] = load(x.sa + j * kLanes);
        v[j] = load(x.v + j * kLanes);
        y[j] = next[j] = Vec{};
    }
    for (int64_t i = 0; i < K; ++i) {
        // Read before any store, which might overlap for all that the compiler knows.
        const float d = x.d[i], b = x.b[i], k = x.k[i], r = kOutput ? x.r[i] : 0.0f, a = kNext ? x.a_next[i] : 0.0f;
        for (int j = 0; j < kN; ++j) {
            const Vec s = k * v[j] + (b * sa[j] + d * load(from + i * ld_from + j * kLanes));
            store(to + i * ld_to + j * kLanes, s);
            if (kOutput) y[j] += r * s;
            if (kNext) next[j] += a * s;
        }
    }
    for (int j = 0; j < kN; ++j) {
        if (kOutput) store(x.y + j * kLanes, y[j]);
        if (kNext) store(x.sa_next + j * kLanes, next[j]);
    }
}

template <bool kOutput, bool kNext>
void step(Step x, const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t K, int64_t n_v) {
    const auto advance = [&](int64_t n) {
        x.v += n, x.sa += n, x.sa_next += n, from += n, to += n;
        if (kOutput) x.y += n;
    };
    for (; n_v >= kTile * kLanes; n_v -= kTile * kLanes, advance(kTile * kLanes))
        step_columns<kTile, kOutput, kNext>(x, from, ld_from, to, ld_to, K);
    if (kTile == 4 && n_v >= 2 * kLanes) {
        step_columns<2, kOutput, kNext>(x, from, ld_from, to, ld_to, K);
        n_v -= 2 * kLanes;
        advance(2 * kLanes);
    }
    for (; n_v > 0; n_v -= kLanes, advance(kLanes)) step_columns<1, kOutput, kNext>(x, from, ld_from, to, ld_to, K);
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
