// The time-mix of RWKV-7 in the fused step. Letters as in wkv.h; kk the removal key, a the in-context learning rate.
#pragma once

#include "rwkv_step_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The decay is exp(-exp(-1/2) * sigmoid(w)).
constexpr float kLogDecayScale = -0.6065306597126334f;

enum { kW, kA, kV, kG };

template <int64_t kDtype>
struct Rwkv7TimeMix : Part {
    const rwkv7_time_mix& own = static_cast<const rwkv7_time_mix*>(step.args.time_mixes)[layer];

    void prepare(RwkvPhase phase) { phase == kProject ? prepare_project() : prepare_heads(); }

    void run(RwkvPhase phase, int64_t begin, int64_t end) {
        phase == kProject ? project_rows(begin, end) : heads(begin, end);
    }

    enum { kMixR, kMixK, kMixV, kMixW, kMixA, kMixG, kMixes };

    void prepare_project() {
        const void* const mixes[] = {own.x_r, own.x_k, own.x_v, own.x_w, own.x_a, own.x_g};
        norm_and_mix<kDtype>(step, local, weights.attn_norm_weight, weights.attn_norm_bias, state.attn_shift, mixes);
    }

    void project_rows(int64_t begin, int64_t end) {
        const auto low = [&](int64_t kind) { return step.low + step.low_begin[kind]; };
        if (begin == 0) keep_shift(step, mixed(kMixes));
        const Projection matrices[] = {
            {WKV_RECEPTANCE, own.receptance, A, step.r, step.Ap},
            {WKV_KEY, own.key, A, step.k, step.Ap},
            {WKV_VALUE, own.value, A, step.v, step.Ap},
            {WKV_W_DOWN, own.w_down, step.ranks[kW], low(kW), step.low_size},
            {WKV_A_DOWN, own.a_down, step.ranks[kA], low(kA), step.low_size},
            {WKV_V_DOWN, own.v_down, layer == 0 ? 0 : step.ranks[kV], low(kV), step.low_size},
            {WKV_G_DOWN, own.g_down, step.ranks[kG], low(kG), step.low_size},
        };
        project<kDtype>(*this, matrices, begin, end);
    }

    float* mixed(int64_t mix) const { return local + mix * B * step.Cp; }

    // Of the projections, and of the up projections as prepare_heads leaves it.
    Input input(int64_t matrix) const {
        if (matrix >= WKV_W_UP) {
            const int64_t kind = matrix - WKV_W_UP;
            return {local + step.low_begin[kind], step.low_size, step.ranks[kind]};
        }
        constexpr int kMix[] = {kMixR, kMixK, kMixV, kMixG, kMixW, kMixA, kMixV, kMixG};
        return {mixed(kMix[matrix]), step.Cp, C};
    }

    void prepare_heads() {
        for (int64_t b = 0; b < B; ++b) {
            const float* from = step.low + b * step.low_size;
            float* to = local + b * step.low_size;
            for (int64_t i = 0; i < step.low_size; i += kLanes) {
                const Vec x = load(from + i);
                store(to + i, i < step.low_begin[kA] ? tanh(x) : i < step.low_begin[kG] ? x : sigmoid(x));
            }
        }
    }

    void heads(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.attn_shift);
        const int64_t Kp = padded(K);
        float* up = local + B * step.low_size;
        const void* const matrices[] = {own.w_up, own.a_up, own.v_up, own.g_up};
        for (int64_t head = begin; head < end; ++head) {
            for (int m = 0; m < 4; ++m) {
                if (m == kV && layer == 0) continue;
                const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
                    __builtin_memcpy(up + (b * 4 + m) * Kp + row - head * K, values, count * sizeof(float));
                };
                multiply<kDtype>(step, layer, WKV_W_UP + m, matrices[m], input(WKV_W_UP + m), head * K, head * K + K,
                                 write);
            }
            for (int64_t b = 0; b < B; ++b) one_head(b, head, up + b * 4 * Kp, up + B * 4 * Kp);
        }
    }

    void one_head(int64_t b, int64_t head, const float* up, float* memory) {
        const int64_t Kp = padded(K), first = head * K, row = b * step.Ap + first;
        float *log_w = memory, *k = log_w + Kp, *v = k + Kp, *kk = v + Kp, *a = kk + Kp, *r = a + Kp, *o = r + Kp;
        const auto weight = [&](const void* w, int64_t i) {
            return at<kDtype>(static_cast<const char*>(w) + first * size_of(kDtype), i, K);
        };
        Vec squares{}, bonus{};
        for (int64_t i = 0; i < K; i += kLanes) {
            const Vec rate = sigmoid(weight(own.a_bias, i) + at(up + kA * Kp, i, K));
            store(log_w + i, kLogDecayScale * sigmoid(weight(own.w_bias, i) + at(up + kW * Kp, i, K)));
            store(a + i, rate);
            const Vec k0 = at(step.k + row, i, K), removal = k0 * weight(own.k_k, i);
            store(kk + i, removal);
            squares += removal * removal;
            const Vec key = k0 + k0 * (rate - 1.0f) * weight(own.k_a, i);
            store(k + i, key);
            Vec value = at(step.v + row, i, K);
            if (layer == 0)
                put(step.v_first + row, value, i, K);
            else
                value +=
                    (at(step.v_first + row, i, K) - value) * sigmoid(weight(own.v_bias, i) + at(up + kV * Kp, i, K));
            store(v + i, value);
            const Vec receptance = at(step.r + row, i, K);
            store(r + i, receptance);
            bonus += receptance * key * weight(own.r_k, i);
        }
        const float length = __builtin_sqrtf(sum(squares)), scale = 1.0f / (length > 1e-12f ? length : 1e-12f);
        for (int64_t i = 0; i < K; i += kLanes) {
            const Vec unit = load(kk + i) * scale;
            store(kk + i, -unit);
            store(a + i, unit * load(a + i));
        }
        recurrence(b, head, r, log_w, k, v, kk, a, o, memory + 8 * Kp);

        const float shared_bonus = sum(bonus);
        group_norm<kDtype>(step, o, head, own.g_norm_weight, own.g_norm_bias, [&](int64_t i, Vec normal) {
            put(step.y + row, (normal + shared_bonus * load(v + i)) * at(up + kG * Kp, i, K), i, K);
        });
    }

    void recurrence(int64_t b, int64_t head, float* r, float* log_w, float* k, float* v, float* a_vector,
                    float* b_vector, float* o, float* scratch) {
        const auto tensor = [](float* x) { return wkv_tensor{x, WKV_FLOAT32, 0, 0, 0}; };
        wkv7_forward_args args{};
        args.in.sizes = {1, 1, 1, K, K, 1, nullptr, 0};
        args.in.r = tensor(r), args.in.log_w = tensor(log_w), args.in.k = tensor(k), args.in.v = tensor(v);
        args.in.a = tensor(a_vector), args.in.b = tensor(b_vector);
        args.in.state.data = args.final_state.data = state.S + (b * step.args.H + head) * K * K;
        args.o = tensor(o);
        Task task{};
        task.length = 1;
        task.v_end = K;
        wkv7_forward(args, task, scratch);
    }
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
