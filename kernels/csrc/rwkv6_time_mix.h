// The time-mix of RWKV-6 in the fused step, and of RWKV-5, whose mixes and decay do not depend on the token. Letters as
// in wkv.h.
#pragma once

#include "rwkv_step_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

template <int64_t kDtype>
struct Rwkv6TimeMix : Part {
    const rwkv6_time_mix& own = static_cast<const rwkv6_time_mix*>(step.args.time_mixes)[layer];
    const bool by_token = step.args.generation == 6;

    // Low-rank values: of the mixes, kTokenMixes for each rank, and of the decay.
    enum { kOfMixes, kOfDecay };
    // Mixes in the order of memory, which is that of the matrices.
    enum { kMixR, kMixK, kMixV, kMixG, kMixW };

    void prepare(RwkvPhase phase) {
        const void *weight = weights.attn_norm_weight, *bias = weights.attn_norm_bias;
        if (phase == kLow) {
            const void* const mixes[] = {own.x_x};
            norm_and_mix<kDtype>(step, local, weight, bias, state.attn_shift, mixes);
        } else if (phase == kProject && !by_token) {
            // Without a gate its mix is that of r, for nobody.
            const void* const mixes[] = {own.x_r, own.x_k, own.x_v, step.has_gate ? own.x_g : own.x_r};
            norm_and_mix<kDtype>(step, local, weight, bias, state.attn_shift, mixes);
        }
    }

    void run(RwkvPhase phase, int64_t begin, int64_t end) {
        if (phase == kLow)
            low(begin, end);
        else if (phase == kMix)
            mix(begin, end);
        else if (phase == kProject)
            project_rows(begin, end);
        else
            heads(begin, end);
    }

    void low(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, local + B * step.Cp);
        low_values(own.mix_w1, kOfMixes, begin, end, local, local + 2 * B * step.Cp);
    }

    // tanh(x w) for some columns of w, (C, rank).
    void low_values(const void* w, int64_t kind, int64_t begin, int64_t end, const float* x, float* sums) {
        const int64_t n = end - begin, ld = padded(n);
        multiply_columns<kDtype>(sums, w, C, step.ranks[kind], begin, end, x, step.Cp, B);
        for (int64_t b = 0; b < B; ++b)
            for (int64_t i = 0; i < n; i += kLanes)
                put(step.low + b * step.low_size + step.low_begin[kind] + begin, tanh(load(sums + b * ld + i)), i, n);
    }

    Input input(int64_t matrix) const { return {mixed(matrix), step.Cp, C}; }

    float* mixed(int64_t which) const { return (by_token ? step.mixed : local) + which * B * step.Cp; }

    // The norm is in `shifted`; the state still has the token before.
    void mix(int64_t begin, int64_t end) {
        // In the order of mix_w1 and mix_w2.
        const struct {
            const void* base;
            float* to;
        } mixes[kTokenMixes] = {{own.x_w, mixed(kMixW)},
                                {own.x_k, mixed(kMixK)},
                                {own.x_v, mixed(kMixV)},
                                {own.x_r, mixed(kMixR)},
                                {own.x_g, mixed(kMixG)}};
        const int64_t R = step.args.ranks[kOfMixes], n = end - begin, ld = padded(n);
        const auto channel = [&](const void* x, int64_t row) {
            return static_cast<const char*>(x) + (row * C + begin) * size_of(kDtype);
        };
        for (int64_t m = 0; m < kTokenMixes; ++m) {
            const char* w = static_cast<const char*>(own.mix_w2) + m * R * C * size_of(kDtype);
            multiply_columns<kDtype>(local, w, R, C, begin, end, step.low + m * R, step.low_size, B);
            for (int64_t b = 0; b < B; ++b)
                for (int64_t i = 0; i < n; i += kLanes) {
                    const Vec x = at(step.shifted + b * step.Cp + begin, i, n);
                    const Vec delta = at<kDtype>(channel(state.attn_shift, b), i, n) - x;
                    const Vec share = at<kDtype>(channel(mixes[m].base, 0), i, n) + load(local + b * ld + i);
                    put(mixes[m].to + b * step.Cp + begin, x + delta * share, i, n);
                }
        }
    }

    void project_rows(int64_t begin, int64_t end) {
        // Behind the mixes that depend on no token stands the norm.
        if (begin == 0 && !by_token) keep_shift(step, mixed(4));
        const Projection matrices[] = {
            {WKV_RECEPTANCE, own.receptance, A, step.r, step.Ap},
            {WKV_KEY, own.key, A, step.k, step.Ap},
            {WKV_VALUE, own.value, A, step.v, step.Ap},
            {WKV_GATE, own.gate, step.has_gate ? A : 0, step.g, step.Ap},
        };
        project<kDtype>(*this, matrices, begin, end);
        const int64_t first = 4 * A;
        if (by_token && end > first)
            low_values(own.decay_w1, kOfDecay, begin > first ? begin - first : 0, end - first, mixed(kMixW), local);
    }

    void heads(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.attn_shift);
        const int64_t Kp = padded(K);
        float* raw = local;
        for (int64_t i = 0; i < B * Kp; i += kLanes) store(raw + i, Vec{});
        for (int64_t head = begin; head < end; ++head) {
            if (by_token)
                multiply_columns<kDtype>(raw, own.decay_w2, step.ranks[kOfDecay], A, head * K, head * K + K,
                                         step.low + step.low_begin[kOfDecay], step.low_size, B);
            for (int64_t b = 0; b < B; ++b) one_head(b, head, raw + b * Kp, raw + B * (Kp + step.low_size));
        }
    }

    // The values i to i + kLanes of a head, or that of the whole head.
    WKV_INLINE Vec of_head(const void* w, int64_t head, int64_t i) const {
        if (step.args.per_head) return Vec{} + at<kDtype>(w, head, H)[0];
        return at<kDtype>(static_cast<const char*>(w) + head * K * size_of(kDtype), i, K);
    }

    void one_head(int64_t b, int64_t head, const float* raw, float* memory) {
        const int64_t Kp = padded(K), row = b * step.Ap + head * K;
        float *log_w = memory, *u = log_w + Kp, *o = u + Kp;
        for (int64_t i = 0; i < K; i += kLanes) {
            store(log_w + i, -exp(of_head(own.decay, head, i) + load(raw + i)));
            const Vec bonus = of_head(own.bonus, head, i);
            store(u + i, step.args.bonus_is_log ? exp(bonus) : bonus);
        }
        recurrence(b, head, log_w, u, o, o + Kp);
        group_norm<kDtype>(step, o, head, own.norm_weight, own.norm_bias, [&](int64_t i, Vec normal) {
            const Vec g = at(step.g + row, i, K);
            put(step.y + row, step.has_gate ? normal * g * sigmoid(g) : normal, i, K);
        });
    }

    void recurrence(int64_t b, int64_t head, float* log_w, float* u, float* o, float* scratch) {
        const auto tensor = [](float* x) { return wkv_tensor{x, WKV_FLOAT32, 0, 0, 0}; };
        const int64_t row = b * step.Ap + head * K;
        wkv6_forward_args args{};
        args.in.sizes = {1, 1, 1, K, K, 1, nullptr, 0};
        args.in.r = tensor(step.r + row), args.in.log_w = tensor(log_w), args.in.u = tensor(u);
        args.in.k = tensor(step.k + row), args.in.v = tensor(step.v + row);
        args.in.state.data = args.final_state.data = state.S + (b * H + head) * K * K;
        args.o = tensor(o);
        Task task{};
        task.length = 1;
        task.v_end = K;
        wkv6_forward(args, task, scratch);
    }
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
