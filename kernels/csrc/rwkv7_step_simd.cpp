// One part of a phase of the fused RWKV-7 step. Weights are widened in registers, everything else is float32.
//
// Letters as in wkv.h; h residual, kk the removal key, a the in-context learning rate.
#include "few_rows.h"
#include "rwkv7_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The decay is exp(-exp(-1/2) * sigmoid(w)).
constexpr float kLogDecayScale = -0.6065306597126334f;

enum { kW, kA, kV, kG };

// Numbers i to i + kLanes of n, zeros past the end.
template <int64_t kDtype = WKV_FLOAT32>
WKV_INLINE Vec at(const void* x, int64_t i, int64_t n) {
    const char* from = static_cast<const char*>(x) + i * size_of(kDtype);
    return i + kLanes <= n ? widen<kDtype>(from) : widen<kDtype>(from, n - i);
}

WKV_INLINE void put(float* to, Vec x, int64_t i, int64_t n) {
    __builtin_memcpy(to + i, &x, (i + kLanes <= n ? kLanes : n - i) * sizeof(float));
}

WKV_INLINE float sum(Vec x) {
    for (int n = kLanes; n > 1; n /= 2) x = add_pairs(x, x);
    return x[0];
}

WKV_INLINE Vec sigmoid(Vec x) {
    return 1.0f / (1.0f + exp(-x));
}

WKV_INLINE Vec tanh(Vec x) {
    return 1.0f - 2.0f / (1.0f + exp(x + x));
}

struct Moments {
    float mean, scale;
};

// Mean of n numbers, and one over their standard deviation.
WKV_INLINE Moments moments(const float* x, int64_t n, float eps) {
    Vec total{}, squares{};
    for (int64_t i = 0; i < n; i += kLanes) total += at(x, i, n);
    const float mean = sum(total) / n;
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec d = load(x + i) - mean;
        squares += i + kLanes <= n ? d * d : at(&d, 0, n - i) * at(&d, 0, n - i);
    }
    return {mean, 1.0f / __builtin_sqrtf(sum(squares) / n + eps)};
}

// to and x have zeros up to the next multiple of kLanes.
template <int64_t kDtype>
WKV_INLINE void layer_norm(float* to, const float* x, int64_t n, const void* weight, const void* bias, float eps) {
    const Moments m = moments(x, n, eps);
    for (int64_t i = 0; i < n; i += kLanes)
        store(to + i, (load(x + i) - m.mean) * m.scale * at<kDtype>(weight, i, n) + at<kDtype>(bias, i, n));
}

// Norm, token shift and n_mixes mixes of every sequence: to[m] and to[n_mixes], the norm itself, are (B, Cp).
template <int64_t kDtype, int kMixes>
WKV_INLINE void norm_and_mix(const Rwkv7Step& step, float* to, const void* weight, const void* bias, const void* shift,
                             const void* const (&mixes)[kMixes]) {
    const int64_t B = step.args.B, C = step.args.C, Cp = step.Cp;
    for (int64_t b = 0; b < B; ++b) {
        float* x = to + (kMixes * B + b) * Cp;
        layer_norm<kDtype>(x, step.residual + b * Cp, C, weight, bias, step.args.norm_eps);
        const char* previous = static_cast<const char*>(shift) + b * C * size_of(kDtype);
        for (int64_t i = 0; i < C; i += kLanes) {
            const Vec y = load(x + i), delta = at<kDtype>(previous, i, C) - y;
            for (int m = 0; m < kMixes; ++m) store(to + (m * B + b) * Cp + i, y + delta * at<kDtype>(mixes[m], i, C));
        }
    }
}

// Keeps a norm for the next token; the threads still read the last one's.
void keep_shift(const Rwkv7Step& step, const float* x) {
    __builtin_memcpy(step.shifted, x, step.args.B * step.Cp * sizeof(float));
}

void write_shift(const Rwkv7Step& step, void* shift) {
    const int64_t C = step.args.C, dtype = step.args.dtype;
    for (int64_t b = 0; b < step.args.B; ++b)
        pack(static_cast<char*>(shift) + b * C * size_of(dtype), step.shifted + b * step.Cp, dtype, C);
}

template <int64_t kDtype>
struct Part {
    const Rwkv7Step& step;
    const wkv_rwkv7_layer& weights;
    const wkv_rwkv7_layer_state& state;
    int64_t layer;
    float* local;
    int64_t B = step.args.B, C = step.args.C, K = step.args.K, F = step.args.F, A = step.A;

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

    // residual += w x for the rows [begin, end) of w.
    void add_rows(const void* w, int64_t n, const float* x, int64_t ld_x, int64_t begin, int64_t end) {
        const auto add = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            float* h = step.residual + b * step.Cp + row;
            for (int64_t i = 0; i < count; ++i) h[i] += values[i];
        };
        multiply_rows<kDtype>(w, n, begin, end, x, ld_x, B, add);
    }

    void prepare_key() {
        const void* const mixes[] = {weights.ffn_x_k};
        norm_and_mix<kDtype>(step, local, weights.ffn_norm_weight, weights.ffn_norm_bias, state.ffn_shift, mixes);
    }

    void key(int64_t begin, int64_t end) {
        if (begin == 0) keep_shift(step, local + B * step.Cp);
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            float* units = step.units + b * step.Fp + row;
            // Written so that NaN stays.
            for (int64_t i = 0; i < count; ++i) units[i] = values[i] < 0.0f ? 0.0f : values[i] * values[i];
        };
        multiply_rows<kDtype>(weights.key, C, begin, end, local, step.Cp, B, write);
    }

    // The hidden units that any sequence needs: how many, their numbers, then their activations (n, B).
    void prepare_value() {
        if (!weights.value_by_unit) return;
        int32_t* active = reinterpret_cast<int32_t*>(local);
        int64_t n = 0;
        for (int64_t unit = 0; unit < F; ++unit) {
            bool any = false;
            for (int64_t b = 0; b < B; ++b) any |= step.units[b * step.Fp + unit] != 0.0f;
            active[1 + n] = static_cast<int32_t>(unit);
            n += any;
        }
        active[0] = static_cast<int32_t>(n);
        float* activations = local + padded(F + 1);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t b = 0; b < B; ++b) activations[i * B + b] = step.units[b * step.Fp + active[1 + i]];
    }

    void value(int64_t begin, int64_t end) {
        if (begin == 0) write_shift(step, state.ffn_shift);
        if (!weights.value_by_unit) return add_rows(weights.value, F, step.units, step.Fp, begin, end);
        const int32_t* active = reinterpret_cast<const int32_t*>(local) + 1;
        const float* activations = local + padded(F + 1);
        float* sums = local + padded(F + 1) + B * step.Fp;
        for (int64_t b = 0; b < B; ++b)
            for (int64_t i = begin; i < end; ++i) sums[b * step.Cp + i] = 0.0f;
        const int64_t n = active[-1];
        int64_t i = 0;
        for (; i + kUnits <= n; i += kUnits) {
            const int64_t ahead = i + 2 * kUnits <= n ? kUnits : 0;
            add_units<kUnits>(active + i, activations + i * B, ahead, sums, begin, end);
        }
        for (; i < n; ++i) add_units<1>(active + i, activations + i * B, 0, sums, begin, end);
        for (int64_t b = 0; b < B; ++b)
            for (int64_t i = begin; i < end; ++i) step.residual[b * step.Cp + i] += sums[b * step.Cp + i];
    }

    // Hidden units that go together through the sums. Each sum takes them one after the other, so that a unit whose
    // activation is zero makes no difference whether it is there or not.
    static constexpr int kUnits = 4;

    // Adds kN units to the channels [begin, end) of the sums, and asks for those that stand `ahead` in the list.
    template <int kN>
    WKV_INLINE void add_units(const int32_t* active, const float* activations, int64_t ahead, float* sums,
                              int64_t begin, int64_t end) {
        const char* rows[kN];
        const char* next[kN];
        for (int u = 0; u < kN; ++u) {
            rows[u] = static_cast<const char*>(weights.value) + active[u] * C * size_of(kDtype);
            next[u] = static_cast<const char*>(weights.value) + active[u + ahead] * C * size_of(kDtype);
        }
        for (int64_t i = begin; i < end; i += kLanes) {
            Vec w[kN];
            for (int u = 0; u < kN; ++u) {
                if ((i - begin) * size_of(kDtype) % 64 == 0) __builtin_prefetch(next[u] + i * size_of(kDtype));
                w[u] = at<kDtype>(rows[u], i, end);
            }
            for (int64_t b = 0; b < B; ++b) {
                Vec y = load(sums + b * step.Cp + i);
                for (int u = 0; u < kN; ++u) y += activations[u * B + b] * w[u];
                store(sums + b * step.Cp + i, y);
            }
        }
    }
};

template <class F>
WKV_INLINE void with_part(const Rwkv7Step& step, int64_t layer, float* local, const F& f) {
    with_dtype(step.args.dtype, [&]<int64_t kDtype>() {
        Part<kDtype> part{step, step.args.layers[layer], step.args.states[layer], layer, local};
        f(part);
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
    with_part(step, layer, local, [&](auto& part) {
        if (phase == kProject)
            part.prepare_project();
        else if (phase == kHeads)
            part.prepare_heads();
        else if (phase == kKey)
            part.prepare_key();
        else if (phase == kValue)
            part.prepare_value();
    });
}

void rwkv7_run(const Rwkv7Step& step, Rwkv7Phase phase, int64_t layer, int64_t begin, int64_t end, float* local) {
    with_part(step, layer, local, [&](auto& part) {
        if (phase == kProject)
            part.project(begin, end);
        else if (phase == kHeads)
            part.heads(begin, end);
        else if (phase == kOutput)
            part.add_rows(part.weights.o_proj, step.A, step.y, step.Ap, begin, end);
        else if (phase == kKey)
            part.key(begin, end);
        else
            part.value(begin, end);
    });
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
