// What the two halves of wkv7 share: wkv7.cpp cuts the work into tasks, wkv7_simd.cpp does one task.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"

namespace wkv {

// Part of one head of one sequence: the value channels [v_begin, v_end), whose state columns depend on no others.
struct Wkv7Task {
    int64_t batch, head;
    int64_t first_token, length;
    int64_t state_row;
    int64_t v_begin, v_end;
};

// Tokens between two stored states in the backward pass, and tokens converted to float32 at a time.
constexpr int64_t kSegment = 8;

// Rows of a state (V, K) that go through a segment together in the backward pass, so that what they were before each
// token stays in the nearest cache. Divides 16.
constexpr int64_t kRows = 8;

// Sizes in scratch memory are multiples of the longest vector of any instruction set.
static constexpr int64_t padded(int64_t n) {
    return (n + 15) / 16 * 16;
}

static constexpr int64_t n_segments(int64_t length) {
    return (length + kSegment - 1) / kSegment;
}

// Gradients with respect to r, log_w, k, a and b sum over the value channels. A task that has only some of them writes
// its terms here, (token, head, 5, padded(K)), in this order.
constexpr int kSummed = 5;

static constexpr int64_t wkv7_forward_scratch(int64_t K, int64_t n_v) {
    return (5 * kSegment + 1) * padded(K) + (2 * kSegment + 1 + K) * padded(n_v);
}

static constexpr int64_t wkv7_backward_scratch(int64_t length, int64_t K, int64_t n_v) {
    const int64_t state = padded(K) * padded(n_v);
    return (5 * kSegment + 1 + kSummed * kSegment) * padded(K) + (4 * kSegment + length) * padded(n_v) +
           (n_segments(length) + 2) * state + kRows * (kSegment + 1) * padded(K);
}

#define WKV_DECLARE(isa)                                                                                           \
    namespace isa {                                                                                                \
    void wkv7_forward(const wkv7_forward_args& args, const Wkv7Task& task, float* scratch);                        \
    /* partial: NULL when the task has every value channel. */                                                     \
    void wkv7_backward(const wkv7_backward_args& args, const Wkv7Task& task, float* scratch, float* partial);      \
    /* Adds the terms of n_parts tasks, part_size floats apart, and writes the gradients of one token and head. */ \
    void wkv7_sum_parts(const wkv7_backward_args& args, int64_t batch, int64_t token, int64_t head, float* parts,  \
                        int64_t n_parts, int64_t part_size);                                                       \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
