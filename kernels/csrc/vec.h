// Vectors of float32 for the sources that are compiled once per instruction set, in the compiler's own vector
// extension.
//
// Everything here and in those sources has internal linkage and nothing comes from the standard library's templates: a
// symbol that two builds shared could be merged by the linker into the one that this machine cannot run.
#pragma once

#include <stdint.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "wkv.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

#define WKV_INLINE inline __attribute__((always_inline))

// kLanes floats in a vector; kTile vectors fit in the registers beside three as many accumulators.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 4;
#define WKV_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define WKV_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define WKV_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define WKV_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTile = 2;
#define WKV_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define WKV_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define WKV_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define WKV_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#if defined(__aarch64__)
constexpr int kLanes = 4, kTile = 4;
#else
constexpr int kLanes = 4, kTile = 2;
#endif
#define WKV_EVEN 0, 2, 4, 6
#define WKV_ODD 1, 3, 5, 7
#define WKV_LOW 0, 4, 1, 5
#define WKV_HIGH 2, 6, 3, 7
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));

WKV_INLINE Vec load(const float* p) {
    Vec x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

WKV_INLINE void store(float* p, Vec x) {
    __builtin_memcpy(p, &x, sizeof x);
}

// Every second value of x, then of y.
WKV_INLINE Vec even_lanes(Vec x, Vec y) {
    return __builtin_shufflevector(x, y, WKV_EVEN);
}

// Neighbours added: the first half of the result comes from x, the second from y.
WKV_INLINE Vec add_pairs(Vec x, Vec y) {
    return even_lanes(x, y) + __builtin_shufflevector(x, y, WKV_ODD);
}

// to[j * ld_to + i] = from[i * ld_from + j] for i, j in [0, kLanes): log2(kLanes) perfect shuffles.
WKV_INLINE void transpose(float* to, int64_t ld_to, const float* from, int64_t ld_from) {
    Vec x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = load(from + i * ld_from);
    for (int step = 1; step < kLanes; step *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + kLanes / 2], WKV_LOW);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + kLanes / 2], WKV_HIGH);
        }
        for (int i = 0; i < kLanes; ++i) x[i] = y[i];
    }
    for (int i = 0; i < kLanes; ++i) store(to + i * ld_to, x[i]);
}

// e^x within 1.5 ulp; 0 below -86.6, infinity above 88.72, NaN for NaN. x = n ln 2 + z, e^z by a polynomial (minimax on
// |z| <= ln 2 / 2), 2^n by its exponent bits, in two factors because n reaches 128.
WKV_INLINE Vec exp(Vec x) {
    const Vec magic = Vec{} + 12582912.0f;
    const Vec low = Vec{} - 86.6f, high = Vec{} + 88.72284f;
    // Comparisons with NaN are false, so NaN passes through both.
    const Vec clamped = x < low ? low : (x > high ? high : x);
    const Vec n = (clamped * 1.44269504088896341f + magic) - magic;
    const Vec z = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = z * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * z + 8.3334519073e-3f;
    p = p * z + 4.1665795894e-2f;
    p = p * z + 1.6666665459e-1f;
    p = p * z + 5.0000001201e-1f;
    p = p * (z * z) + z + 1.0f;
    // NaN converts to some integer here; p is NaN already.
    const IVec bits = (__builtin_convertvector(n, IVec) + 126) << 23;
    Vec scale;
    __builtin_memcpy(&scale, &bits, sizeof scale);
    const Vec y = p * scale * 2.0f;
    return x < low ? Vec{} : (x > high ? Vec{} + __builtin_inff() : y);
}

WKV_INLINE Vec sigmoid(Vec x) {
    return 1.0f / (1.0f + exp(-x));
}

WKV_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

WKV_INLINE float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

WKV_INLINE float from_bfloat16(uint16_t x) {
    return float_of(static_cast<uint32_t>(x) << 16);
}

// Rounds to nearest, ties to even.
WKV_INLINE uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

WKV_INLINE float from_float16(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(x & 0x7fff) << 13;
    // Multiplying by 2^112 moves the exponent to its new bias and normalises subnormal numbers.
    const float magnitude = float_of(rest) * 0x1p112f;
    return float_of(sign | ((x & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : bits_of(magnitude)));
#endif
}

WKV_INLINE uint16_t to_float16(float x) {
#if defined(__F16C__)
    return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000;
    const uint32_t size = bits_of(x) & 0x7fffffff;
    uint32_t half;
    if (size > 0x7f800000) {
        half = 0x7e00;
    } else if (size >= 0x477ff000) {
        half = 0x7c00;
    } else if (size < 0x38800000) {
        // Adding 0.5 leaves a subnormal's bits, rounded, at the low end of the mantissa.
        half = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    } else {
        half = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
#endif
}

// Reads n elements of a dtype of wkv.h as float32 and fills up to n_padded with zeros.
WKV_INLINE void unpack(float* to, const void* from, int64_t dtype, int64_t n, int64_t n_padded) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    if (dtype == WKV_FLOAT32) {
        __builtin_memcpy(to, from, n * sizeof(float));
    } else if (dtype == WKV_BFLOAT16) {
        for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(half[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = from_float16(half[i]);
    }
    for (int64_t i = n; i < n_padded; ++i) to[i] = 0.0f;
}

WKV_INLINE void pack(void* to, const float* from, int64_t dtype, int64_t n) {
    uint16_t* half = static_cast<uint16_t*>(to);
    if (dtype == WKV_FLOAT32) {
        __builtin_memcpy(to, from, n * sizeof(float));
    } else if (dtype == WKV_BFLOAT16) {
        for (int64_t i = 0; i < n; ++i) half[i] = to_bfloat16(from[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) half[i] = to_float16(from[i]);
    }
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
