// What the forward and the backward pass of wkv6 share: reading the inputs.
//
// Letters: S state, d = exp(log_w), ruk = r diag(u) k^T, what a token's value counts in its own output.
#pragma once

#include "wkv6.h"
#include "wkv_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The inputs of one segment in float32, one row of padded(K) or padded(n_v) per token. Rows of d are `d_row` apart: 0
// where all tokens share one.
struct Inputs {
    const wkv6_inputs& in;
    const Task& task;
    const int64_t K, Kp, n_v, Vp, d_row;
    float *r, *d, *k, *u, *v, *ruk;

    Inputs(const wkv6_inputs& in, const Task& task, float*& scratch)
        : in(in),
          task(task),
          K(in.sizes.K),
          Kp(padded(K)),
          n_v(task.v_end - task.v_begin),
          Vp(padded(n_v)),
          d_row(in.log_w.token == 0 ? 0 : Kp) {
        r = take(scratch, kSegment * Kp);
        d = take(scratch, kSegment * Kp);
        k = take(scratch, kSegment * Kp);
        u = take(scratch, Kp);
        v = take(scratch, kSegment * Vp);
        ruk = take(scratch, padded(kSegment));
        read_row(u, in.u, task, 0, 0, K);
        if (d_row == 0 && task.length > 0) read_decay(0, 1);
    }

    void read_decay(int64_t begin, int64_t end) {
        read_rows(d, in.log_w, task, begin, end, 0, K);
        for (int64_t i = 0; i < (end - begin) * Kp; i += kLanes) store(d + i, exp(load(d + i)));
    }

    // What brings the state up to date: tokens [begin, end) of the task, end - begin <= kSegment.
    void read_update(int64_t begin, int64_t end) {
        if (d_row != 0) read_decay(begin, end);
        read_rows(k, in.k, task, begin, end, 0, K);
        read_rows(v, in.v, task, begin, end, task.v_begin, n_v);
    }

    void read(int64_t begin, int64_t end) {
        read_update(begin, end);
        read_rows(r, in.r, task, begin, end, 0, K);
        for (int64_t i = 0; i < end - begin; ++i) {
            Vec sum{};
            for (int64_t j = 0; j < Kp; j += kLanes) sum += load(r + i * Kp + j) * load(u + j) * load(k + i * Kp + j);
            ruk[i] = sum_lanes(sum);
        }
    }
};

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
