// The pieces of rwkv7_fused of libwkv on odd sizes, strides and threads, compared with their definitions in double
// precision: one head of one token at a time, gradients as finite differences.
#include "numbers.h"

namespace {

using namespace test;

using Values = std::vector<double>;
using Tensors = std::vector<Tensor>;

// Inputs are first the n_rows that every token has, then parameters.
struct Piece {
    const char* name;
    size_t n_rows, n_inputs, n_outputs;
    std::vector<Values> (*define)(const std::vector<Values>& inputs);
    int (*forward)(rwkv7_sizes sizes, Tensors& inputs, Tensors& outputs);
    int (*backward)(rwkv7_sizes sizes, Tensors& inputs, Tensors& grad_outputs, Tensors& grads);
};

wkv_rows rows(Tensor& x) {
    return {x.data(), x.dtype, x.strides[0], x.strides[1]};
}

wkv_vector vector(Tensor& x) {
    return {x.data(), x.dtype};
}

double sigmoid(double x) {
    return 1 / (1 + std::exp(-x));
}

std::vector<Values> define_shift_mix(const std::vector<Values>& in) {
    std::vector<Values> out(in.size() - 2, in[0]);
    for (size_t i = 0; i < out.size(); ++i)
        for (size_t c = 0; c < in[0].size(); ++c) out[i][c] += (in[1][c] - in[0][c]) * in[i + 2][c];
    return out;
}

rwkv7_shift_mix_args shift_mix(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    rwkv7_shift_mix_args args{};
    args.sizes = {sizes.B, sizes.T, 1, sizes.H * sizes.N, sizes.n_threads};
    args.n_mixes = static_cast<int64_t>(out.size());
    args.before_each = in[1].sizes[1] > 1;
    args.x = rows(in[0]), args.before = rows(in[1]);
    for (size_t i = 0; i < out.size(); ++i) args.mixes[i] = vector(in[i + 2]), args.mixed[i] = rows(out[i]);
    return args;
}

int run_shift_mix(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    const rwkv7_shift_mix_args args = shift_mix(sizes, in, out);
    return rwkv7_shift_mix(&args);
}

int run_shift_mix_backward(rwkv7_sizes sizes, Tensors& in, Tensors& out, Tensors& grads) {
    rwkv7_shift_mix_backward_args args{shift_mix(sizes, in, out), rows(grads[0]), rows(grads[1]), {}};
    for (size_t i = 0; i < out.size(); ++i) args.grad_mixes[i] = vector(grads[i + 2]);
    return rwkv7_shift_mix_backward(&args);
}

std::vector<Values> define_key_stage(const std::vector<Values>& in) {
    const size_t N = in[0].size();
    std::vector<Values> out(4, Values(N));
    double square = 0;
    for (size_t c = 0; c < N; ++c) square += std::pow(in[1][c] * in[3][c], 2);
    for (size_t c = 0; c < N; ++c) {
        const double raw_w = in[0][c], raw_k = in[1][c], rate = sigmoid(in[2][c]), k_k = in[3][c], k_a = in[4][c];
        const double kk = raw_k * k_k / std::sqrt(square);
        out[0][c] = -std::exp(-0.5) * sigmoid(raw_w);
        out[1][c] = raw_k * (1 + (rate - 1) * k_a);
        out[2][c] = -kk;
        out[3][c] = kk * rate;
    }
    return out;
}

rwkv7_key_stage_args key_stage(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    return {sizes,         rows(in[0]),  rows(in[1]),  rows(in[2]),  vector(in[3]),
            vector(in[4]), rows(out[0]), rows(out[1]), rows(out[2]), rows(out[3])};
}

int run_key_stage(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    const rwkv7_key_stage_args args = key_stage(sizes, in, out);
    return rwkv7_key_stage(&args);
}

int run_key_stage_backward(rwkv7_sizes sizes, Tensors& in, Tensors& out, Tensors& grads) {
    const rwkv7_key_stage_backward_args args{key_stage(sizes, in, out), rows(grads[0]),  rows(grads[1]), rows(grads[2]),
                                             vector(grads[3]),          vector(grads[4])};
    return rwkv7_key_stage_backward(&args);
}

std::vector<Values> define_value_residual(const std::vector<Values>& in) {
    Values out = in[0];
    for (size_t c = 0; c < out.size(); ++c) out[c] += (in[1][c] - in[0][c]) * sigmoid(in[2][c]);
    return {out};
}

int run_value_residual(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    const rwkv7_value_residual_args args{sizes, rows(in[0]), rows(in[1]), rows(in[2]), rows(out[0])};
    return rwkv7_value_residual(&args);
}

int run_value_residual_backward(rwkv7_sizes sizes, Tensors& in, Tensors& out, Tensors& grads) {
    const rwkv7_value_residual_backward_args args{
        {sizes, rows(in[0]), rows(in[1]), rows(in[2]), rows(out[0])}, rows(grads[0]), rows(grads[1]), rows(grads[2])};
    return rwkv7_value_residual_backward(&args);
}

constexpr double kEps = 64e-5;

std::vector<Values> define_out_stage(const std::vector<Values>& in) {
    const Values &o = in[0], &r = in[1], &k = in[2], &v = in[3], &g = in[4], &r_k = in[5], &weight = in[6];
    const double N = static_cast<double>(o.size());
    double mean = 0, variance = 0, bonus = 0;
    for (double x : o) mean += x / N;
    for (double x : o) variance += std::pow(x - mean, 2) / N;
    for (size_t c = 0; c < o.size(); ++c) bonus += r[c] * k[c] * r_k[c];
    Values y = in[7];
    for (size_t c = 0; c < o.size(); ++c) {
        y[c] += (o[c] - mean) / std::sqrt(variance + kEps) * weight[c] + bonus * v[c];
        y[c] *= g[c];
    }
    return {y};
}

rwkv7_out_stage_args out_stage(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    return {sizes,       kEps,          rows(in[0]),   rows(in[1]),   rows(in[2]), rows(in[3]),
            rows(in[4]), vector(in[5]), vector(in[6]), vector(in[7]), rows(out[0])};
}

int run_out_stage(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    const rwkv7_out_stage_args args = out_stage(sizes, in, out);
    return rwkv7_out_stage(&args);
}

int run_out_stage_backward(rwkv7_sizes sizes, Tensors& in, Tensors& out, Tensors& grads) {
    const rwkv7_out_stage_backward_args args{
        out_stage(sizes, in, out), rows(grads[0]),   rows(grads[1]),  rows(grads[2]), rows(grads[3]), rows(grads[4]),
        vector(grads[5]),          vector(grads[6]), vector(grads[7])};
    return rwkv7_out_stage_backward(&args);
}

std::vector<Values> define_relu_squared(const std::vector<Values>& in) {
    Values y = in[0];
    for (double& x : y) x = std::pow(std::max(x, 0.0), 2);
    return {y};
}

int run_relu_squared(rwkv7_sizes sizes, Tensors& in, Tensors& out) {
    const rwkv7_relu_squared_args args{sizes, rows(in[0]), rows(out[0])};
    return rwkv7_relu_squared(&args);
}

int run_relu_squared_backward(rwkv7_sizes sizes, Tensors& in, Tensors& out, Tensors& grads) {
    const rwkv7_relu_squared_backward_args args{{sizes, rows(in[0]), rows(out[0])}, rows(grads[0])};
    return rwkv7_relu_squared_backward(&args);
}

constexpr Piece kPieces[] = {
    {"shift_mix", 2, 8, 6, define_shift_mix, run_shift_mix, run_shift_mix_backward},
    {"shift_mix of one", 2, 3, 1, define_shift_mix, run_shift_mix, run_shift_mix_backward},
    {"key_stage", 3, 5, 4, define_key_stage, run_key_stage, run_key_stage_backward},
    {"value_residual", 3, 3, 1, define_value_residual, run_value_residual, run_value_residual_backward},
    {"out_stage", 5, 8, 1, define_out_stage, run_out_stage, run_out_stage_backward},
    {"relu_squared", 1, 1, 1, define_relu_squared, run_relu_squared, run_relu_squared_backward},
};

// The N channels of a head: of token t in batch row b, or of a parameter.
double* head(Exact& x, int64_t b, int64_t t, int64_t h, int64_t N) {
    return x.sizes[0] * x.sizes[1] == 1 ? &x(0, 0, 0, h * N) : &x(b, t, 0, h * N);
}

void define_head(const Piece& piece, std::vector<Exact>& inputs, std::vector<Exact>& outputs,
                 std::vector<Exact>& grad_outputs, std::vector<Exact>& grads, int64_t b, int64_t t, int64_t h,
                 int64_t N) {
    std::vector<Values> in;
    for (Exact& x : inputs) in.emplace_back(head(x, b, t, h, N), head(x, b, t, h, N) + N);
    const std::vector<Values> out = piece.define(in);
    for (size_t i = 0; i < out.size(); ++i) std::copy(out[i].begin(), out[i].end(), head(outputs[i], b, t, h, N));
    const auto loss = [&] {
        double sum = 0;
        const std::vector<Values> out = piece.define(in);
        for (size_t i = 0; i < out.size(); ++i)
            for (int64_t c = 0; c < N; ++c) sum += out[i][c] * head(grad_outputs[i], b, t, h, N)[c];
        return sum;
    };
    constexpr double kStep = 1e-5;
    for (size_t i = 0; i < in.size(); ++i) {
        for (int64_t c = 0; c < N; ++c) {
            const double x = in[i][c];
            in[i][c] = x + kStep;
            const double above = loss();
            in[i][c] = x - kStep;
            head(grads[i], b, t, h, N)[c] += (above - loss()) / (2 * kStep);
            in[i][c] = x;
        }
    }
}

std::vector<Exact> exact(const Tensors& tensors) {
    std::vector<Exact> values;
    for (const Tensor& x : tensors) values.push_back(x.exact());
    return values;
}

// With `carried`, the second input (of shift_mix) has one token a row, that before the first; the others follow from x.
void run(const Piece& piece, rwkv7_sizes s, int64_t dtype, int64_t parameters, int64_t gap, bool carried = false) {
    const Sizes rows{s.B, s.T, 1, s.H * s.N}, vector{1, 1, 1, s.H * s.N}, first{s.B, 1, 1, s.H * s.N};
    Tensors inputs, grads, outputs, grad_outputs;
    for (size_t i = 0; i < piece.n_inputs; ++i) {
        const bool is_rows = i < piece.n_rows;
        const Sizes& sizes = !is_rows ? vector : carried && i == 1 ? first : rows;
        inputs.emplace_back(sizes, is_rows ? dtype : parameters, is_rows ? gap : 0).fill(-2, 2);
        grads.emplace_back(sizes, is_rows ? dtype : parameters, is_rows ? gap : 0);
    }
    for (size_t i = 0; i < piece.n_outputs; ++i) {
        outputs.emplace_back(rows, dtype, gap);
        grad_outputs.emplace_back(rows, dtype, gap).fill(-2, 2);
    }

    std::vector<Exact> in = exact(inputs), grad_out = exact(grad_outputs), out, grad;
    for (size_t i = 0; i < piece.n_outputs; ++i) out.emplace_back(rows);
    const auto shift = [&](auto f) {
        for (int64_t b = 0; b < s.B; ++b)
            for (int64_t t = 0; t < s.T; ++t)
                for (int64_t c = 0; c < rows[3]; ++c) f(b, t, c);
    };
    if (carried) {
        const Exact before = in[1];
        in[1] = Exact(rows);
        shift([&](int64_t b, int64_t t, int64_t c) {
            in[1](b, t, 0, c) = t > 0 ? in[0](b, t - 1, 0, c) : before(b, 0, 0, c);
        });
    }
    for (const Exact& x : in) grad.emplace_back(x.sizes);
    for (int64_t i = 0; i < s.B * s.T * s.H; ++i)
        define_head(piece, in, out, grad_out, grad, i / s.H / s.T, i / s.H % s.T, i % s.H, s.N);
    if (carried) {
        const Exact of_before = grad[1];
        grad[1] = Exact(first);
        shift([&](int64_t b, int64_t t, int64_t c) {
            (t > 0 ? grad[0](b, t - 1, 0, c) : grad[1](b, 0, 0, c)) += of_before(b, t, 0, c);
        });
    }

    require(piece.forward(s, inputs, outputs) == WKV_OK, piece.name);
    require(piece.backward(s, inputs, grad_outputs, grads) == WKV_OK, piece.name);
    for (size_t i = 0; i < out.size(); ++i) expect(outputs[i], out[i], piece.name);
    for (size_t i = 0; i < grad.size(); ++i) expect(grads[i], grad[i], piece.name);
}

}  // namespace

int main(int argc, char** argv) {
    read_tolerances(argc, argv);
    require(wkv_isa() != nullptr, "no instruction set");
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        for (const Piece& piece : kPieces) {
            run(piece, {2, 1, 1, 64, 1}, dtype, dtype, 0);
            run(piece, {1, 33, 1, 20, 2}, dtype, WKV_FLOAT32, 3);
            run(piece, {3, 2, 1, 7, 1}, dtype, dtype, 1);
            run(piece, {1, 2, 35, 16, 1}, dtype, WKV_FLOAT32, 0);
            if (piece.define == define_shift_mix) run(piece, {2, 33, 1, 19, 2}, dtype, dtype, 1, true);
        }
    }
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
