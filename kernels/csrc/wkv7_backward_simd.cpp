// The backward pass of wkv7 for one task; derivation in kernels/README.md.
//
// Letters: S state, d = exp(log_w), sa = a S_{t-1}; g* gradients, gy that of the output, G = dL/dS.
// States are kept as (V, K), the transpose of the interface: five of the six sums then run over rows and stay within a
// lane, and the rows of G do not depend on each other.
#include "wkv7_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// One token as kRows rows see it.
struct TokenRows {
    // (Kp): the inputs, and the gradients to add to.
    const float *r, *d, *k, *a, *b;
    float *gr, *gd, *gk, *ga, *gb;
    // (kRows).
    const float *v, *gy, *sa;
    // (kRows, 2): gv and gsa.
    float* dots;
    // (kRows, Kp): the state before and after the token, and G.
    const float* before;
    float *after, *G;
};

// The state after the token, and gr += gy S, for kN vectors of columns.
template <int kN>
WKV_INLINE void rebuild(const TokenRows& x, int64_t j, int64_t Kp) {
    Vec d[kN], k[kN], b[kN], gr[kN];
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        d[c] = load(x.d + at), k[c] = load(x.k + at), b[c] = load(x.b + at), gr[c] = load(x.gr + at);
    }
    for (int64_t row = 0; row < kRows; ++row) {
        const float sa = x.sa[row], v = x.v[row], gy = x.gy[row];
        for (int c = 0; c < kN; ++c) {
            const int64_t at = row * Kp + j + c * kLanes;
            const Vec s = v * k[c] + (sa * b[c] + load(x.before + at) * d[c]);
            store(x.after + at, s);
            gr[c] += gy * s;
        }
    }
    for (int c = 0; c < kN; ++c) store(x.gr + j + c * kLanes, gr[c]);
}

// G += gy^T r, then gv = G k and gsa = G b, for kN rows: sums along rows, each left in kLanes / (2 kN) parts.
template <int kN>
WKV_INLINE Vec add_output_gradient(const TokenRows& x, int64_t row, int64_t Kp) {
    if constexpr (kN > 1) {
        const Vec first = add_output_gradient<kN / 2>(x, row, Kp);
        return add_pairs(first, add_output_gradient<kN / 2>(x, row + kN / 2, Kp));
    } else {
        const float gy = x.gy[row];
        float* G = x.G + row * Kp;
        Vec gv{}, gsa{};
        for (int64_t j = 0; j < Kp; j += kLanes) {
            const Vec g = gy * load(x.r + j) + load(G + j);
            store(G + j, g);
            gv += g * load(x.k + j);
            gsa += g * load(x.b + j);
        }
        return add_pairs(gv, gsa);
    }
}

// The sums over rows, and G from after the token to before it, for kN vectors of columns.
template <int kN>
WKV_INLINE void walk_back(const TokenRows& x, int64_t j, int64_t Kp) {
    Vec d[kN], a[kN], gd[kN], gk[kN], ga[kN], gb[kN];
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        d[c] = load(x.d + at), a[c] = load(x.a + at);
        gd[c] = load(x.gd + at), gk[c] = load(x.gk + at), ga[c] = load(x.ga + at), gb[c] = load(x.gb + at);
    }
    for (int64_t row = 0; row < kRows; ++row) {
        const float v = x.v[row], sa = x.sa[row], gsa = x.dots[2 * row + 1];
        for (int c = 0; c < kN; ++c) {
            const int64_t at = row * Kp + j + c * kLanes;
            const Vec g = load(x.G + at), s = load(x.before + at);
            gd[c] += g * s;
            gk[c] += v * g;
            gb[c] += sa * g;
            ga[c] += gsa * s;
            store(x.G + at, gsa * a[c] + g * d[c]);
        }
    }
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        store(x.gd + at, gd[c]), store(x.gk + at, gk[c]), store(x.ga + at, ga[c]), store(x.gb + at, gb[c]);
    }
}

// The backward pass of one task. States and G have padded(n_v) rows of padded(K) values; the padding stays zero.
struct Backward {
    const wkv7_backward_args& args;
    const Task& task;
    const int64_t K, Kp, n_v, Vp;
    float* terms;
    Segment x;
    // One row per token of the segment; in `dots`, gv and gsa take turns.
    float *gy, *dots, *summed[kSummed];
    // One row per token of the sequence.
    float* sa;
    // (segment, Kp, Vp): the state before each segment.
    float* checkpoints;
    // (Vp, Kp): the state before the segment, and G.
    float *start, *G;
    // (kSegment + 1, kRows, Kp): the states before each token of the segment and after its last.
    float* states;

    Backward(const wkv7_backward_args& args, const Task& task, float* scratch, float* terms)
        : args(args),
          task(task),
          K(args.in.sizes.K),
          Kp(padded(K)),
          n_v(task.v_end - task.v_begin),
          Vp(padded(n_v)),
          terms(terms) {
        x = take_segment(scratch, Kp, Vp);
        gy = take(scratch, kSegment * Vp);
        dots = take(scratch, kSegment * 2 * Vp);
        for (float*& g : summed) g = take(scratch, kSegment * Kp);
        sa = take(scratch, task.length * Vp);
        checkpoints = take(scratch, n_segments(task.length) * Kp * Vp);
        start = take(scratch, Kp * Vp);
        G = take(scratch, Kp * Vp);
        states = take(scratch, (kSegment + 1) * kRows * Kp);
    }

    void run() {
        run_forward();
        read_flipped(G, start, args.grad_final_state, args.in.sizes, task);
        for (int64_t begin = (n_segments(task.length) - 1) * kSegment; begin >= 0; begin -= kSegment) {
            const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
            read_segment(x, args.in, task, begin, end);
            read_rows(gy, args.grad_o, task, begin, end, task.v_begin, n_v);
            for (float* g : summed) fill_zero(g, (end - begin) * Kp);
            flip(start, Kp, checkpoints + begin / kSegment * Kp * Vp, Vp, K, Vp);
            if (Kp == 64)
                differentiate<64>(begin, end);
            else if (Kp == 32)
                differentiate<32>(begin, end);
            else if (Kp == 128)
                differentiate<128>(begin, end);
            else
                differentiate<0>(begin, end);
            write_segment(begin, end);
        }
        if (args.grad_state.data != nullptr) write_flipped(args.grad_state, start, G, args.in.sizes, task);
    }

    // Tokens [begin, end), forth and back. kLength is the length of a row, 0 where the compiler does not know it.
    template <int kLength>
    void differentiate(int64_t begin, int64_t end) {
        const int64_t Kp = kLength > 0 ? kLength : this->Kp;
        constexpr int kN = kLength == 0 || kLength >= kTile * kLanes ? kTile : kLength / kLanes;
        for (int64_t row = 0; row < Vp; row += kRows) {
            for (int64_t i = 0; i < end - begin; ++i) {
                const TokenRows rows = token_rows(begin, i, row);
                int64_t j = 0;
                for (; j + kN * kLanes <= Kp; j += kN * kLanes) rebuild<kN>(rows, j, Kp);
                for (; j < Kp; j += kLanes) rebuild<1>(rows, j, Kp);
            }
            for (int64_t i = end - begin - 1; i >= 0; --i) {
                const TokenRows rows = token_rows(begin, i, row);
                for (int64_t n = 0; n < kRows; n += kLanes / 2)
                    store(rows.dots + 2 * n, add_output_gradient<kLanes / 2>(rows, n, Kp));
                int64_t j = 0;
                for (; j + kN * kLanes <= Kp; j += kN * kLanes) walk_back<kN>(rows, j, Kp);
                for (; j < Kp; j += kLanes) walk_back<1>(rows, j, Kp);
            }
        }
    }

    TokenRows token_rows(int64_t begin, int64_t i, int64_t row) const {
        const int64_t token = i * Kp, value = i * Vp + row;
        return {x.r + token,
                x.d + token,
                x.k + token,
                x.a + token,
                x.b + token,
                summed[0] + token,
                summed[1] + token,
                summed[2] + token,
                summed[3] + token,
                summed[4] + token,
                x.v + value,
                gy + value,
                sa + (begin + i) * Vp + row,
                dots + 2 * value,
                i == 0 ? start + row * Kp : states + i * kRows * Kp,
                states + (i + 1) * kRows * Kp,
                G + row * Kp};
    }

    // The recurrence without its output: fills sa and checkpoints. The last update is of no use.
    void run_forward() {
        read_state(checkpoints, args.in.state, args.in.sizes, task);
        // Between two checkpoints the state stands in `start`.
        const float* from = checkpoints;
        for (int64_t begin = 0; begin < task.length; begin += kSegment) {
            const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
            read_segment(x, args.in, task, begin, end);
            if (begin == 0) read_out(sa, x.a, from, Vp, K, Vp);
            for (int64_t t = begin; t < end && t + 1 < task.length; ++t) {
                const int64_t i = t - begin, at = i * Kp;
                float* to = t + 1 == end ? checkpoints + end / kSegment * Kp * Vp : start;
                const Step token{x.d + at,     x.k + at,    x.b + at,          nullptr, x.a + at + Kp,
                                 x.v + i * Vp, sa + t * Vp, sa + (t + 1) * Vp, nullptr};
                step<false, true>(token, from, Vp, to, Vp, K, Vp);
                from = to;
            }
        }
    }

    void write_segment(int64_t begin, int64_t end) {
        // The gradient of the decay becomes that of its logarithm.
        for (int64_t j = 0; j < (end - begin) * Kp; j += kLanes)
            store(summed[1] + j, load(summed[1] + j) * load(x.d + j));
        const wkv_tensor* const to[] = {&args.grad_r, &args.grad_log_w, &args.grad_k, &args.grad_a, &args.grad_b};
        for (int64_t t = begin; t < end; ++t) {
            const int64_t i = t - begin;
            write_summed<kSummed>(to, summed, terms, args.in.sizes, task, t, i);
            float* gv = gy + i * Vp;
            for (int64_t j = 0; j < Vp; j += kLanes)
                store(gv + j, even_lanes(load(dots + 2 * (i * Vp + j)), load(dots + 2 * (i * Vp + j) + kLanes)));
            write_row(args.grad_v, gv, task, t, task.v_begin, n_v);
        }
    }
};

}  // namespace

void wkv7_backward(const wkv7_backward_args& args, const Task& task, float* scratch, float* terms) {
    Backward(args, task, scratch, terms).run();
}

}  // namespace WKV_SIMD
}  // namespace wkv
