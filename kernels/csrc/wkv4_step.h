// What the forward and the backward pass of wkv4 share: inputs, states and weights.
//
// Letters: a, b, p the state of a channel, A = a e^p and B = b e^p; m = a / b, the mean of the values so far.
#pragma once

#include "wkv4.h"
#include "wkv_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The p of an empty state: its weight is zero beside any key.
constexpr float kEmpty = -1e38f;
// Erases every state, and can be added and subtracted.
constexpr float kLowest = -1e30f;

// The inputs of one block in float32, one row of Vp per token. Rows of w are `w_row` apart: 0 where tokens share one.
struct Inputs {
    const wkv4_inputs& in;
    const Task& task;
    const int64_t n, Vp, w_row;
    float *w, *u, *k, *v;

    Inputs(const wkv4_inputs& in, const Task& task, float*& scratch)
        : in(in), task(task), n(task.v_end - task.v_begin), Vp(padded(n)), w_row(in.log_w.token == 0 ? 0 : Vp) {
        w = take(scratch, kBlock * Vp);
        u = take(scratch, Vp);
        k = take(scratch, kBlock * Vp);
        v = take(scratch, kBlock * Vp);
        read_row(u, in.u, task, 0, task.v_begin, n);
        if (w_row == 0 && task.length > 0) read_decay(0, 1);
    }

    void read_decay(int64_t begin, int64_t end) {
        read_rows(w, in.log_w, task, begin, end, task.v_begin, n);
        for (int64_t i = 0; i < (end - begin) * Vp; i += kLanes) {
            const Vec x = load(w + i);
            store(w + i, x < kLowest ? Vec{} + kLowest : x);
        }
    }

    void read(int64_t begin, int64_t end) {
        if (w_row != 0) read_decay(begin, end);
        read_rows(k, in.k, task, begin, end, task.v_begin, n);
        read_rows(v, in.v, task, begin, end, task.v_begin, n);
    }
};

// p, with what float32 lost of it: a constant decay would be rounded alike in every step.
struct Exponent {
    Vec high, low;

    WKV_INLINE void add(Vec x) {
        const Vec sum = high + x, added = sum - high;
        low += (high - (sum - added)) + (x - added);
        high = sum;
    }
};

// How much the past and the current token count; the larger is 1.
struct Weights {
    Vec past, token;
};

// e^(p - q) and e^(s - q) with q = max(p, s), given p - s.
WKV_INLINE Weights weigh(Vec difference) {
    const Vec one = Vec{} + 1.0f, less = exp(difference >= 0.0f ? -difference : difference);
    return {difference >= 0.0f ? one : less, difference >= 0.0f ? less : one};
}

// u + k would lose digits of u.
WKV_INLINE Weights weigh_output(const Exponent& p, Vec u, Vec k) {
    return weigh(((p.high - k) - u) + p.low);
}

// p becomes that of the state with the token.
WKV_INLINE Weights weigh_update(Exponent& p, Vec w, Vec k) {
    p.add(w);
    const Vec difference = (p.high - k) + p.low;
    p.high = difference >= 0.0f ? p.high : k;
    p.low = difference >= 0.0f ? p.low : Vec{};
    return weigh(difference);
}

// One state of the task's channels: rows of a or m, b, and p in two parts.
struct State {
    float *first, *b, *high, *low;

    State(float* memory, int64_t Vp) : first(memory), b(memory + Vp), high(memory + 2 * Vp), low(memory + 3 * Vp) {}
};

WKV_INLINE float* channels(const wkv_state& x, const Task& task) {
    return x.data + task.state_row * x.batch + 3 * task.v_begin;
}

// a, b and p of a caller's state.
inline void read_channels(const State& to, const wkv_state& from, const Task& task, int64_t n) {
    for (int64_t i = 0; i < padded(n); ++i) {
        to.first[i] = to.b[i] = to.low[i] = 0.0f;
        to.high[i] = kEmpty;
    }
    if (from.data == nullptr) return;
    const float* x = channels(from, task);
    for (int64_t i = 0; i < n; ++i) {
        to.first[i] = x[3 * i], to.b[i] = x[3 * i + 1];
        if (to.b[i] != 0.0f) to.high[i] = x[3 * i + 2];
    }
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
