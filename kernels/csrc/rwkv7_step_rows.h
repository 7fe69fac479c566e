// What both halves of a layer do with vectors: activations, norms, token shift, adding to the residual.
#pragma once

#include "few_rows.h"
#include "rwkv7_step.h"

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

// residual += w x for the rows [begin, end) of w, which are n long.
template <int64_t kDtype>
WKV_INLINE void add_rows(const Rwkv7Step& step, const void* w, int64_t n, const float* x, int64_t ld_x, int64_t begin,
                         int64_t end) {
    const auto add = [&](int64_t b, int64_t row, const float* values, int64_t count) {
        float* h = step.residual + b * step.Cp + row;
        for (int64_t i = 0; i < count; ++i) h[i] += values[i];
    };
    multiply_rows<kDtype>(w, n, begin, end, x, ld_x, step.args.B, add);
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
