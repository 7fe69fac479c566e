// One-token steps of RWKV-7 models, and few_rows_linear, of libwkv on odd sizes, compared with loops in double
// precision. Several threads must give the same bits as one.
//
// Letters as in wkv.h: B rows, C residual width, H heads of K channels, A = H K, F hidden units, L layers.
#include <map>
#include <string>

#include "numbers.h"

namespace {

using namespace test;

using Values = std::vector<double>;

double sigmoid(double x) {
    return 1 / (1 + std::exp(-x));
}

double squash(double x) {
    return std::tanh(x);
}

// Tensors by name, and their values. Matrices (1, 1, output channels, input channels), vectors (1, 1, 1, n).
struct Weights {
    int64_t dtype;
    std::map<std::string, Tensor> tensors = {};
    std::map<std::string, Exact> values = {};

    void* add(const std::string& name, int64_t n_out, int64_t n_in, double scale) {
        Tensor& x = tensors.emplace(name, Tensor({1, 1, n_out, n_in}, dtype)).first->second.fill(-scale, scale);
        values.emplace(name, x.exact());
        return x.data();
    }
    void* vector(const std::string& name, int64_t n) { return add(name, 1, n, 1); }
    void* matrix(const std::string& name, int64_t n_out, int64_t n_in) {
        return add(name, n_out, n_in, 2 / std::sqrt(n_in));
    }

    const Values& operator[](const std::string& name) const { return values.at(name).values; }
    Values times(const std::string& name, const Values& x) const {
        const Exact& w = values.at(name);
        Values y(w.sizes[2]);
        for (int64_t i = 0; i < w.sizes[2]; ++i)
            for (int64_t j = 0; j < w.sizes[3]; ++j) y[i] += w(0, 0, i, j) * x[j];
        return y;
    }
    // bias + up f(down x)
    Values low_rank(const std::string& name, const Values& x, double (*f)(double)) const {
        Values inner = times(name + "_down", x);
        for (double& value : inner) value = f ? f(value) : value;
        Values y = times(name + "_up", inner);
        if (values.count(name + "_bias"))
            for (size_t i = 0; i < y.size(); ++i) y[i] += (*this)[name + "_bias"][i];
        return y;
    }
    // The n values from x on with mean 0 and variance 1, times the weight, plus the bias, from `first` on.
    void normalise(double* x, int64_t n, const std::string& name, double eps, int64_t first = 0) const {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < n; ++i) mean += x[i] / n;
        for (int64_t i = 0; i < n; ++i) variance += std::pow(x[i] - mean, 2) / n;
        for (int64_t i = 0; i < n; ++i) {
            x[i] = (x[i] - mean) / std::sqrt(variance + eps) * (*this)[name + "_weight"][first + i];
            x[i] += (*this)[name + "_bias"][first + i];
        }
    }
    Values mix(const std::string& name, const Values& x, const Values& before) const {
        Values y = x;
        for (size_t i = 0; i < y.size(); ++i) y[i] += (before[i] - x[i]) * (*this)[name][i];
        return y;
    }
};

struct Model {
    int64_t B, C, H, K, F, L, ranks[4];
};

constexpr double kNormEps = 1e-5, kGroupNormEps = 64e-5;

wkv_rwkv7_layer make_layer(Weights& w, const Model& m, bool first, bool value_by_unit) {
    const int64_t A = m.H * m.K;
    wkv_rwkv7_layer layer{};
    layer.attn_norm_weight = w.vector("attn_norm_weight", m.C), layer.attn_norm_bias = w.vector("attn_norm_bias", m.C);
    layer.ffn_norm_weight = w.vector("ffn_norm_weight", m.C), layer.ffn_norm_bias = w.vector("ffn_norm_bias", m.C);
    layer.x_r = w.vector("x_r", m.C), layer.x_w = w.vector("x_w", m.C), layer.x_k = w.vector("x_k", m.C);
    layer.x_v = w.vector("x_v", m.C), layer.x_a = w.vector("x_a", m.C), layer.x_g = w.vector("x_g", m.C);
    layer.k_k = w.vector("k_k", A), layer.k_a = w.vector("k_a", A), layer.r_k = w.vector("r_k", A);
    layer.g_norm_weight = w.vector("g_norm_weight", A), layer.g_norm_bias = w.vector("g_norm_bias", A);
    layer.r_proj = w.matrix("r_proj", A, m.C), layer.k_proj = w.matrix("k_proj", A, m.C);
    layer.v_proj = w.matrix("v_proj", A, m.C), layer.o_proj = w.matrix("o_proj", m.C, A);
    layer.w_down = w.matrix("w_down", m.ranks[0], m.C), layer.w_up = w.matrix("w_up", A, m.ranks[0]);
    layer.a_down = w.matrix("a_down", m.ranks[1], m.C), layer.a_up = w.matrix("a_up", A, m.ranks[1]);
    layer.g_down = w.matrix("g_down", m.ranks[3], m.C), layer.g_up = w.matrix("g_up", A, m.ranks[3]);
    layer.w_bias = w.vector("w_bias", A), layer.a_bias = w.vector("a_bias", A);
    if (!first) {
        layer.v_down = w.matrix("v_down", m.ranks[2], m.C), layer.v_up = w.matrix("v_up", A, m.ranks[2]);
        layer.v_bias = w.vector("v_bias", A);
    }
    layer.ffn_x_k = w.vector("ffn_x_k", m.C), layer.key = w.matrix("key", m.F, m.C);
    layer.value_by_unit = value_by_unit;
    layer.value = value_by_unit ? w.matrix("value", m.F, m.C) : w.matrix("value", m.C, m.F);
    return layer;
}

// The states of a layer: values (1, 1, B, C), and (B, H, K, K).
struct States {
    Tensor attn_shift, ffn_shift, S;

    States(const Model& m, int64_t dtype)
        : attn_shift({1, 1, m.B, m.C}, dtype),
          ffn_shift({1, 1, m.B, m.C}, dtype),
          S({m.B, m.H, m.K, m.K}, WKV_FLOAT32) {
        attn_shift.fill(-1, 1), ffn_shift.fill(-1, 1), S.fill(-1, 1);
    }
};

struct ExactStates {
    Exact attn_shift, ffn_shift, S;

    explicit ExactStates(const States& x)
        : attn_shift(x.attn_shift.exact()), ffn_shift(x.ffn_shift.exact()), S(x.S.exact()) {}
};

Values row(const Exact& x, int64_t b) {
    return {&x.values[b * x.sizes[3]], &x.values[b * x.sizes[3]] + x.sizes[3]};
}

void set_row(Exact& x, int64_t b, const Values& values) {
    std::copy(values.begin(), values.end(), &x(0, 0, b, 0));
}

Values time_mix(const Weights& w, const Model& m, const Values& x, const Values& before, Values& v_first, Exact& S,
                int64_t b) {
    const Values r = w.times("r_proj", w.mix("x_r", x, before)), raw_k = w.times("k_proj", w.mix("x_k", x, before));
    const Values raw_w = w.low_rank("w", w.mix("x_w", x, before), squash);
    const Values raw_a = w.low_rank("a", w.mix("x_a", x, before), nullptr), x_v = w.mix("x_v", x, before);
    const Values g = w.low_rank("g", w.mix("x_g", x, before), sigmoid);
    Values v = w.times("v_proj", x_v), y(v.size());
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
    return w.times("o_proj", y);
}

Values channel_mix(const Weights& w, const Values& x, const Values& before, bool value_by_unit) {
    Values hidden = w.times("key", w.mix("ffn_x_k", x, before)), y(x.size());
    for (double& value : hidden) value = std::pow(std::max(value, 0.0), 2);
    if (!value_by_unit) return w.times("value", hidden);
    const Exact& value = w.values.at("value");
    for (size_t i = 0; i < hidden.size(); ++i)
        for (size_t j = 0; j < y.size(); ++j) y[j] += hidden[i] * value(0, 0, i, j);
    return y;
}

// Row b: overwrites its states and returns the model's output.
Values step(const Weights& outer, const std::vector<Weights>& layers, const Model& m, Values x,
            std::vector<ExactStates>& states, int64_t b, bool value_by_unit) {
    Values v_first;
    outer.normalise(x.data(), m.C, "pre_norm", kNormEps);
    const auto add = [&](const Values& update) {
        for (int64_t i = 0; i < m.C; ++i) x[i] += update[i];
    };
    for (size_t i = 0; i < layers.size(); ++i) {
        Values normal = x;
        layers[i].normalise(normal.data(), m.C, "attn_norm", kNormEps);
        add(time_mix(layers[i], m, normal, row(states[i].attn_shift, b), v_first, states[i].S, b));
        set_row(states[i].attn_shift, b, normal);
        normal = x;
        layers[i].normalise(normal.data(), m.C, "ffn_norm", kNormEps);
        add(channel_mix(layers[i], normal, row(states[i].ffn_shift, b), value_by_unit));
        set_row(states[i].ffn_shift, b, normal);
    }
    outer.normalise(x.data(), m.C, "norm", kNormEps);
    return x;
}

void run_step(const Model& m, int64_t dtype, bool value_by_unit) {
    Weights outer{dtype};
    std::vector<Weights> weights(m.L, Weights{dtype});
    std::vector<wkv_rwkv7_layer> layers;
    std::vector<States> states;
    for (int64_t i = 0; i < m.L; ++i) {
        layers.push_back(make_layer(weights[i], m, i == 0, value_by_unit));
        states.emplace_back(m, dtype);
    }
    wkv_rwkv7_step_args args{};
    args.B = m.B, args.C = m.C, args.H = m.H, args.K = m.K, args.F = m.F, args.L = m.L;
    args.w_rank = m.ranks[0], args.a_rank = m.ranks[1], args.v_rank = m.ranks[2], args.g_rank = m.ranks[3];
    args.dtype = dtype, args.norm_eps = kNormEps, args.group_norm_eps = kGroupNormEps;
    args.pre_norm_weight = outer.vector("pre_norm_weight", m.C),
    args.pre_norm_bias = outer.vector("pre_norm_bias", m.C);
    args.norm_weight = outer.vector("norm_weight", m.C), args.norm_bias = outer.vector("norm_bias", m.C);
    args.layers = layers.data();
    const auto run = [&](int64_t n_threads, Tensor& x, Tensor& out, std::vector<States>& states) {
        std::vector<wkv_rwkv7_layer_state> pointers;
        for (States& s : states)
            pointers.push_back({s.attn_shift.data(), s.ffn_shift.data(), static_cast<float*>(s.S.data())});
        args.n_threads = n_threads, args.x = x.data(), args.out = out.data(), args.states = pointers.data();
        require(wkv_rwkv7_step(&args) == WKV_OK, "wkv_rwkv7_step failed");
    };
    for (int i = 0; i < 2; ++i) {
        Tensor x({1, 1, m.B, m.C}, dtype), out = x, out_of_several = x;
        x.fill(-1, 1);
        std::vector<ExactStates> exact(states.begin(), states.end());
        Exact expected(x.sizes);
        for (int64_t b = 0; b < m.B; ++b)
            set_row(expected, b, step(outer, weights, m, row(x.exact(), b), exact, b, value_by_unit));
        std::vector<States> of_several = states;
        run(1, x, out, states);
        run(3, x, out_of_several, of_several);
        expect(out, expected, "step: output");
        require(out.memory == out_of_several.memory, "step: several threads give another output");
        for (int64_t l = 0; l < m.L; ++l) {
            expect(states[l].attn_shift, exact[l].attn_shift, "step: attention shift");
            expect(states[l].ffn_shift, exact[l].ffn_shift, "step: feed-forward shift");
            expect(states[l].S, exact[l].S, "step: state");
            require(states[l].S.memory == of_several[l].S.memory, "step: several threads give another state");
        }
    }
}

void run_linear(int64_t n_rows, int64_t n_in, int64_t n_out, int64_t dtype, int64_t gap, int64_t n_threads) {
    Tensor x({1, 1, n_rows, n_in}, dtype, gap), y({1, 1, n_rows, n_out}, dtype, gap);
    Tensor weight({1, 1, n_out, n_in}, dtype);
    x.fill(-2, 2), weight.fill(-2, 2);
    const wkv_few_rows_linear_args args{n_rows,   n_in,         n_out,         dtype,    n_threads,
                                        x.data(), x.strides[2], weight.data(), y.data(), y.strides[2]};
    require(wkv_few_rows_linear(&args) == WKV_OK, "wkv_few_rows_linear failed");
    const Exact exact_x = x.exact(), exact_weight = weight.exact();
    Exact expected(y.sizes);
    for (int64_t b = 0; b < n_rows; ++b)
        for (int64_t i = 0; i < n_out; ++i)
            for (int64_t j = 0; j < n_in; ++j) expected(0, 0, b, i) += exact_x(0, 0, b, j) * exact_weight(0, 0, i, j);
    expect(y, expected, "few_rows_linear");
}

}  // namespace

int main(int argc, char** argv) {
    read_tolerances(argc, argv);
    require(wkv_isa() != nullptr, "no instruction set");
    const Model models[] = {
        {1, 13, 2, 5, 7, 2, {1, 2, 3, 4}},        {3, 64, 2, 32, 96, 1, {5, 3, 1, 17}},
        {5, 33, 1, 64, 32, 2, {16, 7, 9, 11}},    {17, 16, 1, 16, 1, 2, {1, 1, 1, 1}},
        {2, 150, 3, 64, 500, 2, {32, 8, 16, 20}},
    };
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        for (const Model& model : models)
            for (bool value_by_unit : {false, true}) run_step(model, dtype, value_by_unit);
        for (int64_t n_rows : {1, 2, 3, 5, 8, 9, 16, 33}) {
            run_linear(n_rows, 1, 1, dtype, 0, 1);
            run_linear(n_rows, 37, 19, dtype, 3, 1);
            run_linear(n_rows, 64, 2100, dtype, 0, 2);
        }
    }
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
