// One-token steps of models of every generation, and few_rows_linear, of libwkv on odd sizes, compared with loops in
// double precision. Several threads must give the same bits as one.
#include "decode_models.h"

namespace {

using namespace test;

// Terms for two of three matrices of a layer, of every dtype, and two for every second of them.
void adapt(Weights& w, int64_t layer, bool value_by_unit) {
    const char* names[] = {"receptance", "key",  "value", "gate", "w_down", "a_down",  "v_down",         "g_down",
                           "w_up",       "a_up", "v_up",  "g_up", "output", "ffn_key", "ffn_receptance", "ffn_value"};
    for (int64_t matrix = 0; matrix <= WKV_FFN_VALUE; ++matrix) {
        const int64_t number = matrix + layer;
        if (w.values.count(names[matrix]) == 0 || number % 3 == 1) continue;
        const bool by_input = matrix == WKV_FFN_VALUE && value_by_unit;
        for (int64_t i = 0; i <= number / 3 % 2; ++i)
            w.adapt(matrix, names[matrix], 1 + 5 * number % 18, {number % 3, (number / 2 + i) % 3}, by_input);
    }
}

void run_step(const Model& m, int64_t dtype, bool value_by_unit, bool adapted) {
    Weights outer{dtype};
    std::vector<Weights> weights(m.L, Weights{dtype});
    std::vector<rwkv_step_layer> layers;
    std::vector<rwkv4_time_mix> time_mixes4;
    std::vector<rwkv6_time_mix> time_mixes6;
    std::vector<rwkv7_time_mix> time_mixes7;
    std::vector<States> states;
    for (int64_t i = 0; i < m.L; ++i) {
        layers.push_back(make_layer(weights[i], m, value_by_unit));
        if (m.generation == 4)
            time_mixes4.push_back(make_time_mix4(weights[i], m));
        else if (m.generation == 7)
            time_mixes7.push_back(make_time_mix7(weights[i], m, i == 0));
        else
            time_mixes6.push_back(make_time_mix6(weights[i], m));
        states.emplace_back(m, dtype);
        if (adapted) adapt(weights[i], i, value_by_unit);
        layers[i].terms = weights[i].terms.data(), layers[i].n_terms = weights[i].terms.size();
    }
    rwkv_step_args args{};
    args.generation = m.generation, args.B = m.B, args.C = m.C, args.H = m.H, args.K = m.K, args.F = m.F, args.L = m.L;
    std::copy(m.ranks, m.ranks + 4, args.ranks);
    args.per_head = args.bonus_is_log = m.first_version;
    args.dtype = dtype, args.norm_eps = kNormEps, args.group_norm_eps = kGroupNormEps;
    args.pre_norm_weight = outer.vector("pre_norm_weight", m.C),
    args.pre_norm_bias = outer.vector("pre_norm_bias", m.C);
    args.norm_weight = outer.vector("norm_weight", m.C), args.norm_bias = outer.vector("norm_bias", m.C);
    args.layers = layers.data();
    args.time_mixes = time_mixes7.data();
    if (m.generation < 7) args.time_mixes = time_mixes6.data();
    if (m.generation == 4) args.time_mixes = time_mixes4.data();
    const auto run = [&](int64_t n_threads, Tensor& x, Tensor& out, std::vector<States>& states) {
        std::vector<rwkv_step_state> pointers;
        for (States& s : states)
            pointers.push_back({s.attn_shift.data(), s.ffn_shift.data(), static_cast<float*>(s.S.data())});
        args.n_threads = n_threads, args.x = x.data(), args.out = out.data(), args.states = pointers.data();
        require(rwkv_step(&args) == WKV_OK, "rwkv_step failed");
    };
    for (int i = 0; i < 2; ++i) {
        Tensor x({1, 1, m.B, m.C}, dtype), out = x, out_of_several = x;
        x.fill(-1, 1);
        std::vector<ExactStates> exact(states.begin(), states.end());
        Exact expected(x.sizes);
        for (int64_t b = 0; b < m.B; ++b)
            set_row(expected, b, step(outer, weights, m, row(x.exact(), b), b, exact, value_by_unit));
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
        {7, 1, 13, 2, 5, 7, 2, {1, 2, 3, 4}},
        {7, 3, 64, 2, 32, 96, 1, {5, 3, 0, 17}},
        {7, 5, 33, 1, 64, 32, 2, {16, 7, 9, 11}},
        {7, 17, 16, 1, 16, 1, 2, {1, 1, 1, 1}},
        {7, 2, 150, 3, 64, 500, 2, {32, 8, 16, 20}},
        {7, 2, 210, 3, 64, 1003, 1, {9, 8, 16, 20}},
        {6, 1, 13, 2, 5, 7, 2, {1, 2, 0, 0}},
        {6, 5, 33, 1, 64, 32, 2, {16, 7, 0, 0}},
        {6, 2, 210, 3, 64, 1003, 1, {9, 20, 0, 0}},
        {5, 1, 13, 2, 5, 7, 2, {}, true, false},
        {5, 5, 33, 1, 64, 32, 2, {}, true},
        {5, 2, 210, 3, 64, 1003, 1, {}},
        {4, 1, 13, 10, 1, 7, 2, {}},
        {4, 5, 33, 64, 1, 32, 2, {}},
        {4, 2, 210, 193, 1, 1003, 1, {}},
    };
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        for (const Model& model : models)
            for (bool value_by_unit : {false, true})
                for (bool adapted : {false, true}) run_step(model, dtype, value_by_unit, adapted);
        for (int64_t n_rows : {1, 2, 3, 5, 8, 9, 16, 33}) {
            run_linear(n_rows, 1, 1, dtype, 0, 1);
            run_linear(n_rows, 37, 19, dtype, 3, 1);
            run_linear(n_rows, 64, 2100, dtype, 0, 2);
        }
    }
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
