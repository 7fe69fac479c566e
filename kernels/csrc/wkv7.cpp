// wkv7: runs the tasks of a call.
#include "wkv7.h"

#include "wkv_tasks.h"

namespace wkv {
namespace {

struct Kernels {
    void (*forward)(const wkv7_forward_args&, const Task&, float*);
    void (*backward)(const wkv7_backward_args&, const Task&, float*, float*);
};

const Kernels& kernels() {
#define WKV_ROW(isa) {isa::wkv7_forward, isa::wkv7_backward},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

int run_forward(const wkv7_forward_args& args) {
    const wkv_sizes& sizes = args.in.sizes;
    const Partition partition(sizes, sizes.K);
    return run_tasks(partition, [&](int64_t, const Task& task) {
        kernels().forward(args, task, scratch(wkv7_forward_scratch(sizes.K, partition.v_width)));
    });
}

int run_backward(const wkv7_backward_args& args) {
    const wkv_sizes& sizes = args.in.sizes;
    const Partition partition(sizes, sizes.K);
    TokenTerms terms(partition, kSummed);
    const int status = run_tasks(partition, [&](int64_t index, const Task& task) {
        float* memory = scratch(wkv7_backward_scratch(task.length, sizes.K, partition.v_width));
        kernels().backward(args, task, memory, terms.of(index, task));
    });
    const wkv_tensor* const to[] = {&args.grad_r, &args.grad_log_w, &args.grad_k, &args.grad_a, &args.grad_b};
    if (status == WKV_OK) terms.sum(to);
    return status;
}

}  // namespace
}  // namespace wkv

int wkv7_forward(const wkv7_forward_args* args) {
    return wkv::run_call(*args, args->in.sizes, wkv::run_forward);
}

int wkv7_backward(const wkv7_backward_args* args) {
    return wkv::run_call(*args, args->in.sizes, wkv::run_backward);
}
