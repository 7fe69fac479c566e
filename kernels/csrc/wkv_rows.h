// What the recurrences share in the sources that are compiled once per instruction set: scratch memory, reading and
// writing rows and states.
//
// Letters: S state; ld distance between rows; Kp and Vp the padded numbers of key and value channels.
#pragma once

#include "vec.h"
#include "wkv_task.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

float* take(float*& scratch, int64_t n) {
    float* taken = scratch;
    scratch += n;
    return taken;
}

void fill_zero(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}

void copy_rows(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t n_rows, int64_t n) {
    for (int64_t i = 0; i < n_rows; ++i) __builtin_memcpy(to + i * ld_to, from + i * ld_from, n * sizeof(float));
}

// The sum of all lanes.
WKV_INLINE float sum_lanes(Vec x) {
    for (int n = 1; n < kLanes; n *= 2) x = add_pairs(x, x);
    return x[0];
}

WKV_INLINE char* address(const wkv_tensor& x, int64_t batch, int64_t token, int64_t head, int64_t channel) {
    const int64_t size = x.dtype == WKV_FLOAT32 ? 4 : 2;
    return static_cast<char*>(x.data) + size * (batch * x.batch + token * x.token + head * x.head + channel);
}

WKV_INLINE float* address(const wkv_state& x, const Task& task) {
    return x.data + task.state_row * x.batch + task.head * x.head + task.v_begin;
}

// Token t of the task, n channels from `channel` on, zeros up to padded(n).
WKV_INLINE void read_row(float* to, const wkv_tensor& x, const Task& task, int64_t t, int64_t channel, int64_t n) {
    unpack(to, address(x, task.batch, task.first_token + t, task.head, channel), x.dtype, n, padded(n));
}

// Tokens [begin, end), their rows padded(n) apart.
WKV_INLINE void read_rows(float* to, const wkv_tensor& x, const Task& task, int64_t begin, int64_t end, int64_t channel,
                          int64_t n) {
    for (int64_t t = begin; t < end; ++t) read_row(to + (t - begin) * padded(n), x, task, t, channel, n);
}

WKV_INLINE void write_row(const wkv_tensor& x, const float* from, const Task& task, int64_t t, int64_t channel,
                          int64_t n) {
    pack(address(x, task.batch, task.first_token + t, task.head, channel), from, x.dtype, n);
}

// Gradients of token t that sum over value channels go to their tensors or, if there are terms (TokenTerms), there.
// `from` has the rows of each kind; NULL in `to` or `from`: not one of this call.
template <int kKinds>
void write_summed(const wkv_tensor* const (&to)[kKinds], float* const (&from)[kKinds], float* terms,
                  const wkv_sizes& sizes, const Task& task, int64_t t, int64_t row) {
    const int64_t K = sizes.K, Kp = padded(K);
    for (int kind = 0; kind < kKinds; ++kind) {
        if (to[kind] == nullptr) continue;
        if (terms == nullptr)
            write_row(*to[kind], from[kind] + row * Kp, task, t, 0, K);
        else
            __builtin_memcpy(terms + (((task.first_token + t) * sizes.H + task.head) * kKinds + kind) * Kp,
                             from[kind] + row * Kp, Kp * sizeof(float));
    }
}

// Sums over many tokens, kept with what rounding lost of them.
struct LongSum {
    float *sum, *lost;
    int64_t n;

    LongSum() = default;
    LongSum(float* sum, float* lost, int64_t n) : sum(sum), lost(lost), n(n) {
        fill_zero(sum, n);
        fill_zero(lost, n);
    }
    WKV_INLINE void add(int64_t j, Vec x) {
        const Vec before = load(sum + j), y = x + load(lost + j), after = before + y;
        store(sum + j, after);
        store(lost + j, y - (after - before));
    }
    void add(const float* x) {
        for (int64_t j = 0; j < n; j += kLanes) add(j, load(x + j));
    }
};

// to (columns, ld_to) = from (rows, ld_from) transposed; both have room up to padded sizes, rows past the end read as
// zero.
inline void flip(float* to, int64_t ld_to, float* from, int64_t ld_from, int64_t rows, int64_t columns) {
    for (int64_t i = rows; i < padded(rows); ++i) fill_zero(from + i * ld_from, columns);
    for (int64_t i = 0; i < padded(rows); i += kLanes)
        for (int64_t j = 0; j < columns; j += kLanes)
            transpose(to + j * ld_to + i, ld_to, from + i * ld_from + j, ld_from);
}

// to (K, Vp) from a caller's (K, V); zeros where there is none.
inline void read_state(float* to, const wkv_state& from, const wkv_sizes& sizes, const Task& task) {
    const int64_t n_v = task.v_end - task.v_begin;
    fill_zero(to, sizes.K * padded(n_v));
    if (from.data != nullptr) copy_rows(to, padded(n_v), address(from, task), sizes.V, sizes.K, n_v);
}

// to (Vp, Kp) from a caller's (K, V); `buffer` is as large.
inline void read_flipped(float* to, float* buffer, const wkv_state& from, const wkv_sizes& sizes, const Task& task) {
    const int64_t Vp = padded(task.v_end - task.v_begin);
    read_state(buffer, from, sizes, task);
    flip(to, padded(sizes.K), buffer, Vp, sizes.K, Vp);
}

inline void write_flipped(const wkv_state& to, float* buffer, float* from, const wkv_sizes& sizes, const Task& task) {
    const int64_t n_v = task.v_end - task.v_begin, Kp = padded(sizes.K);
    flip(buffer, padded(n_v), from, Kp, padded(n_v), Kp);
    copy_rows(address(to, task), sizes.V, buffer, padded(n_v), sizes.K, n_v);
}

// Where the state (K, width) of a forward pass lives: in the caller's memory where whole vectors fit its rows. The
// first step reads it from `from`.
struct Place {
    const wkv_sizes& sizes;
    const Task& task;
    float* final_state;
    bool in_place;
    int64_t width, ld;
    float* S;
    const float* from;

    // Takes K padded(n_v) floats.
    Place(const wkv_state& initial, const wkv_state& final, const wkv_sizes& sizes, const Task& task, float*& scratch)
        : sizes(sizes), task(task), final_state(address(final, task)) {
        const int64_t n_v = task.v_end - task.v_begin, Vp = padded(n_v);
        in_place = n_v % kLanes == 0 && task.length > 0;
        width = in_place ? n_v : Vp;
        ld = in_place ? sizes.V : Vp;
        S = in_place ? final_state : take(scratch, sizes.K * Vp);
        from = S;
        if (initial.data != nullptr && in_place) {
            from = address(initial, task);
        } else if (in_place) {
            for (int64_t i = 0; i < sizes.K; ++i) fill_zero(S + i * ld, width);
        } else {
            read_state(S, initial, sizes, task);
        }
    }
    void finish() const {
        if (!in_place) copy_rows(final_state, sizes.V, S, ld, sizes.K, task.v_end - task.v_begin);
    }
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
