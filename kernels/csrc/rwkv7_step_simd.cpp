// One part of a phase of the fused RWKV-7 step. Weights are widened in registers, everything else is float32.
//
// Letters as in wkv.h; h residual, kk the removal key, a the in-context learning rate.
#include "few_rows.h"
#include "rwkv7_step.h"
#include "rwkv7_step_channel_mix.h"
#include "rwkv7_step_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The decay is exp(-exp(-1/2) * sigmoid(w)).
constexpr float kLogDecayScale = -0.6065306597126334f;

enum { kW, kA, kV, kG };

template <int64_t kDtype>
struct TimeMix {
    const Rwkv7Step& step;
    const wkv_rwkv7_layer& weights;
    const wkv_rwkv7_layer_state& state;
    int64_t layer;
    float* local;
    int64_t B = step.args.B, C = step.args.C, K = step.args.K, F = step.args.F, A = step.A;

    void prepare(Rwkv7Phase phase) {
        if (phase == kProject)
            prepare_project();
        else if (phase == kHeads)
            prepare_heads();
    }

    void run(Rwkv7Phase phase, int64_t begin, int64_t end) {
        if (phase == kProject)
            project(begin, end);
        else if (phase == kHeads)
            heads(begin, end);
        else
            add_rows<kDtype>(step, weights.o_proj, A, step.y, step.Ap, begin, end);
    }

    void prepare_project() {
        const void* const mixes[] = {weights.x_r, weights.x_k, weights.x_v, weights.x_w, weights.x_a, weights.x_g};
        norm_and_mix<kDtype>(step, local, weights.attn_norm_weight, weights.attn_norm_bias, state.attn_shift, mixes);
    }

    void project(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, local + 6 * B * step.Cp);
        enum { kMixR, kMixK, kMixV, kMixW, kMixA, kMixG };
        const struct {
            const void* w;
            int64_t n, mix;
            float* to;
            int64_t ld;
        } matrices[] = {
            {weights.r_proj, A, kMixR, step.r, step.Ap},
            {weights.k_proj, A, kMixK, step.k, step.Ap},
            {weights.v_proj, A, kMixV, step.v, step.Ap},
            {weights.w_down, step.ranks[kW], kMixW, step.low + step.low_begin[kW], step.low_size},
            {weights.a_down, step.ranks[kA], kMixA, step.low + step.low_begin[kA], step.low_size},
            {weights.v_down, layer == 0 ? 0 : step.ranks[kV], kMixV, step.low + step.low_begin[kV], step.low_size},
            {weights.g_down, step.ranks[kG], kMixG, step.low + step.low_begin[kG], step.low_size},
        };
        int64_t first = 0;
        for (const auto& m : matrices) {
            const int64_t from = begin > first ? begin - first : 0, to = end - first < m.n ? end - first : m.n;
            const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
                __builtin_memcpy(m.to + b * m.ld + row, values, count * sizeof(float));
            };
            if (from < to) multiply_rows<kDtype>(m.w, C, from, to, local + m.mix * B * step.Cp, step.Cp, B, write);
            first += m.n;
        }
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
        const void* const matrices[] = {weights.w_up, weights.a_up, weights.v_up, weights.g_up};
        for (int64_t head = begin; head < end; ++head) {
            for (int m = 0; m < 4; ++m) {
                if (m == kV && layer == 0) continue;
                const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
                    __builtin_memcpy(up + (b * 4 + m) * Kp + row - head * K, values, count * sizeof(float));
                };
                multiply_rows<kDtype>(matrices[m], step.ranks[m], head * K, head * K + K, local + step.low_begin[m],
                                      step.low_size, B, write);
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
            const Vec rate = sigmoid(weight(weights.a_bias, i) + at(up + kA * Kp, i, K));
            store(log_w + i, kLogDecayScale * sigmoid(weight(weights.w_bias, i) + at(up + kW * Kp, i, K)));
            store(a + i, rate);
            const Vec k0 = at(step.k + row, i, K), removal = k0 * weight(weights.k_k, i);
            store(kk + i, removal);
            squares += removal * removal;
            const Vec key = k0 + k0 * (rate - 1.0f) * weight(weights.k_a, i);
            store(k + i, key);
            Vec value = at(step.v + row, i, K);
            if (layer == 0)
                put(step.v_first + row, value, i, K);
            else
                value += (at(step.v_first + row, i, K) - value) *
                         sigmoid(weight(weights.v_bias, i) + at(up + kV * Kp, i, K));
            store(v + i, value);
            const Vec receptance = at(step.r + row, i, K);
            store(r + i, receptance);
            bonus += receptance * key * weight(weights.r_k, i);
        }
        const float length = __builtin_sqrtf(sum(squares)), scale = 1.0f / (length > 1e-12f ? length : 1e-12f);
        for (int64_t i = 0; i < K; i += kLanes) {
            const Vec unit = load(kk + i) * scale;
            store(kk + i, -unit);
            store(a + i, unit * load(a + i));
        }
        recurrence(b, head, r, log_w, k, v, kk, a, o, memory + 8 * Kp);

        const Moments m = moments(o, K, step.args.group_norm_eps);
        const float shared_bonus = sum(bonus);
        for (int64_t i = 0; i < K; i += kLanes) {
            const Vec normal =
                (load(o + i) - m.mean) * m.scale * weight(weights.g_norm_weight, i) + weight(weights.g_norm_bias, i);
            put(step.y + row, (normal + shared_bonus * load(v + i)) * at(up + kG * Kp, i, K), i, K);
        }
    }

    void recurrence(int64_t b, int64_t head, float* r, float* log_w, float* k, float* v, float* a_vector,
                    float* b_vector, float* o, float* scratch) {
        const auto tensor = [](float* x) { return wkv_tensor{x, WKV_FLOAT32, 0, 0, 0}; };
        wkv7_forward_args args{};
        args.in.n_seq = args.in.length = args.in.H = args.in.n_threads = 1;
        args.in.K = args.in.V = K;
        args.in.r = tensor(r), args.in.log_w = tensor(log_w), args.in.k = tensor(k), args.in.v = tensor(v);
        args.in.a = tensor(a_vector), args.in.b = tensor(b_vector);
        args.in.state.data = args.final_state.data = state.S + (b * step.args.H + head) * K * K;
        args.o = tensor(o);
        Wkv7Task task{};
        task.length = 1;
        task.v_end = K;
        wkv7_forward(args, task, scratch);
    }
};

// Calls f with the half of layer `layer` that a phase belongs to.
template <class F>
WKV_INLINE void with_half(const Rwkv7Step& step, Rwkv7Phase phase, int64_t layer, float* local, const F& f) {
    const wkv_rwkv7_layer& weights = step.args.layers[layer];
    const wkv_rwkv7_layer_state& state = step.args.states[layer];
    with_dtype(step.args.dtype, [&]<int64_t kDtype>() {
        if (phase < kKey)
            f(TimeMix<kDtype>{step, weights, state, layer, local});
        else
            f(ChannelMix<kDtype>{step, weights, state, local});
    });
}

}  // namespace

void rwkv7_begin(const Rwkv7Step& step) {
    const wkv_rwkv7_step_args& args = step.args;
    with_dtype(args.dtype, [&]<int64_t kDtype>() {
        for (int64_t b = 0; b < args.B; ++b) {
            float* h = step.residual + b * step.Cp;
            widen_all<kDtype>(h, static_cast<const char*>(args.x) + b * args.C * size_of(kDtype), args.C, step.Cp);
            layer_norm<kDtype>(h, h, args.C, args.pre_norm_weight, args.pre_norm_bias, args.norm_eps);
        }
    });
}

void rwkv7_prepare(const Rwkv7Step& step, Rwkv7Phase phase, int64_t layer, float* local) {
    with_half(step, phase, layer, local, [&](auto&& half) { half.prepare(phase); });
}

void rwkv7_run(const Rwkv7Step& step, Rwkv7Phase phase, int64_t layer, int64_t begin, int64_t end, float* local) {
    with_half(step, phase, layer, local, [&](auto&& half) { half.run(phase, begin, end); });
}

void rwkv7_add(const Rwkv7Step& step, int64_t layer, float* local) {
    if (!step.args.layers[layer].value_by_unit) return;
    const float* sums = local + step.sums_begin();
    float* h = step.residual;
    for (int64_t i = 0; i < step.args.B * step.Cp; i += kLanes) store(h + i, load(h + i) + load(sums + i));
}

void rwkv7_end(const Rwkv7Step& step) {
    const wkv_rwkv7_step_args& args = step.args;
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
