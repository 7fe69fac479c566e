// Products of a matrix with a few vectors: every weight is read once, in its own dtype, and used for all vectors.
//
// Letters: B vectors of n float32, followed by zeros up to padded(n); the matrix is row-major, its rows n long.
#pragma once

#include "vec.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));

// As many vectors as go through a matrix together: their accumulators, two vectors each, fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxTile = 8;
#else
constexpr int kMaxTile = 4;
#endif

constexpr int64_t size_of(int64_t dtype) {
    return dtype == WKV_FLOAT32 ? 4 : 2;
}

// kLanes numbers of 16 bits in the low halves of 32. The compiler's own conversion takes several times as long.
WKV_INLINE UVec load_halves(const char* from) {
#if defined(__AVX512F__)
    return (UVec)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return (UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
    HalfVec halves;
    __builtin_memcpy(&halves, from, sizeof halves);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return (UVec)__builtin_shufflevector(halves, HalfVec{}, 0, 4, 1, 5, 2, 6, 3, 7);
#else
    return (UVec)__builtin_shufflevector(HalfVec{}, halves, 0, 4, 1, 5, 2, 6, 3, 7);
#endif
#endif
}

// kLanes weights as float32.
template <int64_t kDtype>
WKV_INLINE Vec widen(const char* from) {
    if constexpr (kDtype == WKV_FLOAT32) {
        Vec x;
        __builtin_memcpy(&x, from, sizeof x);
        return x;
    } else if constexpr (kDtype == WKV_BFLOAT16) {
        return (Vec)(load_halves(from) << 16);
    } else {
#if defined(__AVX512F__)
        // The unmasked form makes GCC 12 warn about its own header.
        return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
        // As from_float16 of vec.h, for a whole vector.
        const UVec bits = load_halves(from), sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
        const UVec magnitude = (UVec)((Vec)rest * 0x1p112f);
        return (Vec)(sign | ((bits & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : magnitude));
#endif
    }
}

// The same for the last n < kLanes weights; zeros follow.
template <int64_t kDtype>
WKV_INLINE Vec widen(const char* from, int64_t n) {
    char padded[sizeof(Vec)] = {};
    __builtin_memcpy(padded, from, n * size_of(kDtype));
    return widen<kDtype>(padded);
}

// to[i] for i < n; n_padded of them are written.
template <int64_t kDtype>
WKV_INLINE void widen_all(float* to, const char* from, int64_t n, int64_t n_padded) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, widen<kDtype>(from + i * size_of(kDtype)));
    if (i < n) {
        const Vec last = widen<kDtype>(from + i * size_of(kDtype), n - i);
        __builtin_memcpy(to + i, &last, (n - i) * sizeof(float));
    }
    for (i = n; i < n_padded; ++i) to[i] = 0.0f;
}

// Calls f with the dtype as a template argument: f.template operator()<kDtype>().
template <class F>
WKV_INLINE void with_dtype(int64_t dtype, const F& f) {
    if (dtype == WKV_FLOAT32)
        f.template operator()<WKV_FLOAT32>();
    else if (dtype == WKV_BFLOAT16)
        f.template operator()<WKV_BFLOAT16>();
    else
        f.template operator()<WKV_FLOAT16>();
}

// Lane i of the result is the sum of x[i]; x is used up.
WKV_INLINE Vec sum_each(Vec* x) {
    for (int n = kLanes / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) x[i] = add_pairs(x[2 * i], x[2 * i + 1]);
    return x[0];
}

// How far ahead memory is asked for, in bytes: for the first-level cache, and for the second, which is what fills the
// bandwidth. Measured: the prefetcher of the machine alone reaches two thirds of it, the near one with it four fifths.
constexpr int64_t kAhead = 1024, kFarAhead = 8192;
constexpr int kSecondLevel = 2;

// Unreduced products of n_rows <= kLanes rows with kB vectors: row r and vector b to sums[b * kLanes + r]. Another
// thread may be reading what lies behind w_end.
template <int64_t kDtype, int kB>
void multiply_block(Vec* sums, const char* w, const char* w_end, int64_t n_rows, int64_t n, const float* x,
                    int64_t ld_x) {
    // Enough independent sums to keep the multipliers busy.
    constexpr int kUnroll = kB <= 2 ? 4 : 2;
    constexpr int64_t kSize = size_of(kDtype);
    for (int64_t r = 0; r < n_rows; ++r, w += n * kSize) {
        const int64_t left = w_end - w - n * kSize, near = left >= kAhead ? kAhead : 0;
        const int64_t far = left >= kFarAhead ? kFarAhead : 0;
        Vec sum[kUnroll][kB];
        for (int u = 0; u < kUnroll; ++u)
            for (int b = 0; b < kB; ++b) sum[u][b] = Vec{};
        int64_t i = 0;
        for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
            for (int u = 0; u < kUnroll; ++u) {
                const char* at = w + (i + u * kLanes) * kSize;
                if (u * kLanes * kSize % 64 == 0) {
                    __builtin_prefetch(at + near);
                    __builtin_prefetch(at + far, 0, kSecondLevel);
                }
                const Vec y = widen<kDtype>(at);
                for (int b = 0; b < kB; ++b) sum[u][b] += y * load(x + b * ld_x + i + u * kLanes);
            }
        }
        for (; i < n; i += kLanes) {
            const char* at = w + i * kSize;
            const Vec y = i + kLanes <= n ? widen<kDtype>(at) : widen<kDtype>(at, n - i);
            for (int b = 0; b < kB; ++b) sum[0][b] += y * load(x + b * ld_x + i);
        }
        for (int b = 0; b < kB; ++b) {
            for (int u = 1; u < kUnroll; ++u) sum[0][b] += sum[u][b];
            sums[b * kLanes + r] = sum[0][b];
        }
    }
}

template <int64_t kDtype>
WKV_INLINE void multiply_block(int64_t B, Vec* sums, const char* w, const char* w_end, int64_t n_rows, int64_t n,
                               const float* x, int64_t ld_x) {
    using Block = void (*)(Vec*, const char*, const char*, int64_t, int64_t, const float*, int64_t);
    static constexpr Block kBlocks[] = {
        multiply_block<kDtype, 1>, multiply_block<kDtype, 2>, multiply_block<kDtype, 3>, multiply_block<kDtype, 4>,
#if defined(__AVX512F__) || defined(__aarch64__)
        multiply_block<kDtype, 5>, multiply_block<kDtype, 6>, multiply_block<kDtype, 7>, multiply_block<kDtype, 8>,
#endif
    };
    kBlocks[B - 1](sums, w, w_end, n_rows, n, x, ld_x);
}

// Products of the rows [begin, end) of w with each of B vectors. Calls use(b, row, values, count) with the products of
// vector b with the rows from `row` on.
template <int64_t kDtype, class Use>
WKV_INLINE void multiply_rows(const void* w, int64_t n, int64_t begin, int64_t end, const float* x, int64_t ld_x,
                              int64_t B, const Use& use) {
    const int64_t n_tiles = (B + kMaxTile - 1) / kMaxTile;
    Vec sums[kMaxTile * kLanes];
    const char* w_end = static_cast<const char*>(w) + end * n * size_of(kDtype);
    for (int64_t row = begin; row < end; row += kLanes) {
        const int64_t count = end - row < kLanes ? end - row : kLanes;
        const char* at = static_cast<const char*>(w) + row * n * size_of(kDtype);
        for (int64_t tile = 0; tile < n_tiles; ++tile) {
            const int64_t first = tile * B / n_tiles, last = (tile + 1) * B / n_tiles;
            for (int64_t b = 0; b < last - first; ++b)
                for (int64_t i = count; i < kLanes; ++i) sums[b * kLanes + i] = Vec{};
            multiply_block<kDtype>(last - first, sums, at, w_end, count, n, x + first * ld_x, ld_x);
            for (int64_t b = first; b < last; ++b) {
                float values[kLanes];
                store(values, sum_each(sums + (b - first) * kLanes));
                use(b, row, values, count);
            }
        }
    }
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
