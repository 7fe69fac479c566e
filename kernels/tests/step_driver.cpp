// Calls the fused RWKV-7 step and few_rows_linear of libwkv on odd sizes, with memory that ends with the last number;
// meant to be built with sanitizers, and to run with malloc filling new memory with NaN. Exits with 1 when a result is
// not finite, or differs between one thread and several.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "wkv.h"

namespace {

std::mt19937 generator(0);

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "step_driver: %s\n", what);
    std::exit(1);
}

// Numbers of a dtype; owns what it hands out. Halves are small numbers of both signs: 0x3000 is 2^-3 in float16 and
// 2^-31 in bfloat16.
struct Memory {
    int64_t dtype;
    std::deque<std::vector<char>> blocks;

    void* draw(int64_t n, int64_t kind) {
        const int64_t size = kind == WKV_FLOAT32 ? 4 : 2;
        std::vector<char>& block = blocks.emplace_back(n * size);
        for (int64_t i = 0; i < n; ++i) {
            const float value = std::uniform_real_distribution<float>(-0.5f, 0.5f)(generator);
            const uint16_t half = value < 0 ? 0xb000 : 0x3000;
            std::memcpy(block.data() + i * size, size == 4 ? static_cast<const void*>(&value) : &half, size);
        }
        return block.data();
    }

    void* draw(int64_t n) { return draw(n, dtype); }
};

void require_finite(const void* data, int64_t n, int64_t dtype, const char* what) {
    for (int64_t i = 0; i < n; ++i) {
        if (dtype == WKV_FLOAT32) {
            require(std::isfinite(static_cast<const float*>(data)[i]), what);
        } else {
            const uint16_t exponent = dtype == WKV_BFLOAT16 ? 0x7f80 : 0x7c00;
            require((static_cast<const uint16_t*>(data)[i] & exponent) != exponent, what);
        }
    }
}

void run_linear(int64_t n_rows, int64_t n_in, int64_t n_out, int64_t dtype) {
    Memory memory{dtype, {}};
    const wkv_few_rows_linear_args args{n_rows,
                                        n_in,
                                        n_out,
                                        dtype,
                                        2,
                                        memory.draw((n_rows - 1) * (n_in + 3) + n_in),
                                        n_in + 3,
                                        memory.draw(n_out * n_in),
                                        memory.draw(n_rows * n_out),
                                        n_out};
    require(wkv_few_rows_linear(&args) == WKV_OK, "status of few_rows_linear");
    require_finite(args.y, n_rows * n_out, dtype, "few_rows_linear");
}

struct Sizes {
    int64_t B, C, H, K, F, L, ranks[4];
};

// Returns the output, as bytes, of a few steps.
std::vector<char> run_step(const Sizes& s, int64_t dtype, bool value_by_unit, int64_t n_threads) {
    generator.seed(7);
    Memory m{dtype, {}};
    const int64_t A = s.H * s.K, size = dtype == WKV_FLOAT32 ? 4 : 2;
    std::vector<wkv_rwkv7_layer> layers;
    std::vector<wkv_rwkv7_layer_state> states;
    for (int64_t i = 0; i < s.L; ++i) {
        wkv_rwkv7_layer w{};
        const auto set = [&](int64_t n, std::initializer_list<const void**> vectors) {
            for (const void** vector : vectors) *vector = m.draw(n);
        };
        set(s.C, {&w.attn_norm_weight, &w.attn_norm_bias, &w.ffn_norm_weight, &w.ffn_norm_bias, &w.x_r, &w.x_w, &w.x_k,
                  &w.x_v, &w.x_a, &w.x_g, &w.ffn_x_k});
        set(A, {&w.k_k, &w.k_a, &w.r_k, &w.g_norm_weight, &w.g_norm_bias, &w.w_bias, &w.a_bias});
        set(A * s.C, {&w.r_proj, &w.k_proj, &w.v_proj, &w.o_proj});
        set(s.ranks[0] * s.C, {&w.w_down});
        set(s.ranks[1] * s.C, {&w.a_down});
        set(s.ranks[3] * s.C, {&w.g_down});
        set(s.ranks[0] * A, {&w.w_up});
        set(s.ranks[1] * A, {&w.a_up});
        set(s.ranks[3] * A, {&w.g_up});
        if (i > 0) {
            set(s.ranks[2] * s.C, {&w.v_down});
            set(s.ranks[2] * A, {&w.v_up});
            set(A, {&w.v_bias});
        }
        set(s.F * s.C, {&w.key, &w.value});
        w.value_by_unit = value_by_unit;
        layers.push_back(w);
        states.push_back(
            {m.draw(s.B * s.C), m.draw(s.B * s.C), static_cast<float*>(m.draw(s.B * s.H * s.K * s.K, WKV_FLOAT32))});
    }
    const wkv_rwkv7_step_args args{s.B,
                                   s.C,
                                   s.H,
                                   s.K,
                                   s.F,
                                   s.L,
                                   s.ranks[0],
                                   s.ranks[1],
                                   s.ranks[2],
                                   s.ranks[3],
                                   dtype,
                                   n_threads,
                                   1e-5,
                                   64e-5,
                                   m.draw(s.C),
                                   m.draw(s.C),
                                   m.draw(s.C),
                                   m.draw(s.C),
                                   layers.data(),
                                   states.data(),
                                   m.draw(s.B * s.C),
                                   m.draw(s.B * s.C)};
    for (int i = 0; i < 3; ++i) require(wkv_rwkv7_step(&args) == WKV_OK, "status of the step");
    require_finite(args.out, s.B * s.C, dtype, "step");
    for (const wkv_rwkv7_layer_state& state : states) {
        require_finite(state.attn_shift, s.B * s.C, dtype, "attention shift");
        require_finite(state.ffn_shift, s.B * s.C, dtype, "feed-forward shift");
        require_finite(state.S, s.B * s.H * s.K * s.K, WKV_FLOAT32, "state");
    }
    const char* out = static_cast<const char*>(args.out);
    return {out, out + s.B * s.C * size};
}

}  // namespace

int main() {
    const Sizes sizes[] = {
        {1, 13, 2, 5, 7, 2, {1, 2, 3, 4}},        {3, 64, 2, 32, 96, 1, {5, 3, 0, 17}},
        {5, 33, 1, 64, 32, 2, {16, 7, 9, 11}},    {17, 16, 1, 16, 1, 2, {1, 1, 1, 1}},
        {2, 150, 3, 64, 500, 2, {32, 8, 16, 20}}, {2, 210, 3, 64, 1003, 1, {9, 8, 16, 20}},
    };
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        for (const Sizes& s : sizes) {
            for (bool value_by_unit : {false, true}) {
                const std::vector<char> alone = run_step(s, dtype, value_by_unit, 1);
                require(alone == run_step(s, dtype, value_by_unit, 3), "several threads give another result");
            }
        }
        for (int64_t n_rows : {1, 2, 3, 5, 8, 9, 16, 33}) {
            run_linear(n_rows, 1, 1, dtype);
            run_linear(n_rows, 37, 19, dtype);
            run_linear(n_rows, 64, 2100, dtype);
        }
    }
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
