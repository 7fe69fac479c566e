// Tasks of a recurrence (sequence, head, range of value channels), and the sums over them.
#include "wkv_tasks.h"

#include <algorithm>

namespace wkv {
namespace {

// A task that costs less than so many elements of a state brought up to date is not worth another thread.
constexpr int64_t kMinimumWork = 1 << 18;

using SumRows = void (*)(const float*, int64_t, int64_t, const wkv_tensor&, int64_t, int64_t, int64_t, int64_t);

SumRows sum_rows() {
#define WKV_ROW(isa) isa::sum_rows,
    static constexpr SumRows table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

int64_t cu_seqlen(const wkv_sizes& sizes, int64_t i) {
    return sizes.cu_seqlens_is_int64 ? static_cast<const int64_t*>(sizes.cu_seqlens)[i]
                                     : static_cast<const int32_t*>(sizes.cu_seqlens)[i];
}

}  // namespace

bool valid(const wkv_sizes& sizes) {
    if (sizes.cu_seqlens == nullptr) return true;
    if (cu_seqlen(sizes, 0) != 0 || cu_seqlen(sizes, sizes.n_seq) != sizes.length) return false;
    for (int64_t i = 0; i < sizes.n_seq; ++i)
        if (cu_seqlen(sizes, i) > cu_seqlen(sizes, i + 1)) return false;
    return true;
}

Partition::Partition(const wkv_sizes& sizes, int64_t work, int64_t widest)
    : sizes(sizes), rows(sizes.cu_seqlens ? 1 : sizes.n_seq) {
    const int64_t all = rows * sizes.length * sizes.H * sizes.V * work;
    n_threads = std::max<int64_t>(1, std::min(sizes.n_threads, all / kMinimumWork));
    const int64_t heads = std::max<int64_t>(1, sizes.n_seq * sizes.H);
    const int64_t wanted = (n_threads + heads - 1) / heads;
    v_width = std::min(widest, std::max<int64_t>(16, padded((sizes.V + wanted - 1) / wanted)));
    v_parts = std::max<int64_t>(1, (sizes.V + v_width - 1) / v_width);
}

Task Partition::task(int64_t index) const {
    Task task;
    task.head = index / v_parts % sizes.H;
    task.state_row = index / v_parts / sizes.H;
    task.v_begin = part(index) * v_width;
    task.v_end = std::min(sizes.V, task.v_begin + v_width);
    task.batch = sizes.cu_seqlens ? 0 : task.state_row;
    task.first_token = sizes.cu_seqlens ? cu_seqlen(sizes, task.state_row) : 0;
    task.length = sizes.cu_seqlens ? cu_seqlen(sizes, task.state_row + 1) - task.first_token : sizes.length;
    return task;
}

TokenTerms::TokenTerms(const Partition& partition, int64_t n_kinds)
    : partition(partition),
      n_kinds(n_kinds),
      per_row(partition.sizes.length * partition.sizes.H * n_kinds * padded(partition.sizes.K)),
      part_size(partition.rows * per_row) {
    if (partition.v_parts > 1) terms.resize(partition.v_parts * part_size);
}

float* TokenTerms::of(int64_t index, const Task& task) {
    return terms.empty() ? nullptr : terms.data() + partition.part(index) * part_size + task.batch * per_row;
}

void TokenTerms::sum(const wkv_tensor* const* to) const {
    if (terms.empty()) return;
    const wkv_sizes& sizes = partition.sizes;
    const auto sum = sum_rows();
    parallel_for(partition.rows * sizes.length, partition.n_threads, [&](int64_t index) {
        const float* from = terms.data() + index * sizes.H * n_kinds * padded(sizes.K);
        for (int64_t head = 0; head < sizes.H; ++head)
            for (int64_t kind = 0; kind < n_kinds; ++kind, from += padded(sizes.K))
                if (to[kind] != nullptr)
                    sum(from, partition.v_parts, part_size, *to[kind], index / sizes.length, index % sizes.length, head,
                        sizes.K);
    });
}

SequenceTerms::SequenceTerms(const wkv_sizes& sizes, int64_t rows_of_sequence, int64_t n_kinds, int64_t n)
    : sizes(sizes),
      rows_of_sequence(rows_of_sequence),
      n_kinds(n_kinds),
      n(n),
      terms(sizes.H * sizes.n_seq * rows_of_sequence * n_kinds * padded(n)) {}

void SequenceTerms::sum(int64_t kind, const wkv_tensor& to) {
    const int64_t n_rows = to.batch == 0 ? sizes.n_seq * rows_of_sequence : rows_of_sequence;
    const int64_t n_sums = to.batch == 0 ? 1 : sizes.n_seq;
    for (int64_t head = 0; head < sizes.H; ++head)
        for (int64_t i = 0; i < n_sums; ++i)
            sum_rows()(row(head, i, 0) + kind * padded(n), n_rows, n_kinds * padded(n), to, i, 0, head, n);
}

}  // namespace wkv
