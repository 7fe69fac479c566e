// What the recurrences share on both sides: the task that wkv_tasks.cpp cuts out of a call and a *_simd.cpp does.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"

namespace wkv {

// Part of one head of one sequence: the value channels [v_begin, v_end), whose state columns depend on no others.
struct Task {
    int64_t batch, head;
    int64_t first_token, length;
    int64_t state_row;
    int64_t v_begin, v_end;
};

// Tokens that wkv6 and wkv7 convert to float32 at a time, and between two stored states of their backward passes.
constexpr int64_t kSegment = 8;

// Rows of a state (V, K) that go through a segment together in a backward pass, so that what they were before each
// token stays in the nearest cache. Divides 16.
constexpr int64_t kRows = 8;

// Sizes in scratch memory are multiples of the longest vector of any instruction set.
static constexpr int64_t padded(int64_t n) {
    return (n + 15) / 16 * 16;
}

static constexpr int64_t n_segments(int64_t length) {
    return (length + kSegment - 1) / kSegment;
}

#define WKV_DECLARE(isa)                                                                                     \
    namespace isa {                                                                                          \
    /* Adds n_rows rows of n numbers, `stride` floats apart, in their order and writes them to one token and \
     * head. */                                                                                              \
    void sum_rows(const float* rows, int64_t n_rows, int64_t stride, const wkv_tensor& to, int64_t batch,    \
                  int64_t token, int64_t head, int64_t n);                                                   \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
