// What the recurrences share where they are compiled once: a call is cut into tasks, these run on the threads, and what
// several of them contribute to one gradient is added up in a fixed order.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "thread_pool.h"
#include "wkv_task.h"

namespace wkv {

// Whether cu_seqlens, if given, rises from 0 to the length.
bool valid(const wkv_sizes& sizes);

struct Partition {
    const wkv_sizes& sizes;
    int64_t n_threads;
    // Rows of the tensors, value channels of a task, and tasks of a head.
    int64_t rows, v_width, v_parts;

    // `work` is what one value channel of a token costs, counted in state elements of wkv7 brought up to date.
    Partition(const wkv_sizes& sizes, int64_t work, int64_t widest = INT64_MAX);

    int64_t size() const { return sizes.n_seq * sizes.H * v_parts; }
    int64_t part(int64_t index) const { return index % v_parts; }
    Task task(int64_t index) const;
};

// Calls f(index, task) for every task; f may throw std::bad_alloc.
template <class F>
int run_tasks(const Partition& partition, F&& f) {
    std::atomic<bool> failed{false};
    parallel_for(partition.size(), partition.n_threads, [&](int64_t index) {
        try {
            f(index, partition.task(index));
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return failed ? WKV_NO_MEMORY : WKV_OK;
}

// An entry point of the library: checks cu_seqlens, then runs f(args).
template <class Args, class F>
int run_call(const Args& args, const wkv_sizes& sizes, F&& f) {
    try {
        return valid(sizes) ? f(args) : WKV_BAD_CU_SEQLENS;
    } catch (const std::bad_alloc&) {
        return WKV_NO_MEMORY;
    }
}

// Gradients of tokens that sum over value channels, n_kinds of them, K numbers a token and head each. Where several
// tasks share a head, each writes terms of its own, (row, token, head, kind, padded(K)).
class TokenTerms {
  public:
    TokenTerms(const Partition& partition, int64_t n_kinds);

    // NULL where a task has every value channel and writes the gradients itself.
    float* of(int64_t index, const Task& task);
    // `to` has a NULL for a kind that is not wanted.
    void sum(const wkv_tensor* const* to) const;

  private:
    const Partition& partition;
    const int64_t n_kinds, per_row, part_size;
    std::vector<float> terms;
};

// Gradients that sum over tokens, n_kinds of them, n numbers a head each: every task of a head writes one row
// (kind, padded(n)); parts of a sequence may also share a row.
class SequenceTerms {
  public:
    SequenceTerms(const wkv_sizes& sizes, int64_t rows_of_sequence, int64_t n_kinds, int64_t n);

    float* row(int64_t head, int64_t sequence, int64_t i) {
        return terms.data() + ((head * sizes.n_seq + sequence) * rows_of_sequence + i) * n_kinds * padded(n);
    }
    // Sums over a sequence, and over sequences too where the batch stride is 0.
    void sum(int64_t kind, const wkv_tensor& to);

  private:
    const wkv_sizes& sizes;
    const int64_t rows_of_sequence, n_kinds, n;
    std::vector<float> terms;
};

}  // namespace wkv
