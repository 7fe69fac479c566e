// What the two halves of wkv4 share: wkv4.cpp runs the tasks, wkv4_*_simd.cpp do one.
#pragma once

#include "wkv_task.h"

namespace wkv {

// Tokens that are converted to float32 at a time, and between two stored states of the backward pass.
constexpr int64_t kBlock = 16;

// Channels of a task at most: their rows stay in the nearest cache.
constexpr int64_t kWkv4Widest = 64;

// Gradients of u and of a decay that all tokens share sum over tokens.
constexpr int kWkv4Shared = 2;

// Numbers of a channel's state in scratch memory.
constexpr int kWkv4State = 4;

static constexpr int64_t wkv4_forward_scratch(int64_t width) {
    return (4 * kBlock + 1 + kWkv4State) * padded(width);
}

static constexpr int64_t wkv4_backward_scratch(int64_t length, int64_t width) {
    const int64_t n_blocks = (length + kBlock - 1) / kBlock;
    return (5 * kBlock + 1 + kWkv4Shared + (n_blocks + 2) * kWkv4State) * padded(width);
}

#define WKV_DECLARE(isa)                                                                                \
    namespace isa {                                                                                     \
    void wkv4_forward(const wkv4_forward_args& args, const Task& task, float* scratch);                 \
    /* shared: rows of kWkv4Shared sums, n_shared apart, for the channels of the task. */               \
    void wkv4_backward(const wkv4_backward_args& args, const Task& task, float* scratch, float* shared, \
                       int64_t n_shared);                                                               \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
