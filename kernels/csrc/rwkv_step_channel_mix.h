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

    Input input(int64_t matrix) const {
        if (matrix == WKV_FFN_VALUE) return {step.units, step.Fp, F};
        return {local + (matrix - WKV_FFN_KEY) * B * step.Cp, step.Cp, C};
    }

    template <class Use>
    void multiply_part(int64_t matrix, const void* w, int64_t begin, int64_t end, const Use& use) {
        multiply<kDtype>(step, layer, matrix, w, input(matrix), begin, end, use);
    }

    void key(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, local + n_mixes() * B * step.Cp);
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            float* units = step.units + b * step.Fp + row;
            // Written so that NaN stays.
            for (int64_t i = 0; i < count; ++i) units[i] = values[i] < 0.0f ? 0.0f : values[i] * values[i];
        };
        multiply_part(WKV_FFN_KEY, weights.ffn_key, begin, end < F ? end : F, write);
        if (end > F) receptance(begin > F ? begin - F : 0, end - F);
    }

    void receptance(int64_t begin, int64_t end) {
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            const Vec r = sigmoid(load(values));
            __builtin_memcpy(step.receptance + b * step.Cp + row, &r, count * sizeof(float));
        };
        multiply_part(WKV_FFN_RECEPTANCE, weights.ffn_receptance, begin, end, write);
    }

    // What the hidden units [begin, end) contribute, summed up in `local`, and what adapters add to a like share of the
    // channels. Where the matrix lies by rows: that share of everything, added to the residual.
    void value(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.ffn_shift);
        if (!weights.value_by_unit)
            return add_rows<kDtype>(step, layer, WKV_FFN_VALUE, weights.ffn_value, input(WKV_FFN_VALUE), channel(begin),
                                    channel(end), step.has_receptance ? step.receptance : nullptr);
        const int64_t n = list_active(begin, end);
        const auto row = [&](int64_t i) {
            return static_cast<const char*>(weights.ffn_value) + active()[i] * C * size_of(kDtype);
        };
        float* sums = local + step.sums_begin();
        add_scaled<kDtype>(sums, step.Cp, n, row, activations(), B, C);
        const Terms terms = terms_of(step, layer, WKV_FFN_VALUE);
        const int64_t last = channel(end);
        for (int64_t i = channel(begin); terms.n > 0 && i < last; i += kLanes) {
            const int64_t count = last - i < kLanes ? last - i : kLanes;
            for (int64_t b = 0; b < B; ++b) {
                float* to = sums + b * step.Cp + i;
                store(to, load(to) + product(step, terms, b, i, count));
            }
        }
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
