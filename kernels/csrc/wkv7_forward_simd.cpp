// The forward pass of wkv7 for one task: the state is (K, V) and vectors run along V, so that sums over K stay in a
// lane.
#include "wkv7_step.h"

namespace wkv {
namespace WKV_SIMD {

void wkv7_forward(const wkv7_forward_args& args, const Task& task, float* scratch) {
    const wkv7_inputs& in = args.in;
    const int64_t K = in.sizes.K, Kp = padded(K), n_v = task.v_end - task.v_begin, Vp = padded(n_v);
    const Segment x = take_segment(scratch, Kp, Vp);
    float* y = take(scratch, kSegment * Vp);
    float* sa = take(scratch, Vp);
    Place place(in.state, args.final_state, in.sizes, task, scratch);
    const int64_t ld = place.ld, width = place.width;

    for (int64_t begin = 0; begin < task.length; begin += kSegment) {
        const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
        read_segment(x, in, task, begin, end);
        if (begin == 0) read_out(sa, x.a, place.from, ld, K, width);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t i = t - begin, at = i * Kp;
            const Step token{x.d + at, x.k + at, x.b + at, x.r + at, x.a + at + Kp, x.v + i * Vp, sa, sa, y + i * Vp};
            if (t + 1 < task.length)
                step<true, true>(token, place.from, ld, place.S, ld, K, width);
            else
                step<true, false>(token, place.from, ld, place.S, ld, K, width);
            place.from = place.S;
            write_row(args.o, token.y, task, t, task.v_begin, n_v);
        }
    }
    place.finish();
}

}  // namespace WKV_SIMD
}  // namespace wkv
