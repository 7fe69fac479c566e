// Layers of RWKV-4, 5, 6 and 7 for the decoding driver: their weights, and one token in double precision.
//
// Letters as in wkv.h: B rows, C residual width, H heads of K channels, A = H K, F hidden units, L layers, R rank of
// the mixes of RWKV-6.
#pragma once

#include "decode_weights.h"

namespace test {

inline double sigmoid(double x) {
    return 1 / (1 + std::exp(-x));
}

inline double squash(double x) {
    return std::tanh(x);
}

struct Model {
    int64_t generation, B, C, H, K, F, L, ranks[4];
    // Of RWKV-5: one decay a head and the bonus as its logarithm; a gate.
    bool first_version = false, gate = true;

    bool current() const { return generation < 6; }
};

constexpr double kNormEps = 1e-5, kGroupNormEps = 64e-5;

inline rwkv_step_layer make_layer(Weights& w, const Model& m, bool value_by_unit) {
    rwkv_step_layer layer{};
    layer.attn_norm_weight = w.vector("attn_norm_weight", m.C), layer.attn_norm_bias = w.vector("attn_norm_bias", m.C);
    layer.ffn_norm_weight = w.vector("ffn_norm_weight", m.C), layer.ffn_norm_bias = w.vector("ffn_norm_bias", m.C);
    layer.output = w.matrix("output", m.C, m.H * m.K);
    layer.ffn_x_k = w.vector("ffn_x_k", m.C), layer.ffn_key = w.matrix("ffn_key", m.F, m.C);
    if (m.generation < 7) {
        layer.ffn_x_r = w.vector("ffn_x_r", m.C);
        layer.ffn_receptance = w.matrix("ffn_receptance", m.C, m.C);
    }
    layer.value_by_unit = value_by_unit;
    layer.ffn_value = value_by_unit ? w.matrix("ffn_value", m.F, m.C) : w.matrix("ffn_value", m.C, m.F);
    return layer;
}

inline rwkv4_time_mix make_time_mix4(Weights& w, const Model& m) {
    const int64_t A = m.H;
    rwkv4_time_mix x{};
    x.x_r = w.vector("x_r", m.C), x.x_k = w.vector("x_k", m.C), x.x_v = w.vector("x_v", m.C);
    x.receptance = w.matrix("receptance", A, m.C), x.key = w.matrix("key", A, m.C);
    x.value = w.matrix("value", A, m.C), x.decay = w.vector("decay", A), x.bonus = w.vector("bonus", A);
    return x;
}

inline rwkv6_time_mix make_time_mix6(Weights& w, const Model& m) {
    const int64_t A = m.H * m.K, each = m.first_version ? m.H : A;
    rwkv6_time_mix x{};
    x.x_r = w.vector("x_r", m.C), x.x_k = w.vector("x_k", m.C), x.x_v = w.vector("x_v", m.C);
    x.receptance = w.matrix("receptance", A, m.C), x.key = w.matrix("key", A, m.C);
    x.value = w.matrix("value", A, m.C), x.decay = w.vector("decay", each), x.bonus = w.vector("bonus", each);
    x.norm_weight = w.vector("g_norm_weight", A), x.norm_bias = w.vector("g_norm_bias", A);
    if (m.gate) x.x_g = w.vector("x_g", m.C), x.gate = w.matrix("gate", A, m.C);
    if (m.generation == 5) return x;
    x.x_x = w.vector("x_x", m.C), x.x_w = w.vector("x_w", m.C);
    x.mix_w1 = w.flipped("mix_w1", m.C, 5 * m.ranks[0]), x.mix_w2 = w.flipped("mix_w2", 5 * m.ranks[0], m.C);
    x.decay_w1 = w.flipped("decay_w1", m.C, m.ranks[1]), x.decay_w2 = w.flipped("decay_w2", m.ranks[1], A);
    return x;
}

inline rwkv7_time_mix make_time_mix7(Weights& w, const Model& m, bool first) {
    const int64_t A = m.H * m.K;
    rwkv7_time_mix x{};
    x.x_r = w.vector("x_r", m.C), x.x_w = w.vector("x_w", m.C), x.x_k = w.vector("x_k", m.C);
    x.x_v = w.vector("x_v", m.C), x.x_a = w.vector("x_a", m.C), x.x_g = w.vector("x_g", m.C);
    x.k_k = w.vector("k_k", A), x.k_a = w.vector("k_a", A), x.r_k = w.vector("r_k", A);
    x.g_norm_weight = w.vector("g_norm_weight", A), x.g_norm_bias = w.vector("g_norm_bias", A);
    x.receptance = w.matrix("receptance", A, m.C), x.key = w.matrix("key", A, m.C);
    x.value = w.matrix("value", A, m.C);
    x.w_down = w.matrix("w_down", m.ranks[0], m.C), x.w_up = w.matrix("w_up", A, m.ranks[0]);
    x.a_down = w.matrix("a_down", m.ranks[1], m.C), x.a_up = w.matrix("a_up", A, m.ranks[1]);
    x.g_down = w.matrix("g_down", m.ranks[3], m.C), x.g_up = w.matrix("g_up", A, m.ranks[3]);
    x.w_bias = w.vector("w_bias", A), x.a_bias = w.vector("a_bias", A);
    if (!first) {
        x.v_down = w.matrix("v_down", m.ranks[2], m.C), x.v_up = w.matrix("v_up", A, m.ranks[2]);
        x.v_bias = w.vector("v_bias", A);
    }
    return x;
}

// The states of a layer: values (1, 1, B, C), and (B, H, K, K).
struct States {
    Tensor attn_shift, ffn_shift, S;

    States(const Model& m, int64_t dtype)
        : attn_shift({1, 1, m.B, m.C}, dtype),
          ffn_shift({1, 1, m.B, m.C}, dtype),
          S(m.generation == 4 ? Sizes{1, m.B, m.H, 3} : Sizes{m.B, m.H, m.K, m.K}, WKV_FLOAT32) {
        attn_shift.fill(-1, 1), ffn_shift.fill(-1, 1);
        // The sum of weights of RWKV-4 is positive.
        S.fill(m.generation == 4 ? 0.5 : -1, 1);
    }
};

struct ExactStates {
    Exact attn_shift, ffn_shift, S;

    explicit ExactStates(const States& x)
        : attn_shift(x.attn_shift.exact()), ffn_shift(x.ffn_shift.exact()), S(x.S.exact()) {}
};

inline Values row(const Exact& x, int64_t b) {
    return {&x.values[b * x.sizes[3]], &x.values[b * x.sizes[3]] + x.sizes[3]};
}

inline void set_row(Exact& x, int64_t b, const Values& values) {
    std::copy(values.begin(), values.end(), &x(0, 0, b, 0));
}

inline Values time_mix4(const Weights& w, const Model& m, const Values& x, const Values& before, Exact& S, int64_t b) {
    const Values r = w.times("receptance", w.mix("x_r", x, before, true));
    const Values k = w.times("key", w.mix("x_k", x, before, true));
    const Values v = w.times("value", w.mix("x_v", x, before, true));
    Values y(m.H);
    for (int64_t i = 0; i < m.H; ++i) {
        double &sum = S(0, b, i, 0), &weight = S(0, b, i, 1), &p = S(0, b, i, 2);
        const double now = w["bonus"][i] + k[i];
        y[i] = sigmoid(r[i]) * (std::exp(p) * sum + std::exp(now) * v[i]) / (std::exp(p) * weight + std::exp(now));
        p -= std::exp(w["decay"][i]);
        const double q = std::max(p, k[i]);
        sum = std::exp(p - q) * sum + std::exp(k[i] - q) * v[i];
        weight = std::exp(p - q) * weight + std::exp(k[i] - q);
        p = q;
    }
    return w.times("output", y);
}

// The token shift's mix of RWKV-5 and 6; `which` among w, k, v, r, g.
inline Values mix6(const Weights& w, const Model& m, int which, const Values& x, const Values& before) {
    const std::string name = std::string("x_") + "wkvrg"[which];
    if (m.generation == 5) return w.mix(name, x, before, true);
    Values y = w.mix(name, x, before), low = w.through("mix_w1", w.mix("x_x", x, before));
    const int64_t R = m.ranks[0];
    Values own(low.begin() + which * R, low.begin() + (which + 1) * R);
    for (double& value : own) value = squash(value);
    const Values share = w.through("mix_w2", own, which * R);
    for (size_t i = 0; i < y.size(); ++i) y[i] += (before[i] - x[i]) * share[i];
    return y;
}

inline Values time_mix6(const Weights& w, const Model& m, const Values& x, const Values& before, Exact& S, int64_t b) {
    const Values k = w.times("key", mix6(w, m, 1, x, before)), v = w.times("value", mix6(w, m, 2, x, before));
    const Values r = w.times("receptance", mix6(w, m, 3, x, before));
    Values raw(m.H * m.K), g, y(m.H * m.K);
    if (m.gate) g = w.times("gate", mix6(w, m, 4, x, before));
    if (m.generation == 6) {
        Values low = w.through("decay_w1", mix6(w, m, 0, x, before));
        for (double& value : low) value = squash(value);
        raw = w.through("decay_w2", low);
    }
    for (int64_t h = 0; h < m.H; ++h) {
        const int64_t at = h * m.K;
        for (int64_t i = 0; i < m.K; ++i) {
            const int64_t of = m.first_version ? h : at + i;
            const double d = std::exp(-std::exp(w["decay"][of] + raw[at + i]));
            const double u = m.first_version ? std::exp(w["bonus"][of]) : w["bonus"][of];
            for (int64_t j = 0; j < m.K; ++j) {
                const double kv = k[at + i] * v[at + j];
                y[at + j] += r[at + i] * (S(b, h, i, j) + u * kv);
                S(b, h, i, j) = d * S(b, h, i, j) + kv;
            }
        }
        w.normalise(&y[at], m.K, "g_norm", kGroupNormEps, at);
    }
    for (size_t i = 0; i < g.size(); ++i) y[i] *= g[i] * sigmoid(g[i]);
    return w.times("output", y);
}

inline Values time_mix7(const Weights& w, const Model& m, const Values& x, const Values& before, Values& v_first,
                        Exact& S, int64_t b) {
    const Values r = w.times("receptance", w.mix("x_r", x, before)), raw_k = w.times("key", w.mix("x_k", x, before));
    const Values raw_w = w.low_rank("w", w.mix("x_w", x, before), squash);
    const Values raw_a = w.low_rank("a", w.mix("x_a", x, before), nullptr), x_v = w.mix("x_v", x, before);
    const Values g = w.low_rank("g", w.mix("x_g", x, before), sigmoid);
    Values v = w.times("value", x_v), y(v.size());
    if (v_first.empty()) {
        v_first = v;
    } else {
        const Values raw_v = w.low_rank("v", x_v, nullptr);
        for (size_t i = 0; i < v.size(); ++i) v[i] += (v_first[i] - v[i]) * sigmoid(raw_v[i]);
    }
    for (int64_t h = 0; h < m.H; ++h) {
        const int64_t at = h * m.K;
        double square = 0, bonus = 0;
        for (int64_t i = at; i < at + m.K; ++i) square += std::pow(raw_k[i] * w["k_k"][i], 2);
        Values sa(m.K);
        for (int64_t i = 0; i < m.K; ++i)
            for (int64_t j = 0; j < m.K; ++j)
                sa[j] -= raw_k[at + i] * w["k_k"][at + i] / std::sqrt(square) * S(b, h, i, j);
        for (int64_t i = 0; i < m.K; ++i) {
            const double rate = sigmoid(raw_a[at + i]), kk = raw_k[at + i] * w["k_k"][at + i] / std::sqrt(square);
            const double d = std::exp(-std::exp(-0.5) * sigmoid(raw_w[at + i]));
            const double k = raw_k[at + i] * (1 + (rate - 1) * w["k_a"][at + i]);
            bonus += r[at + i] * k * w["r_k"][at + i];
            for (int64_t j = 0; j < m.K; ++j) {
                S(b, h, i, j) = d * S(b, h, i, j) + kk * rate * sa[j] + k * v[at + j];
                y[at + j] += r[at + i] * S(b, h, i, j);
            }
        }
        w.normalise(&y[at], m.K, "g_norm", kGroupNormEps, at);
        for (int64_t i = at; i < at + m.K; ++i) y[i] = (y[i] + bonus * v[i]) * g[i];
    }
    return w.times("output", y);
}

inline Values channel_mix(const Weights& w, const Model& m, const Values& x, const Values& before, bool value_by_unit) {
    Values hidden = w.times("ffn_key", w.mix("ffn_x_k", x, before, m.current()));
    for (double& value : hidden) value = std::pow(std::max(value, 0.0), 2);
    Values y = value_by_unit ? w.through("ffn_value", hidden) : w.times("ffn_value", hidden);
    if (m.generation == 7) return y;
    const Values r = w.times("ffn_receptance", w.mix("ffn_x_r", x, before, m.current()));
    for (size_t i = 0; i < y.size(); ++i) y[i] *= sigmoid(r[i]);
    return y;
}

// One token of row b.
inline Values step(const Weights& outer, const std::vector<Weights>& layers, const Model& m, Values x, int64_t b,
                   std::vector<ExactStates>& states, bool value_by_unit) {
    Values v_first;
    outer.normalise(x.data(), m.C, "pre_norm", kNormEps);
    const auto add = [&](const Values& update) {
        for (int64_t i = 0; i < m.C; ++i) x[i] += update[i];
    };
    for (size_t i = 0; i < layers.size(); ++i) {
        Values normal = x;
        layers[i].normalise(normal.data(), m.C, "attn_norm", kNormEps);
        const Values before = row(states[i].attn_shift, b);
        if (m.generation == 4)
            add(time_mix4(layers[i], m, normal, before, states[i].S, b));
        else if (m.generation == 7)
            add(time_mix7(layers[i], m, normal, before, v_first, states[i].S, b));
        else
            add(time_mix6(layers[i], m, normal, before, states[i].S, b));
        set_row(states[i].attn_shift, b, normal);
        normal = x;
        layers[i].normalise(normal.data(), m.C, "ffn_norm", kNormEps);
        add(channel_mix(layers[i], m, normal, row(states[i].ffn_shift, b), value_by_unit));
        set_row(states[i].ffn_shift, b, normal);
    }
    outer.normalise(x.data(), m.C, "norm", kNormEps);
    return x;
}

}  // namespace test
