// The time-mix of RWKV-4 in the fused step. Letters as in wkv.h; a head is one channel.
#pragma once

#include "rwkv_step_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

template <int64_t kDtype>
struct Rwkv4TimeMix : Part {
    const rwkv4_time_mix& own = static_cast<const rwkv4_time_mix*>(step.args.time_mixes)[layer];

    void prepare(RwkvPhase phase) {
        if (phase != kProject) return;
        const void* const mixes[] = {own.x_r, own.x_k, own.x_v};
        norm_and_mix<kDtype>(step, local, weights.attn_norm_weight, weights.attn_norm_bias, state.attn_shift, mixes);
    }

    void run(RwkvPhase phase, int64_t begin, int64_t end) {
        phase == kProject ? project_rows(begin, end) : channels(begin, end);
    }

    void project_rows(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, mixed(3));
        const Projection matrices[] = {
            {WKV_RECEPTANCE, own.receptance, A, step.r, step.Ap},
            {WKV_KEY, own.key, A, step.k, step.Ap},
            {WKV_VALUE, own.value, A, step.v, step.Ap},
        };
        project<kDtype>(*this, matrices, begin, end);
    }

    float* mixed(int64_t mix) const { return local + mix * B * step.Cp; }

    // The mixes are in the order of the matrices.
    Input input(int64_t matrix) const { return {mixed(matrix), step.Cp, C}; }

    void channels(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.attn_shift);
        float *log_w = local, *o = log_w + kWkv4Widest;
        for (int64_t first = begin; first < end; first += kWkv4Widest) {
            const int64_t n = end - first < kWkv4Widest ? end - first : kWkv4Widest;
            const char* decay = static_cast<const char*>(own.decay) + first * size_of(kDtype);
            for (int64_t i = 0; i < n; i += kLanes) store(log_w + i, -exp(at<kDtype>(decay, i, n)));
            for (int64_t b = 0; b < B; ++b) {
                const int64_t row = b * step.Ap + first;
                recurrence(b, first, n, log_w, o, o + kWkv4Widest);
                for (int64_t i = 0; i < n; i += kLanes)
                    put(step.y + row, sigmoid(at(step.r + row, i, n)) * load(o + i), i, n);
            }
        }
    }

    void recurrence(int64_t b, int64_t first, int64_t n, float* log_w, float* o, float* scratch) {
        const auto tensor = [](float* x) { return wkv_tensor{x, WKV_FLOAT32, 0, 0, 0}; };
        wkv4_forward_args args{};
        args.in.sizes = {1, 1, 1, 1, n, 1, nullptr, 0};
        args.in.log_w = tensor(log_w);
        args.in.u = {const_cast<char*>(static_cast<const char*>(own.bonus)) + first * size_of(kDtype), kDtype, 0, 0, 0};
        args.in.k = tensor(step.k + b * step.Ap + first), args.in.v = tensor(step.v + b * step.Ap + first);
        args.in.state.data = args.final_state.data = state.S + (b * A + first) * 3;
        args.o = tensor(o);
        Task task{};
        task.length = 1;
        task.v_end = n;
        wkv4_forward(args, task, scratch);
    }
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
