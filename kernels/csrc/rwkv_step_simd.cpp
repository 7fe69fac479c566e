// One part of a phase of the fused step. Weights are widened in registers, everything else is float32.
#include "rwkv4_time_mix.h"
#include "rwkv6_time_mix.h"
#include "rwkv7_time_mix.h"
#include "rwkv_step_channel_mix.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// Calls f with the half of a layer that a phase belongs to.
template <class F>
WKV_INLINE void with_half(const RwkvStep& step, RwkvPhase phase, int64_t layer, float* local, const F& f) {
    with_dtype(step.args.dtype, [&]<int64_t kDtype>() {
        const int64_t generation = step.args.generation;
        if (phase >= kKeyInner)
            f(ChannelMix<kDtype>{{step, layer, local}});
        else if (generation == 4)
            f(Rwkv4TimeMix<kDtype>{{step, layer, local}});
        else if (generation == 7)
            f(Rwkv7TimeMix<kDtype>{{step, layer, local}});
        else
            f(Rwkv6TimeMix<kDtype>{{step, layer, local}});
    });
}

}  // namespace

void rwkv_step_begin(const RwkvStep& step) {
    const rwkv_step_args& args = step.args;
    with_dtype(args.dtype, [&]<int64_t kDtype>() {
        for (int64_t b = 0; b < args.B; ++b) {
            float* h = step.residual + b * step.Cp;
            widen_all<kDtype>(h, static_cast<const char*>(args.x) + b * args.C * size_of(kDtype), args.C, step.Cp);
            layer_norm<kDtype>(h, h, args.C, args.pre_norm_weight, args.pre_norm_bias, args.norm_eps);
        }
    });
}

void rwkv_step_prepare(const RwkvStep& step, RwkvPhase phase, int64_t layer, float* local) {
    if (phase != kOutput) with_half(step, phase, layer, local, [&](auto&& half) { half.prepare(phase); });
}

void rwkv_step_run(const RwkvStep& step, RwkvPhase phase, int64_t layer, int64_t begin, int64_t end, float* local) {
    const auto output_input = [&](int64_t) { return Input{step.y, step.Ap, step.A}; };
    if (phase == kOutputInner) return inner_values(step, phase, layer, begin, end, output_input);
    if (phase == kOutput)
        return with_dtype(step.args.dtype, [&]<int64_t kDtype>() {
            const void* w = step.args.layers[layer].output;
            add_rows<kDtype>(step, layer, WKV_OUTPUT, w, output_input(WKV_OUTPUT), begin, end);
        });
    with_half(step, phase, layer, local, [&](auto&& half) {
        if (!is_inner(phase)) return half.run(phase, begin, end);
        inner_values(step, phase, layer, begin, end, [&](int64_t matrix) { return half.input(matrix); });
    });
}

void rwkv_step_add(const RwkvStep& step, int64_t layer, float* local) {
    if (!step.args.layers[layer].value_by_unit) return;
    const float* sums = local + step.sums_begin();
    float* h = step.residual;
    for (int64_t i = 0; i < step.args.B * step.Cp; i += kLanes) {
        const Vec update = load(sums + i);
        store(h + i, load(h + i) + (step.has_receptance ? load(step.receptance + i) * update : update));
    }
}

void rwkv_step_end(const RwkvStep& step) {
    const rwkv_step_args& args = step.args;
    with_dtype(args.dtype, [&]<int64_t kDtype>() {
        for (int64_t b = 0; b < args.B; ++b) {
            float* h = step.residual + b * step.Cp;
            layer_norm<kDtype>(h, h, args.C, args.norm_weight, args.norm_bias, args.norm_eps);
            pack(static_cast<char*>(args.out) + b * args.C * size_of(kDtype), h, kDtype, args.C);
        }
    });
}

}  // namespace WKV_SIMD
}  // namespace wkv
