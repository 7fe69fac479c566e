// What the parts of rwkv7_fused share: rwkv7_fused.cpp cuts the tokens into blocks, the *_simd.cpp do one block.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"

namespace wkv {

// A block works on so many channels of a token at a time, or on one head where that is longer, in float32 and padded to
// the longest vector of any instruction set.
constexpr int64_t kChunk = 512;
constexpr int64_t kBuffers = 18;

static constexpr int64_t padded_channels(int64_t n) {
    return (n + 15) / 16 * 16;
}

// Floats of scratch memory that a block needs.
static constexpr int64_t rwkv7_scratch(const rwkv7_sizes& sizes) {
    return kBuffers * (padded_channels(sizes.N) > kChunk ? padded_channels(sizes.N) : kChunk);
}

// Floats of one sum over tokens: every head is padded.
static constexpr int64_t rwkv7_sum_size(const rwkv7_sizes& sizes) {
    return sizes.H * padded_channels(sizes.N);
}

// The tokens [begin, end) of the B T that there are, whole rows one after the other. Sums over tokens are added to
// `sums`, rwkv7_sum_size floats for each parameter.
struct Rwkv7Block {
    int64_t begin, end;
    float* scratch;
    float* sums;
};

#define WKV_DECLARE(isa)                                                                                  \
    namespace isa {                                                                                       \
    void rwkv7_shift_mix(const rwkv7_shift_mix_args& args, Rwkv7Block block);                             \
    void rwkv7_shift_mix_backward(const rwkv7_shift_mix_backward_args& args, Rwkv7Block block);           \
    void rwkv7_key_stage(const rwkv7_key_stage_args& args, Rwkv7Block block);                             \
    void rwkv7_key_stage_backward(const rwkv7_key_stage_backward_args& args, Rwkv7Block block);           \
    void rwkv7_value_residual(const rwkv7_value_residual_args& args, Rwkv7Block block);                   \
    void rwkv7_value_residual_backward(const rwkv7_value_residual_backward_args& args, Rwkv7Block block); \
    void rwkv7_out_stage(const rwkv7_out_stage_args& args, Rwkv7Block block);                             \
    void rwkv7_out_stage_backward(const rwkv7_out_stage_backward_args& args, Rwkv7Block block);           \
    void rwkv7_relu_squared(const rwkv7_relu_squared_args& args, Rwkv7Block block);                       \
    void rwkv7_relu_squared_backward(const rwkv7_relu_squared_backward_args& args, Rwkv7Block block);     \
    /* Writes the sum of n_parts parts, part_size floats apart; the first of them is overwritten. */      \
    void rwkv7_write_sum(const rwkv7_sizes& sizes, const wkv_vector& to, float* parts, int64_t n_parts,   \
                         int64_t part_size);                                                              \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
