// What the two halves of wkv7 share: wkv7.cpp runs the tasks, wkv7_*_simd.cpp do one.
#pragma once

#include "wkv_task.h"

namespace wkv {

// Gradients with respect to r, log_w, k, a and b sum over the value channels; their terms stand in this order.
constexpr int kSummed = 5;

static constexpr int64_t wkv7_forward_scratch(int64_t K, int64_t n_v) {
    return (5 * kSegment + 1) * padded(K) + (2 * kSegment + 1 + K) * padded(n_v);
}

static constexpr int64_t wkv7_backward_scratch(int64_t length, int64_t K, int64_t n_v) {
    const int64_t state = padded(K) * padded(n_v);
    return (5 * kSegment + 1 + kSummed * kSegment) * padded(K) + (4 * kSegment + length) * padded(n_v) +
           (n_segments(length) + 2) * state + kRows * (kSegment + 1) * padded(K);
}

#define WKV_DECLARE(isa)                                                                                \
    namespace isa {                                                                                     \
    void wkv7_forward(const wkv7_forward_args& args, const Task& task, float* scratch);                 \
    /* terms: NULL when the task has every value channel. */                                            \
    void wkv7_backward(const wkv7_backward_args& args, const Task& task, float* scratch, float* terms); \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
