// rwkv7_fused: cuts the tokens into blocks and runs them on the pool, then adds what the blocks summed, in order.
#include "rwkv7_fused.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <span>
#include <vector>

#include "thread_pool.h"

namespace wkv {
namespace {

// Tokens of a block, unless that makes more than kMaxBlocks.
constexpr int64_t kBlock = 32, kMaxBlocks = 64;
// A thread with fewer values to compute than this, over all its tokens, is not worth waking up.
constexpr int64_t kMinimumWork = 1 << 14;

template <class Args>
using Kernel = void (*)(const Args&, Rwkv7Block);

struct Kernels {
    Kernel<rwkv7_shift_mix_args> shift_mix;
    Kernel<rwkv7_shift_mix_backward_args> shift_mix_backward;
    Kernel<rwkv7_key_stage_args> key_stage;
    Kernel<rwkv7_key_stage_backward_args> key_stage_backward;
    Kernel<rwkv7_value_residual_args> value_residual;
    Kernel<rwkv7_value_residual_backward_args> value_residual_backward;
    Kernel<rwkv7_out_stage_args> out_stage;
    Kernel<rwkv7_out_stage_backward_args> out_stage_backward;
    Kernel<rwkv7_relu_squared_args> relu_squared;
    Kernel<rwkv7_relu_squared_backward_args> relu_squared_backward;
    void (*write_sum)(const rwkv7_sizes&, const wkv_vector&, float*, int64_t, int64_t);
};

const Kernels& kernels() {
#define WKV_ROW(isa)                                                   \
    {                                                                  \
        isa::rwkv7_shift_mix,      isa::rwkv7_shift_mix_backward,      \
        isa::rwkv7_key_stage,      isa::rwkv7_key_stage_backward,      \
        isa::rwkv7_value_residual, isa::rwkv7_value_residual_backward, \
        isa::rwkv7_out_stage,      isa::rwkv7_out_stage_backward,      \
        isa::rwkv7_relu_squared,   isa::rwkv7_relu_squared_backward,   \
        isa::rwkv7_write_sum},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

// Runs `kernel` on every block and writes the sums over tokens.
template <class Args>
int run(const Args& args, const rwkv7_sizes& sizes, Kernel<Args> kernel, std::span<const wkv_vector> sums = {}) try {
    const int64_t n_tokens = sizes.B * sizes.T;
    const int64_t length = std::max(kBlock, (n_tokens + kMaxBlocks - 1) / kMaxBlocks);
    const int64_t n_blocks = (n_tokens + length - 1) / length;
    const int64_t n_threads = std::min(sizes.n_threads, n_tokens * sizes.H * sizes.N / kMinimumWork);
    const int64_t sum_size = rwkv7_sum_size(sizes), part_size = sum_size * static_cast<int64_t>(sums.size());
    std::vector<float> parts(std::max<int64_t>(1, n_blocks) * part_size);

    std::atomic<bool> failed{false};
    parallel_for(n_blocks, std::max<int64_t>(1, n_threads), [&](int64_t i) {
        try {
            float* memory = scratch(rwkv7_scratch(sizes));
            kernel(args, {i * length, std::min(n_tokens, (i + 1) * length), memory, parts.data() + i * part_size});
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    if (failed) return WKV_NO_MEMORY;
    for (size_t i = 0; i < sums.size(); ++i)
        kernels().write_sum(sizes, sums[i], parts.data() + i * sum_size, n_blocks, part_size);
    return WKV_OK;
} catch (const std::bad_alloc&) {
    return WKV_NO_MEMORY;
}

}  // namespace
}  // namespace wkv

using wkv::kernels;
using wkv::run;

int rwkv7_shift_mix(const rwkv7_shift_mix_args* args) {
    return run(*args, args->sizes, kernels().shift_mix);
}

int rwkv7_shift_mix_backward(const rwkv7_shift_mix_backward_args* args) {
    const std::span sums(args->grad_mixes, args->of.n_mixes);
    return run(*args, args->of.sizes, kernels().shift_mix_backward, sums);
}

int rwkv7_key_stage(const rwkv7_key_stage_args* args) {
    return run(*args, args->sizes, kernels().key_stage);
}

int rwkv7_key_stage_backward(const rwkv7_key_stage_backward_args* args) {
    const wkv_vector sums[] = {args->grad_k_k, args->grad_k_a};
    return run(*args, args->of.sizes, kernels().key_stage_backward, sums);
}

int rwkv7_value_residual(const rwkv7_value_residual_args* args) {
    return run(*args, args->sizes, kernels().value_residual);
}

int rwkv7_value_residual_backward(const rwkv7_value_residual_backward_args* args) {
    return run(*args, args->of.sizes, kernels().value_residual_backward);
}

int rwkv7_out_stage(const rwkv7_out_stage_args* args) {
    return run(*args, args->sizes, kernels().out_stage);
}

int rwkv7_out_stage_backward(const rwkv7_out_stage_backward_args* args) {
    const wkv_vector sums[] = {args->grad_r_k, args->grad_weight, args->grad_bias};
    return run(*args, args->of.sizes, kernels().out_stage_backward, sums);
}

int rwkv7_relu_squared(const rwkv7_relu_squared_args* args) {
    return run(*args, args->sizes, kernels().relu_squared);
}

int rwkv7_relu_squared_backward(const rwkv7_relu_squared_backward_args* args) {
    return run(*args, args->of.sizes, kernels().relu_squared_backward);
}
