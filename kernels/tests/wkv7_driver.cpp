// wkv7 of libwkv and its gradients on odd sizes, strides and threads, compared with loops in double precision.
//
// Letters as in wkv.h: S state (K, V), d = exp(log_w), sa = a S; g for gradients, G = dL/dS.
#include "numbers.h"

namespace {

using namespace test;

struct Case {
    int64_t B, T, H, K, V, dtype, gap = 0, n_threads = 1;
    bool has_states = true;
    std::vector<int32_t> cu_seqlens = {};

    int64_t n_seq() const { return cu_seqlens.empty() ? B : static_cast<int64_t>(cu_seqlens.size()) - 1; }
    Sizes keys() const { return {B, T, H, K}; }
    Sizes values() const { return {B, T, H, V}; }
    Sizes states() const { return {n_seq(), H, K, V}; }
};

struct ExactInputs {
    Exact r, log_w, k, v, a, b, state, grad_o, grad_final_state;
};

struct ExactResults {
    Exact o, final_state, grad_r, grad_log_w, grad_k, grad_v, grad_a, grad_b, grad_state;

    explicit ExactResults(const Case& c)
        : o(c.values()),
          final_state(c.states()),
          grad_r(c.keys()),
          grad_log_w(c.keys()),
          grad_k(c.keys()),
          grad_v(c.values()),
          grad_a(c.keys()),
          grad_b(c.keys()),
          grad_state(c.states()) {}
};

// One head of sequence n, the tokens [begin, end) of batch row i, forward and backward.
void run_sequence(const ExactInputs& x, ExactResults& y, int64_t n, int64_t i, int64_t begin, int64_t end, int64_t h) {
    const int64_t K = x.state.sizes[2], V = x.state.sizes[3], T = end - begin;
    Exact S({1, T + 1, K, V}), sa({1, 1, T, V}), G({1, 1, K, V});
    const auto for_each = [&](auto f) {
        for (int64_t p = 0; p < K; ++p)
            for (int64_t q = 0; q < V; ++q) f(p, q);
    };
    for_each([&](int64_t p, int64_t q) { S(0, 0, p, q) = x.state(n, h, p, q); });
    for (int64_t t = 0; t < T; ++t) {
        const int64_t j = begin + t;
        for_each([&](int64_t p, int64_t q) { sa(0, 0, t, q) += x.a(i, j, h, p) * S(0, t, p, q); });
        for_each([&](int64_t p, int64_t q) {
            S(0, t + 1, p, q) = std::exp(x.log_w(i, j, h, p)) * S(0, t, p, q) + x.b(i, j, h, p) * sa(0, 0, t, q) +
                                x.k(i, j, h, p) * x.v(i, j, h, q);
            y.o(i, j, h, q) += x.r(i, j, h, p) * S(0, t + 1, p, q);
        });
    }
    for_each([&](int64_t p, int64_t q) {
        y.final_state(n, h, p, q) = S(0, T, p, q);
        G(0, 0, p, q) = x.grad_final_state(n, h, p, q);
    });
    for (int64_t t = T - 1; t >= 0; --t) {
        const int64_t j = begin + t;
        std::vector<double> grad_sa(V);
        for_each([&](int64_t p, int64_t q) {
            G(0, 0, p, q) += x.r(i, j, h, p) * x.grad_o(i, j, h, q);
            grad_sa[q] += x.b(i, j, h, p) * G(0, 0, p, q);
        });
        for_each([&](int64_t p, int64_t q) {
            const double d = std::exp(x.log_w(i, j, h, p)), g = G(0, 0, p, q);
            y.grad_r(i, j, h, p) += S(0, t + 1, p, q) * x.grad_o(i, j, h, q);
            y.grad_log_w(i, j, h, p) += d * g * S(0, t, p, q);
            y.grad_k(i, j, h, p) += g * x.v(i, j, h, q);
            y.grad_v(i, j, h, q) += g * x.k(i, j, h, p);
            y.grad_a(i, j, h, p) += S(0, t, p, q) * grad_sa[q];
            y.grad_b(i, j, h, p) += g * sa(0, 0, t, q);
            G(0, 0, p, q) = d * g + x.a(i, j, h, p) * grad_sa[q];
        });
    }
    for_each([&](int64_t p, int64_t q) { y.grad_state(n, h, p, q) = G(0, 0, p, q); });
}

void run(const Case& c) {
    const auto tensor = [&](const Sizes& sizes) { return Tensor(sizes, c.dtype, c.gap); };
    const auto single = [&](const Sizes& sizes, int64_t gap = 0) { return Tensor(sizes, WKV_FLOAT32, gap); };
    Tensor r = tensor(c.keys()).fill(-1, 1), k = tensor(c.keys()).fill(-1, 1), v = tensor(c.values()).fill(-1, 1);
    Tensor a = tensor(c.keys()).fill(-0.2, 0.1), b = tensor(c.keys()).fill(-0.1, 0.2);
    Tensor log_w = single(c.keys(), c.gap).fill(-0.6, 0), grad_o = tensor(c.values()).fill(-1, 1);
    const double scale = c.has_states ? 1 : 0;
    Tensor state = single(c.states()).fill(-scale, scale), grad_final_state = single(c.states()).fill(-scale, scale);

    const ExactInputs x{r.exact(),     log_w.exact(),  k.exact(),
                        v.exact(),     a.exact(),      b.exact(),
                        state.exact(), grad_o.exact(), grad_final_state.exact()};
    ExactResults y(c);
    for (int64_t n = 0; n < c.n_seq(); ++n)
        for (int64_t h = 0; h < c.H; ++h) {
            if (c.cu_seqlens.empty())
                run_sequence(x, y, n, n, 0, c.T, h);
            else
                run_sequence(x, y, n, 0, c.cu_seqlens[n], c.cu_seqlens[n + 1], h);
        }

    const auto of = [](Tensor& x) { return wkv_tensor{x.data(), x.dtype, x.strides[0], x.strides[1], x.strides[2]}; };
    const auto of_state = [&](Tensor& x) {
        return wkv_state{c.has_states ? static_cast<float*>(x.data()) : nullptr, x.strides[0], x.strides[1]};
    };
    wkv7_inputs in{};
    in.n_seq = c.n_seq(), in.length = c.T, in.H = c.H, in.K = c.K, in.V = c.V, in.n_threads = c.n_threads;
    in.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
    in.r = of(r), in.log_w = of(log_w), in.k = of(k), in.v = of(v), in.a = of(a), in.b = of(b);
    in.state = of_state(state);

    Tensor o = tensor(c.values()), final_state = single(c.states());
    const wkv7_forward_args forward{in, of(o), {static_cast<float*>(final_state.data()), c.H * c.K * c.V, c.K * c.V}};
    require(wkv7_forward(&forward) == WKV_OK, "wkv7_forward failed");
    expect(o, y.o, "wkv7: o");
    expect(final_state, y.final_state, "wkv7: final_state");

    Tensor grad_r = tensor(c.keys()), grad_k = tensor(c.keys()), grad_v = tensor(c.values());
    Tensor grad_a = tensor(c.keys()), grad_b = tensor(c.keys()), grad_log_w = single(c.keys(), c.gap);
    Tensor grad_state = single(c.states());
    wkv7_backward_args backward{};
    backward.in = in, backward.grad_o = of(grad_o), backward.grad_final_state = of_state(grad_final_state);
    backward.grad_r = of(grad_r), backward.grad_log_w = of(grad_log_w), backward.grad_k = of(grad_k);
    backward.grad_v = of(grad_v), backward.grad_a = of(grad_a), backward.grad_b = of(grad_b);
    backward.grad_state = of_state(grad_state);
    require(wkv7_backward(&backward) == WKV_OK, "wkv7_backward failed");
    expect(grad_r, y.grad_r, "wkv7: gradient of r");
    expect(grad_log_w, y.grad_log_w, "wkv7: gradient of log_w");
    expect(grad_k, y.grad_k, "wkv7: gradient of k");
    expect(grad_v, y.grad_v, "wkv7: gradient of v");
    expect(grad_a, y.grad_a, "wkv7: gradient of a");
    expect(grad_b, y.grad_b, "wkv7: gradient of b");
    if (c.has_states) expect(grad_state, y.grad_state, "wkv7: gradient of the state");
}

}  // namespace

int main(int argc, char** argv) {
    read_tolerances(argc, argv);
    require(wkv_isa() != nullptr, "no instruction set");
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        run({2, 17, 3, 64, 64, dtype, 0, 1, false});
        run({2, 37, 2, 24, 20, dtype, 3, 2});
        run({1, 9, 2, 5, 7, dtype, 1});
        run({1, 1, 1, 1, 130, dtype, 0, 1, false});
        run({1, 30, 2, 32, 32, dtype, 5, 1, true, {0, 0, 5, 6, 22, 30, 30}});
    }
    run({1, 160, 1, 64, 70, WKV_FLOAT32, 0, 3});
    run({1, 16, 1, 128, 128, WKV_FLOAT32});
    run({2, 0, 3, 16, 16, WKV_FLOAT32, 0, 2});
    run({0, 4, 3, 16, 16, WKV_FLOAT32, 0, 2});
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
