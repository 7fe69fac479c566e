// What the two halves of wkv6 share: wkv6.cpp runs the tasks, wkv6_*_simd.cpp do one.
#pragma once

#include "wkv_task.h"

namespace wkv {

// Gradients with respect to r, k and log_w sum over the value channels; their terms stand in this order.
constexpr int kWkv6Summed = 3;
// Those of u and of a decay that all tokens share sum over tokens as well.
constexpr int kWkv6Shared = 2;

static constexpr int64_t wkv6_inputs_scratch(int64_t K, int64_t n_v) {
    return (3 * kSegment + 1) * padded(K) + kSegment * padded(n_v) + padded(kSegment);
}

static constexpr int64_t wkv6_forward_scratch(int64_t K, int64_t n_v) {
    return wkv6_inputs_scratch(K, n_v) + (kSegment + K) * padded(n_v);
}

static constexpr int64_t wkv6_backward_scratch(int64_t length, int64_t K, int64_t n_v) {
    return wkv6_inputs_scratch(K, n_v) + (kWkv6Summed * kSegment + 2 * kWkv6Shared) * padded(K) +
           kSegment * padded(n_v) + kRows * 16 + (n_segments(length) + 2) * padded(K) * padded(n_v) +
           kSegment * kRows * padded(K);
}

#define WKV_DECLARE(isa)                                                                                               \
    namespace isa {                                                                                                    \
    void wkv6_forward(const wkv6_forward_args& args, const Task& task, float* scratch);                                \
    /* terms: NULL when the task has every value channel. shared: the task's row of SequenceTerms. */                  \
    void wkv6_backward(const wkv6_backward_args& args, const Task& task, float* scratch, float* terms, float* shared); \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
