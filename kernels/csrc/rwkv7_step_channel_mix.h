// The channel-mix of the fused RWKV-7 step: phases key and value. Letters as in wkv.h.
#pragma once

#include "rwkv7_step_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

template <int64_t kDtype>
struct ChannelMix {
    const Rwkv7Step& step;
    const wkv_rwkv7_layer& weights;
    const wkv_rwkv7_layer_state& state;
    float* local;
    int64_t B = step.args.B, C = step.args.C, F = step.args.F;

    void prepare(Rwkv7Phase phase) {
        if (phase != kKey) return;
        const void* const mixes[] = {weights.ffn_x_k};
        norm_and_mix<kDtype>(step, local, weights.ffn_norm_weight, weights.ffn_norm_bias, state.ffn_shift, mixes);
    }

    void run(Rwkv7Phase phase, int64_t begin, int64_t end) { phase == kKey ? key(begin, end) : value(begin, end); }

    void key(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, local + B * step.Cp);
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            float* units = step.units + b * step.Fp + row;
            // Written so that NaN stays.
            for (int64_t i = 0; i < count; ++i) units[i] = values[i] < 0.0f ? 0.0f : values[i] * values[i];
        };
        multiply_rows<kDtype>(weights.key, C, begin, end, local, step.Cp, B, write);
    }

    // What the hidden units [begin, end) contribute, summed up in `local`. Where the matrix lies by rows: a like share
    // of the channels, added to the residual.
    void value(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.ffn_shift);
        if (!weights.value_by_unit)
            return add_rows<kDtype>(step, weights.value, F, step.units, step.Fp, channel(begin), channel(end));
        const int64_t n = list_active(begin, end);
        for (int64_t i = 0; i < B * step.Cp; i += kLanes) store(sums() + i, Vec{});
        for (int64_t i = 0; i < kUnitsAhead && i < n; ++i)
            for (int64_t c = 0; c < C * size_of(kDtype); c += 64) __builtin_prefetch(unit_row(i) + c, 0, kSecondLevel);
        int64_t i = 0;
        for (; i + kUnits <= n; i += kUnits) add_units<kUnits>(i, n);
        for (; i < n; ++i) add_units<1>(i, n);
    }

    // The memory of a part of `value`: the numbers of the units that any sequence needs, their activations (n, B), and
    // the sums (B, Cp).
    int32_t* active() const { return reinterpret_cast<int32_t*>(local); }
    float* activations() const { return local + step.Fp; }
    float* sums() const { return local + step.sums_begin(); }

    const char* unit_row(int64_t i) const {
        return static_cast<const char*>(weights.value) + active()[i] * C * size_of(kDtype);
    }

    int64_t channel(int64_t unit) const { return unit == F ? C : unit * C / F / 16 * 16; }

    int64_t list_active(int64_t begin, int64_t end) {
        int64_t n = 0;
        for (int64_t unit = begin; unit < end; ++unit) {
            bool any = false;
            for (int64_t b = 0; b < B; ++b) any |= step.units[b * step.Fp + unit] != 0.0f;
            active()[n] = static_cast<int32_t>(unit);
            n += any;
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t b = 0; b < B; ++b) activations()[i * B + b] = step.units[b * step.Fp + active()[i]];
        return n;
    }

    // Hidden units that go together through the sums. Each sum takes them one after the other, so that a unit whose
    // activation is zero makes no difference whether it is there or not.
    static constexpr int kUnits = 4;
    // How many units ahead memory is asked for.
    static constexpr int64_t kUnitsAhead = 8;

    // Adds the active units [i, i + kN) of n to the sums.
    template <int kN>
    WKV_INLINE void add_units(int64_t i, int64_t n) {
        const char* rows[kN];
        const char* ahead[kN];
        for (int u = 0; u < kN; ++u) {
            rows[u] = unit_row(i + u);
            ahead[u] = i + u + kUnitsAhead < n ? unit_row(i + u + kUnitsAhead) : rows[u];
        }
        const float* factors = activations() + i * B;
        float* to = sums();
        for (int64_t c = 0; c < C; c += kLanes) {
            Vec w[kN];
            for (int u = 0; u < kN; ++u) {
                const int64_t offset = c * size_of(kDtype);
                if (offset % 64 == 0) __builtin_prefetch(ahead[u] + offset, 0, kSecondLevel);
                w[u] = at<kDtype>(rows[u], c, C);
            }
            for (int64_t b = 0; b < B; ++b) {
                Vec y = load(to + b * step.Cp + c);
                for (int u = 0; u < kN; ++u) y += factors[u * B + b] * w[u];
                store(to + b * step.Cp + c, y);
            }
        }
    }
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
