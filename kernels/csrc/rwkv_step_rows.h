// What the halves of a layer of any generation have in common: activations, norms, token shift, products with rows or
// columns of matrices, adding to the residual.
#pragma once

#include "rwkv_step_terms.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

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
WKV_INLINE void norm_and_mix(const RwkvStep& step, float* to, const void* weight, const void* bias, const void* shift,
                             const void* const (&mixes)[kMixes]) {
    const int64_t B = step.args.B, C = step.args.C, Cp = step.Cp;
    // The parameters of RWKV-4 and 5 are shares of the current token, those of later ones of the token before.
    const float constant = step.args.generation < 6 ? 1.0f : 0.0f, sign = step.args.generation < 6 ? -1.0f : 1.0f;
    for (int64_t b = 0; b < B; ++b) {
        float* x = to + (kMixes * B + b) * Cp;
        layer_norm<kDtype>(x, step.residual + b * Cp, C, weight, bias, step.args.norm_eps);
        const char* previous = static_cast<const char*>(shift) + b * C * size_of(kDtype);
        for (int64_t i = 0; i < C; i += kLanes) {
            const Vec y = load(x + i), delta = at<kDtype>(previous, i, C) - y;
            for (int m = 0; m < kMixes; ++m)
                store(to + (m * B + b) * Cp + i, y + delta * (constant + sign * at<kDtype>(mixes[m], i, C)));
        }
    }
}

// Keeps a norm for the next token; the threads still read the last one's.
void keep_shift(const RwkvStep& step, const float* x) {
    __builtin_memcpy(step.shifted, x, step.args.B * step.Cp * sizeof(float));
}

void write_shift(const RwkvStep& step, void* shift) {
    const int64_t C = step.args.C, dtype = step.args.dtype;
    for (int64_t b = 0; b < step.args.B; ++b)
        pack(static_cast<char*>(shift) + b * C * size_of(dtype), step.shifted + b * step.Cp, dtype, C);
}

// What a part of a phase works on.
struct Part {
    const RwkvStep& step;
    const int64_t layer;
    float* const local;
    const rwkv_step_layer& weights = step.args.layers[layer];
    const rwkv_step_state& state = step.args.states[layer];
    const int64_t B = step.args.B, C = step.args.C, H = step.args.H, K = step.args.K, F = step.args.F, A = step.A;
};

// A matrix of n rows, and where the products with its input go.
struct Projection {
    int64_t matrix;
    const void* w;
    int64_t n;
    float* to;
    int64_t ld;
};

// Rows [begin, end) of matrices that are counted one after the other.
template <int64_t kDtype, class Half, int kN>
WKV_INLINE void project(const Half& half, const Projection (&matrices)[kN], int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Projection& m : matrices) {
        const int64_t from = begin > first ? begin - first : 0, to = end - first < m.n ? end - first : m.n;
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            __builtin_memcpy(m.to + b * m.ld + row, values, count * sizeof(float));
        };
        if (from < to) multiply<kDtype>(half.step, half.layer, m.matrix, m.w, half.input(m.matrix), from, to, write);
        first += m.n;
    }
}

// Calls use(i, x) with the numbers i to i + kLanes of a head, normalised.
template <int64_t kDtype, class Use>
WKV_INLINE void group_norm(const RwkvStep& step, const float* o, int64_t head, const void* weight, const void* bias,
                           const Use& use) {
    const int64_t K = step.args.K, offset = head * K * size_of(kDtype);
    const Moments m = moments(o, K, step.args.group_norm_eps);
    for (int64_t i = 0; i < K; i += kLanes)
        use(i, (load(o + i) - m.mean) * m.scale * at<kDtype>(static_cast<const char*>(weight) + offset, i, K) +
                   at<kDtype>(static_cast<const char*>(bias) + offset, i, K));
}

// Rows of weights that go together through the sums. Each sum takes them one after the other, so that a row whose
// factor is zero makes no difference whether it is there or not.
constexpr int kRowsTogether = 4;
// How many rows ahead memory is asked for.
constexpr int64_t kRowsAhead = 8;

// Adds the rows [i, i + kN) of n_rows, as in `add_scaled`.
template <int64_t kDtype, int kN, class Row>
WKV_INLINE void add_scaled_rows(float* sums, int64_t ld, int64_t i, int64_t n_rows, const Row& row,
                                const float* factors, int64_t B, int64_t n) {
    const char* rows[kN];
    const char* ahead[kN];
    for (int u = 0; u < kN; ++u) {
        rows[u] = row(i + u);
        ahead[u] = i + u + kRowsAhead < n_rows ? row(i + u + kRowsAhead) : rows[u];
    }
    factors += i * B;
    for (int64_t c = 0; c < n; c += kLanes) {
        Vec w[kN];
        for (int u = 0; u < kN; ++u) {
            const int64_t offset = c * size_of(kDtype);
            if (offset % 64 == 0) __builtin_prefetch(ahead[u] + offset, 0, kSecondLevel);
            w[u] = at<kDtype>(rows[u], c, n);
        }
        for (int64_t b = 0; b < B; ++b) {
            Vec y = load(sums + b * ld + c);
            for (int u = 0; u < kN; ++u) y += factors[u * B + b] * w[u];
            store(sums + b * ld + c, y);
        }
    }
}

// sums (B, ld) = factors^T (n_rows, B) times n_rows rows of n weights; row(i) is where they begin.
template <int64_t kDtype, class Row>
WKV_INLINE void add_scaled(float* sums, int64_t ld, int64_t n_rows, const Row& row, const float* factors, int64_t B,
                           int64_t n) {
    for (int64_t i = 0; i < B * ld; i += kLanes) store(sums + i, Vec{});
    for (int64_t i = 0; i < kRowsAhead && i < n_rows; ++i)
        for (int64_t c = 0; c < n * size_of(kDtype); c += 64) __builtin_prefetch(row(i) + c, 0, kSecondLevel);
    int64_t i = 0;
    for (; i + kRowsTogether <= n_rows; i += kRowsTogether)
        add_scaled_rows<kDtype, kRowsTogether>(sums, ld, i, n_rows, row, factors, B, n);
    for (; i < n_rows; ++i) add_scaled_rows<kDtype, 1>(sums, ld, i, n_rows, row, factors, B, n);
}

// sums (B, padded(end - begin)) = x w for the columns [begin, end) of w, (n_in, n_out) row-major; x (B, ld_x). The sums
// and behind them the factors, B n_in numbers, are the thread's own memory.
template <int64_t kDtype>
void multiply_columns(float* sums, const void* w, int64_t n_in, int64_t n_out, int64_t begin, int64_t end,
                      const float* x, int64_t ld_x, int64_t B) {
    const int64_t ld = padded(end - begin);
    float* factors = sums + B * ld;
    for (int64_t i = 0; i < n_in; ++i)
        for (int64_t b = 0; b < B; ++b) factors[i * B + b] = x[b * ld_x + i];
    const auto row = [&](int64_t i) { return static_cast<const char*>(w) + (i * n_out + begin) * size_of(kDtype); };
    add_scaled<kDtype>(sums, ld, n_in, row, factors, B, end - begin);
}

// residual += scale * w x for the rows [begin, end) of a matrix w; scale (B, Cp), or NULL for ones.
template <int64_t kDtype>
WKV_INLINE void add_rows(const RwkvStep& step, int64_t layer, int64_t matrix, const void* w, const Input& input,
                         int64_t begin, int64_t end, const float* scale = nullptr) {
    const auto add = [&](int64_t b, int64_t row, const float* values, int64_t count) {
        const int64_t at = b * step.Cp + row;
        for (int64_t i = 0; i < count; ++i) step.residual[at + i] += scale ? scale[at + i] * values[i] : values[i];
    };
    multiply<kDtype>(step, layer, matrix, w, input, begin, end, add);
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
