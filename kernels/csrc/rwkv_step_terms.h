// Products with the matrices of a layer, and the low-rank terms that adapters add to them: scale * up (down x).
#pragma once

#include "few_rows.h"
#include "rwkv_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The vectors (B, ld) that a matrix is multiplied with, n numbers each and zeros up to padded(n).
struct Input {
    const float* x;
    int64_t ld, n;
};

// The terms of one matrix, and where their inner values are.
struct Terms {
    const wkv_low_rank* first;
    int64_t n;
    const float* inner;
};

WKV_INLINE Terms terms_of(const RwkvStep& step, int64_t layer, int64_t matrix) {
    const rwkv_step_layer& weights = step.args.layers[layer];
    Terms terms{weights.terms, 0, step.inner};
    int64_t i = 0;
    for (; i < weights.n_terms && weights.terms[i].matrix < matrix; ++i)
        terms.first += 1, terms.inner += step.args.B * padded(weights.terms[i].rank);
    for (; i < weights.n_terms && weights.terms[i].matrix == matrix; ++i) terms.n += 1;
    return terms;
}

// What the terms add to `count` rows from `row` on, of vector b.
Vec product(const RwkvStep& step, const Terms& terms, int64_t b, int64_t row, int64_t count) {
    Vec total{};
    const float* inner = terms.inner;
    for (const wkv_low_rank* term = terms.first; term < terms.first + terms.n; ++term) {
        const int64_t rank = term->rank, ld = padded(rank);
        with_dtype(term->up_dtype, [&]<int64_t kDtype>() {
            const int64_t n_bytes = count * rank * size_of(kDtype);
            const char* up = static_cast<const char*>(term->up) + row * rank * size_of(kDtype);
            // The rows that come next, while those of the matrix itself are read.
            for (int64_t at = 0; b == 0 && at < n_bytes; at += 64) __builtin_prefetch(up + n_bytes + at);
            Vec sums[kLanes] = {};
            multiply_block<kDtype, 1>(sums, up, up + n_bytes, count, rank, inner + b * ld, ld);
            total += static_cast<float>(term->scale) * sum_each(sums);
        });
        inner += step.args.B * ld;
    }
    return total;
}

// Rows [begin, end) of w, a matrix of this layer, times each of the B vectors, terms included. Calls use(b, row,
// values, count) as multiply_rows does.
template <int64_t kDtype, class Use>
WKV_INLINE void multiply(const RwkvStep& step, int64_t layer, int64_t matrix, const void* w, const Input& input,
                         int64_t begin, int64_t end, const Use& use) {
    const Terms terms = terms_of(step, layer, matrix);
    const auto add_and_use = [&](int64_t b, int64_t row, float* values, int64_t count) {
        if (terms.n > 0) store(values, load(values) + product(step, terms, b, row, count));
        use(b, row, values, count);
    };
    multiply_rows<kDtype>(w, input.n, begin, end, input.x, input.ld, step.args.B, add_and_use);
}

// The inner values [begin, end) of the terms of the next phase, counted one after the other; input(matrix) is what the
// matrix reads.
template <class Inputs>
WKV_INLINE void inner_values(const RwkvStep& step, RwkvPhase phase, int64_t layer, int64_t begin, int64_t end,
                             const Inputs& input) {
    const rwkv_step_layer& weights = step.args.layers[layer];
    float* inner = step.inner;
    int64_t first = 0;
    for (const wkv_low_rank* term = weights.terms; term < weights.terms + weights.n_terms; ++term) {
        const int64_t rank = term->rank, ld = padded(rank);
        float* to = inner;
        inner += step.args.B * ld;
        if (phase_of(term->matrix) != phase + 1) continue;
        const int64_t from = begin > first ? begin - first : 0, until = end - first < rank ? end - first : rank;
        first += rank;
        if (from >= until) continue;
        const Input x = input(term->matrix);
        // The tail may have values of another layer's.
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            for (int64_t i = row + count; row + count == rank && i < ld; ++i) to[b * ld + i] = 0.0f;
            __builtin_memcpy(to + b * ld + row, values, count * sizeof(float));
        };
        with_dtype(term->down_dtype, [&]<int64_t kDtype>() {
            multiply_rows<kDtype>(term->down, x.n, from, until, x.x, x.ld, step.args.B, write);
        });
    }
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
