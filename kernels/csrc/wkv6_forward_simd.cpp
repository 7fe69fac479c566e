// The forward pass of wkv6 for one task: the state is (K, V) and vectors run along V, so that sums over K stay in a
// lane. Nothing of a token depends on the output of the one before: several go through a row of the state together.
#include "wkv6_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

constexpr int kTogether = kTile == 4 ? 4 : 2;

// kTokens tokens from the i-th of the segment on, for kN vectors of value channels from j on.
template <int kTokens, int kN>
WKV_INLINE void sweep_columns(const Inputs& x, const Place& place, float* y, int64_t i, int64_t j) {
    Vec v[kTokens][kN], o[kTokens][kN];
    for (int t = 0; t < kTokens; ++t)
        for (int c = 0; c < kN; ++c) {
            v[t][c] = load(x.v + (i + t) * x.Vp + j + c * kLanes);
            o[t][c] = x.ruk[i + t] * v[t][c];
        }
    const float *r = x.r + i * x.Kp, *k = x.k + i * x.Kp, *d = x.d + i * x.d_row;
    for (int64_t row = 0; row < x.K; ++row) {
        Vec s[kN];
        for (int c = 0; c < kN; ++c) s[c] = load(place.from + row * place.ld + j + c * kLanes);
        for (int t = 0; t < kTokens; ++t)
            for (int c = 0; c < kN; ++c) {
                o[t][c] += r[t * x.Kp + row] * s[c];
                s[c] = k[t * x.Kp + row] * v[t][c] + d[t * x.d_row + row] * s[c];
            }
        for (int c = 0; c < kN; ++c) store(place.S + row * place.ld + j + c * kLanes, s[c]);
    }
    for (int t = 0; t < kTokens; ++t)
        for (int c = 0; c < kN; ++c) store(y + (i + t) * x.Vp + j + c * kLanes, o[t][c]);
}

template <int kTokens>
void sweep(const Inputs& x, Place& place, float* y, int64_t i) {
    constexpr int kN = kTokens == 1 ? kTile : 2;
    int64_t j = 0;
    for (; j + kN * kLanes <= place.width; j += kN * kLanes) sweep_columns<kTokens, kN>(x, place, y, i, j);
    for (; j < place.width; j += kLanes) sweep_columns<kTokens, 1>(x, place, y, i, j);
    place.from = place.S;
}

}  // namespace

void wkv6_forward(const wkv6_forward_args& args, const Task& task, float* scratch) {
    Inputs x(args.in, task, scratch);
    float* y = take(scratch, kSegment * x.Vp);
    Place place(args.in.state, args.final_state, args.in.sizes, task, scratch);
    for (int64_t begin = 0; begin < task.length; begin += kSegment) {
        const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
        x.read(begin, end);
        int64_t i = 0;
        for (; i + kTogether <= end - begin; i += kTogether) sweep<kTogether>(x, place, y, i);
        for (; i < end - begin; ++i) sweep<1>(x, place, y, i);
        for (int64_t t = begin; t < end; ++t) write_row(args.o, y + (t - begin) * x.Vp, task, t, task.v_begin, x.n_v);
    }
    place.finish();
}

}  // namespace WKV_SIMD
}  // namespace wkv
