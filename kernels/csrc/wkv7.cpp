// wkv7: cuts a call into tasks (sequence, head, range of value channels) and runs them on the pool.
#include "wkv7.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "thread_pool.h"

namespace wkv {
namespace {

// A task shorter than this many state elements updated is not worth another thread.
constexpr int64_t kMinimumWork = 1 << 18;

struct Kernels {
    void (*forward)(const wkv7_forward_args&, const Wkv7Task&, float*);
    void (*backward)(const wkv7_backward_args&, const Wkv7Task&, float*, float*);
    void (*sum_parts)(const wkv7_backward_args&, int64_t, int64_t, int64_t, float*, int64_t, int64_t);
};

const Kernels& kernels() {
#define WKV_ROW(isa) {isa::wkv7_forward, isa::wkv7_backward, isa::wkv7_sum_parts},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

int64_t cu_seqlen(const wkv7_inputs& in, int64_t i) {
    return in.cu_seqlens_is_int64 ? static_cast<const int64_t*>(in.cu_seqlens)[i]
                                  : static_cast<const int32_t*>(in.cu_seqlens)[i];
}

bool valid(const wkv7_inputs& in) {
    if (in.cu_seqlens == nullptr) return true;
    if (cu_seqlen(in, 0) != 0 || cu_seqlen(in, in.n_seq) != in.length) return false;
    for (int64_t i = 0; i < in.n_seq; ++i)
        if (cu_seqlen(in, i) > cu_seqlen(in, i + 1)) return false;
    return true;
}

struct Partition {
    const wkv7_inputs& in;
    int64_t n_threads;
    // Value channels of a task, and tasks of a head.
    int64_t v_width, v_parts;

    explicit Partition(const wkv7_inputs& in) : in(in) {
        const int64_t rows = in.cu_seqlens ? 1 : in.n_seq;
        const int64_t work = rows * in.length * in.H * in.K * in.V;
        n_threads = std::max<int64_t>(1, std::min(in.n_threads, work / kMinimumWork));
        const int64_t heads = std::max<int64_t>(1, in.n_seq * in.H);
        const int64_t wanted = (n_threads + heads - 1) / heads;
        v_width = std::max<int64_t>(16, padded((in.V + wanted - 1) / wanted));
        v_parts = std::max<int64_t>(1, (in.V + v_width - 1) / v_width);
    }

    int64_t size() const { return in.n_seq * in.H * v_parts; }

    Wkv7Task task(int64_t index) const {
        Wkv7Task task;
        const int64_t part = index % v_parts;
        task.head = index / v_parts % in.H;
        task.state_row = index / v_parts / in.H;
        task.v_begin = part * v_width;
        task.v_end = std::min(in.V, task.v_begin + v_width);
        task.batch = in.cu_seqlens ? 0 : task.state_row;
        task.first_token = in.cu_seqlens ? cu_seqlen(in, task.state_row) : 0;
        task.length = in.cu_seqlens ? cu_seqlen(in, task.state_row + 1) - task.first_token : in.length;
        return task;
    }
};

int run_forward(const wkv7_forward_args& args) {
    const Partition partition(args.in);
    std::atomic<bool> failed{false};
    parallel_for(partition.size(), partition.n_threads, [&](int64_t index) {
        try {
            const Wkv7Task task = partition.task(index);
            kernels().forward(args, task, scratch(wkv7_forward_scratch(args.in.K, partition.v_width)));
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return failed ? WKV_NO_MEMORY : WKV_OK;
}

int run_backward(const wkv7_backward_args& args) {
    const wkv7_inputs& in = args.in;
    const Partition partition(in);
    const int64_t rows = in.cu_seqlens ? 1 : in.n_seq;
    const int64_t per_head = kSummed * padded(in.K), per_row = in.length * in.H * per_head, part_size = rows * per_row;
    std::vector<float> parts;
    if (partition.v_parts > 1) parts.resize(partition.v_parts * part_size);

    std::atomic<bool> failed{false};
    parallel_for(partition.size(), partition.n_threads, [&](int64_t index) {
        try {
            const Wkv7Task task = partition.task(index);
            float* memory = scratch(wkv7_backward_scratch(task.length, in.K, partition.v_width));
            float* partial = nullptr;
            if (!parts.empty()) partial = parts.data() + index % partition.v_parts * part_size + task.batch * per_row;
            kernels().backward(args, task, memory, partial);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    if (failed) return WKV_NO_MEMORY;
    if (!parts.empty()) {
        parallel_for(rows * in.length, partition.n_threads, [&](int64_t index) {
            for (int64_t head = 0; head < in.H; ++head)
                kernels().sum_parts(args, index / in.length, index % in.length, head,
                                    parts.data() + (index * in.H + head) * per_head, partition.v_parts, part_size);
        });
    }
    return WKV_OK;
}

}  // namespace
}  // namespace wkv

int wkv7_forward(const wkv7_forward_args* args) {
    return wkv::valid(args->in) ? wkv::run_forward(*args) : WKV_BAD_CU_SEQLENS;
}

int wkv7_backward(const wkv7_backward_args* args) try {
    return wkv::valid(args->in) ? wkv::run_backward(*args) : WKV_BAD_CU_SEQLENS;
} catch (const std::bad_alloc&) {
    return WKV_NO_MEMORY;
}
