// The rows [begin, end) of cross_entropy; derivation in kernels/README.md.
//
// Letters: x logits of a row, m their maximum so far, s the sum of exp(x - m).
#include "cross_entropy.h"
#include "few_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// Logits converted to float32 at a time: they stay in the nearest cache.
constexpr int64_t kBlock = 1024;
constexpr float kLowest = -3.402823466e+38f;

// Reads a block; what follows it up to a whole vector takes part in no maximum and adds nothing to a sum.
template <int64_t kDtype>
WKV_INLINE void read_block(float* x, const char* from, int64_t count) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    widen_all<kDtype>(x, from, count, padded);
    for (int64_t i = count; i < padded; ++i) x[i] = -__builtin_inff();
}

WKV_INLINE float largest(const float* x, int64_t count) {
    Vec top = load(x);
    for (int64_t i = kLanes; i < count; i += kLanes) {
        const Vec y = load(x + i);
        top = y > top ? y : top;
    }
    float result = kLowest;
    for (int i = 0; i < kLanes; ++i) result = top[i] > result ? top[i] : result;
    return result;
}

// m and s of a row, in one pass over memory. NaN takes no part in m, and makes s NaN.
template <int64_t kDtype>
void reduce(const char* row, int64_t n, float& m, float& s) {
    float x[kBlock];
    m = kLowest;
    Vec sums{};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t count = n - begin < kBlock ? n - begin : kBlock;
        read_block<kDtype>(x, row + begin * size_of(kDtype), count);
        if (const float top = largest(x, count); top > m) {
            sums *= exp(Vec{} + (m - top));
            m = top;
        }
        Vec block{};
        for (int64_t i = 0; i < count; i += kLanes) block += exp(load(x + i) - m);
        sums += block;
    }
    s = 0.0f;
    for (int i = 0; i < kLanes; ++i) s += sums[i];
}

// Replaces x by exp(x - m) / s, less one at the target, and more by pull m at the first maximum.
template <int64_t kDtype>
void differentiate(char* row, int64_t n, int64_t target, float pull, float m, float s) {
    float x[kBlock];
    const float scale = 1.0f / s;
    bool pulled = pull == 0.0f;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t count = n - begin < kBlock ? n - begin : kBlock;
        char* at = row + begin * size_of(kDtype);
        read_block<kDtype>(x, at, count);
        int64_t top = pulled ? count : 0;
        while (top < count && x[top] != m) ++top;
        for (int64_t i = 0; i < count; i += kLanes) store(x + i, exp(load(x + i) - m) * scale);
        if (target >= begin && target < begin + count) x[target - begin] -= 1.0f;
        if (top < count) {
            x[top] += pull * m;
            pulled = true;
        }
        pack(at, x, kDtype, count);
    }
}

}  // namespace

void cross_entropy_rows(const wkv_cross_entropy_args& args, int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&]<int64_t kDtype>() {
        for (int64_t i = begin; i < end; ++i) {
            char* row = static_cast<char*>(args.logits) + i * args.row * size_of(kDtype);
            float m, s;
            reduce<kDtype>(row, args.n_classes, m, s);
            const float x = widen<kDtype>(row + args.targets[i] * size_of(kDtype), 1)[0];
            args.losses[i] = __builtin_logf(s) - (x - m);
            differentiate<kDtype>(row, args.n_classes, args.targets[i], static_cast<float>(args.pull), m, s);
        }
    });
}

}  // namespace WKV_SIMD
}  // namespace wkv
