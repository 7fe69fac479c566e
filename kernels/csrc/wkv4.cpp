// wkv4: runs the tasks of a call.
#include "wkv4.h"

#include "wkv_tasks.h"

namespace wkv {
namespace {

// A channel's token costs two exponentials and a division.
constexpr int64_t kWork = 16;

struct Kernels {
    void (*forward)(const wkv4_forward_args&, const Task&, float*);
    void (*backward)(const wkv4_backward_args&, const Task&, float*, float*, int64_t);
};

const Kernels& kernels() {
#define WKV_ROW(isa) {isa::wkv4_forward, isa::wkv4_backward},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

int run_forward(const wkv4_forward_args& args) {
    const Partition partition(args.in.sizes, kWork, kWkv4Widest);
    return run_tasks(partition, [&](int64_t, const Task& task) {
        kernels().forward(args, task, scratch(wkv4_forward_scratch(partition.v_width)));
    });
}

int run_backward(const wkv4_backward_args& args) {
    const wkv_sizes& sizes = args.in.sizes;
    const Partition partition(sizes, kWork, kWkv4Widest);
    SequenceTerms shared(sizes, 1, kWkv4Shared, sizes.V);
    const int status = run_tasks(partition, [&](int64_t, const Task& task) {
        float* memory = scratch(wkv4_backward_scratch(task.length, partition.v_width));
        kernels().backward(args, task, memory, shared.row(0, task.state_row, 0) + task.v_begin, padded(sizes.V));
    });
    if (status != WKV_OK) return status;
    shared.sum(0, args.grad_u);
    if (args.grad_log_w.token == 0) shared.sum(1, args.grad_log_w);
    return WKV_OK;
}

}  // namespace
}  // namespace wkv

int wkv4_forward(const wkv4_forward_args* args) {
    return wkv::run_call(*args, args->in.sizes, wkv::run_forward);
}

int wkv4_backward(const wkv4_backward_args* args) {
    return wkv::run_call(*args, args->in.sizes, wkv::run_backward);
}
