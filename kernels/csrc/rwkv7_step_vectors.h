// Vectors of any length for the fused RWKV-7 step: their ends, functions of every number, and norms.
#pragma once

#include "few_rows.h"

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

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
