// The channel-mix of the fused step: phases key and value. Letters as in wkv.h.
#pragma once

#include "rwkv_step_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

template <int64_t kDtype>
struct ChannelMix : Part {
    // How many token shifts' mixes stand before the norm.
    int64_t n_mixes() const { return step.has_receptance ? 2 : 1; }

    void prepare(RwkvPhase phase) {
        if (phase != kKey) return;
        if (step.has_receptance) {
            const void* const mixes[] = {weights.ffn_x_k, weights.ffn_x_r};
            norm_and_mix<kDtype>(step, local, weights.ffn_norm_weight, weights.ffn_norm_bias, state.ffn_shift, mixes);
        } else {
            const void* const mix[] = {weights.ffn_x_k};
            norm_and_mix<kDtype>(step, local, weights.ffn_norm_weight, weights.ffn_norm_bias, state.ffn_shift, mix);
        }
    }

    void run(RwkvPhase phase, int64_t begin, int64_t end) { phase == kKey ? key(begin, end) : value(begin, end); }

    void key(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, local + n_mixes() * B * step.Cp);
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            float* units = step.units + b * step.Fp + row;
            // Written so that NaN stays.
            for (int64_t i = 0; i < count; ++i) units[i] = values[i] < 0.0f ? 0.0f : values[i] * values[i];
        };
        multiply_rows<kDtype>(weights.ffn_key, C, begin, end < F ? end : F, local, step.Cp, B, write);
        if (end > F) receptance(begin > F ? begin - F : 0, end - F);
    }

    void receptance(int64_t begin, int64_t end) {
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            const Vec r = sigmoid(load(values));
            __builtin_memcpy(step.receptance + b * step.Cp + row, &r, count * sizeof(float));
        };
        multiply_rows<kDtype>(weights.ffn_receptance, C, begin, end, local + B * step.Cp, step.Cp, B, write);
    }

    // What the hidden units [begin, end) contribute, summed up in `local`. Where the matrix lies by rows: a like share
    // of the channels, added to the residual.
    void value(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.ffn_shift);
        if (!weights.value_by_unit)
            return add_rows<kDtype>(step, weights.ffn_value, F, step.units, step.Fp, channel(begin), channel(end),
                                    step.has_receptance ? step.receptance : nullptr);
        const int64_t n = list_active(begin, end);
        const auto row = [&](int64_t i) {
            return static_cast<const char*>(weights.ffn_value) + active()[i] * C * size_of(kDtype);
        };
        add_scaled<kDtype>(local + step.sums_begin(), step.Cp, n, row, activations(), B, C);
    }

    // The memory of a part of `value`: the numbers of the units that any sequence needs, their activations (n, B), and
    // the sums (B, Cp).
    int32_t* active() const { return reinterpret_cast<int32_t*>(local); }
    float* activations() const { return local + step.Fp; }

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
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
