// wkv6: runs the tasks of a call.
#include "wkv6.h"

#include "wkv_tasks.h"

namespace wkv {
namespace {

struct Kernels {
    void (*forward)(const wkv6_forward_args&, const Task&, float*);
    void (*backward)(const wkv6_backward_args&, const Task&, float*, float*, float*);
};

const Kernels& kernels() {
#define WKV_ROW(isa) {isa::wkv6_forward, isa::wkv6_backward},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

int run_forward(const wkv6_forward_args& args) {
    const wkv_sizes& sizes = args.in.sizes;
    const Partition partition(sizes, sizes.K);
    return run_tasks(partition, [&](int64_t, const Task& task) {
        kernels().forward(args, task, scratch(wkv6_forward_scratch(sizes.K, partition.v_width)));
    });
}

int run_backward(const wkv6_backward_args& args) {
    const wkv_sizes& sizes = args.in.sizes;
    const Partition partition(sizes, sizes.K);
    TokenTerms terms(partition, kWkv6Summed);
    SequenceTerms shared(sizes, partition.v_parts, kWkv6Shared, sizes.K);
    const int status = run_tasks(partition, [&](int64_t index, const Task& task) {
        float* memory = scratch(wkv6_backward_scratch(task.length, sizes.K, partition.v_width));
        kernels().backward(args, task, memory, terms.of(index, task),
                           shared.row(task.head, task.state_row, partition.part(index)));
    });
    if (status != WKV_OK) return status;
    const bool shared_decay = args.grad_log_w.token == 0;
    const wkv_tensor* const to[] = {&args.grad_r, &args.grad_k, shared_decay ? nullptr : &args.grad_log_w};
    terms.sum(to);
    shared.sum(0, args.grad_u);
    if (shared_decay) shared.sum(1, args.grad_log_w);
    return WKV_OK;
}

}  // namespace
}  // namespace wkv

int wkv6_forward(const wkv6_forward_args* args) {
    return wkv::run_call(*args, args->in.sizes, wkv::run_forward);
}

int wkv6_backward(const wkv6_backward_args* args) {
    return wkv::run_call(*args, args->in.sizes, wkv::run_backward);
}
