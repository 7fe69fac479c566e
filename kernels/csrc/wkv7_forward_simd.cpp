// The forward pass of wkv7 for one task: the state is (K, V) and vectors run along V, so that sums over K stay in a
// lane.
#include "wkv7_step.h"

namespace wkv {
namespace WKV_SIMD {

void wkv7_forward(const wkv7_forward_args& args, const Wkv7Task& task, float* scratch) {
    const wkv7_inputs& in = args.in;
    const int64_t K = in.K, Kp = padded(K), n_v = task.v_end - task.v_begin, Vp = padded(n_v);
    const Segment x = take_segment(scratch, Kp, Vp);
    float* y = take(scratch, kSegment * Vp);
    float* sa = take(scratch, Vp);
    // The state lives in the caller's memory where whole vectors fit its rows.
    float* final_state = address(args.final_state, task);
    const bool in_place = n_v % kLanes == 0 && task.length > 0;
    const int64_t width = in_place ? n_v : Vp, ld = in_place ? in.V : Vp;
    float* S = in_place ? final_state : take(scratch, K * Vp);
    const float* from = S;
    int64_t ld_from = ld;
    if (in.state.data != nullptr && in_place) {
        from = address(in.state, task);
        ld_from = in.V;
    } else {
        for (int64_t i = 0; i < K; ++i) fill_zero(S + i * ld, width);
        if (in.state.data != nullptr) copy_rows(S, ld, address(in.state, task), in.V, K, n_v);
    }

    for (int64_t begin = 0; begin < task.length; begin += kSegment) {
        const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
        read_segment(x, in, task, begin, end);
        if (begin == 0) read_out(sa, x.a, from, ld_from, K, width);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t i = t - begin, at = i * Kp;
            const Step token{x.d + at, x.k + at, x.b + at, x.r + at, x.a + at + Kp, x.v + i * Vp, sa, sa, y + i * Vp};
            if (t + 1 < task.length)
                step<true, true>(token, from, ld_from, S, ld, K, width);
            else
                step<true, false>(token, from, ld_from, S, ld, K, width);
            from = S;
            ld_from = ld;
            pack(address(args.o, task.batch, task.first_token + t, task.head, task.v_begin), token.y, args.o.dtype,
                 n_v);
        }
    }
    if (!in_place) copy_rows(final_state, in.V, S, ld, K, n_v);
}

}  // namespace WKV_SIMD
}  // namespace wkv
