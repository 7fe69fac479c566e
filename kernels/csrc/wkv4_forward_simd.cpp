// The forward pass of wkv4 for one task; vectors run along channels.
#include "wkv4_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// n_tokens of the block for kN vectors of channels; o takes the place of v.
template <int kN>
WKV_INLINE void run_columns(const Inputs& x, const State& state, int64_t n_tokens, int64_t j) {
    Vec a[kN], b[kN], u[kN];
    Exponent p[kN];
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        a[c] = load(state.first + at), b[c] = load(state.b + at), u[c] = load(x.u + at);
        p[c] = {load(state.high + at), load(state.low + at)};
    }
    for (int64_t t = 0; t < n_tokens; ++t)
        for (int c = 0; c < kN; ++c) {
            const int64_t at = t * x.Vp + j + c * kLanes;
            const Vec k = load(x.k + at), v = load(x.v + at), w = load(x.w + t * x.w_row + j + c * kLanes);
            const Weights output = weigh_output(p[c], u[c], k);
            store(x.v + at, (output.past * a[c] + output.token * v) / (output.past * b[c] + output.token));
            const Weights update = weigh_update(p[c], w, k);
            a[c] = update.past * a[c] + update.token * v;
            b[c] = update.past * b[c] + update.token;
        }
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        store(state.first + at, a[c]), store(state.b + at, b[c]);
        store(state.high + at, p[c].high), store(state.low + at, p[c].low);
    }
}

// p goes out as one number; a and b take what it cannot hold.
void write_channels(const wkv_state& to, const State& state, const Task& task, int64_t n) {
    float* x = channels(to, task);
    for (int64_t i = 0; i < n; ++i) {
        const float p = state.high[i] + state.low[i], rest = (state.high[i] - p) + state.low[i];
        const float factor = rest > -1.0f && rest < 1.0f ? 1.0f + rest : 1.0f;
        x[3 * i] = state.first[i] * factor, x[3 * i + 1] = state.b[i] * factor, x[3 * i + 2] = p;
    }
}

}  // namespace

void wkv4_forward(const wkv4_forward_args& args, const Task& task, float* scratch) {
    Inputs x(args.in, task, scratch);
    const State state(take(scratch, kWkv4State * x.Vp), x.Vp);
    read_channels(state, args.in.state, task, x.n);
    for (int64_t begin = 0; begin < task.length; begin += kBlock) {
        const int64_t end = begin + kBlock < task.length ? begin + kBlock : task.length;
        x.read(begin, end);
        int64_t j = 0;
        for (; j + 2 * kLanes <= x.Vp; j += 2 * kLanes) run_columns<2>(x, state, end - begin, j);
        for (; j < x.Vp; j += kLanes) run_columns<1>(x, state, end - begin, j);
        for (int64_t t = begin; t < end; ++t) write_row(args.o, x.v + (t - begin) * x.Vp, task, t, task.v_begin, x.n);
    }
    write_channels(args.final_state, state, task, x.n);
}

}  // namespace WKV_SIMD
}  // namespace wkv
