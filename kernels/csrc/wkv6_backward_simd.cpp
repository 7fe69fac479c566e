// The backward pass of wkv6 for one task; derivation in kernels/README.md.
//
// Letters: S state, d = exp(log_w), ruk = r diag(u) k^T; g* gradients, gy that of the output, G = dL/dS.
// States are kept as (V, K), the transpose of the interface: three of the four sums then run over rows and stay within
// a lane, and the rows of S and G do not depend on each other.
#include "wkv6_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// One token as kRows rows see it.
struct TokenRows {
    // (Kp): the inputs, and the gradients to add to.
    const float *r, *d, *k;
    float *gr, *gk, *gd;
    // (kRows).
    const float *v, *gy;
    // (kRows, Kp): the state before and after the token (NULL: not wanted), and G.
    const float* before;
    float *after, *G;
};

// gr += gy S, and the state after the token, for kN vectors of columns.
template <int kN, bool kAfter>
WKV_INLINE void rebuild(const TokenRows& x, int64_t j, int64_t Kp) {
    Vec d[kN], k[kN], gr[kN];
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        d[c] = load(x.d + at), k[c] = load(x.k + at), gr[c] = load(x.gr + at);
    }
    for (int64_t row = 0; row < kRows; ++row) {
        const float v = x.v[row], gy = x.gy[row];
        for (int c = 0; c < kN; ++c) {
            const int64_t at = row * Kp + j + c * kLanes;
            const Vec s = load(x.before + at);
            gr[c] += gy * s;
            if (kAfter) store(x.after + at, v * k[c] + s * d[c]);
        }
    }
    for (int c = 0; c < kN; ++c) store(x.gr + j + c * kLanes, gr[c]);
}

// The other sums, and G from after the token to before it, for kN vectors of columns. A row's part of gv = G k^T stays
// in the lanes of dots[row].
template <int kN>
WKV_INLINE void walk_back(const TokenRows& x, Vec (&dots)[kRows], int64_t j, int64_t Kp) {
    Vec r[kN], d[kN], k[kN], gk[kN], gd[kN];
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        r[c] = load(x.r + at), d[c] = load(x.d + at), k[c] = load(x.k + at);
        gk[c] = load(x.gk + at), gd[c] = load(x.gd + at);
    }
    for (int64_t row = 0; row < kRows; ++row) {
        const float v = x.v[row], gy = x.gy[row];
        Vec dot = dots[row];
        for (int c = 0; c < kN; ++c) {
            const int64_t at = row * Kp + j + c * kLanes;
            const Vec g = load(x.G + at);
            dot += g * k[c];
            gk[c] += v * g;
            gd[c] += g * load(x.before + at);
            store(x.G + at, gy * r[c] + g * d[c]);
        }
        dots[row] = dot;
    }
    for (int c = 0; c < kN; ++c) {
        const int64_t at = j + c * kLanes;
        store(x.gk + at, gk[c]), store(x.gd + at, gd[c]);
    }
}

// Sums of kN vectors, each left in kLanes / kN neighbouring lanes.
template <int kN>
WKV_INLINE Vec sum_each(const Vec* x) {
    if constexpr (kN > 1) {
        const Vec first = sum_each<kN / 2>(x);
        return add_pairs(first, sum_each<kN / 2>(x + kN / 2));
    } else {
        return *x;
    }
}

// The backward pass of one task. States and G have padded(n_v) rows of padded(K) values; the padding stays zero.
struct Backward {
    const wkv6_backward_args& args;
    const Task& task;
    Inputs x;
    const int64_t Kp, Vp;
    const bool shared_decay;
    float* terms;
    // One row per token of the segment: gradients of r, k and d, the last in one row where tokens share it.
    float* summed[kWkv6Summed];
    // (Kp): over the tokens of the segment, r k (v gy^T).
    float* gu;
    LongSum sum_u, sum_d;
    float* gy;
    // (segment, Vp, Kp): the state before each segment.
    float* checkpoints;
    // (Vp, Kp).
    float *G, *buffer;
    // (kSegment, kRows, Kp): the states after each token of the segment but the last.
    float* states;

    Backward(const wkv6_backward_args& args, const Task& task, float* scratch, float* terms, float* shared)
        : args(args),
          task(task),
          x(args.in, task, scratch),
          Kp(x.Kp),
          Vp(x.Vp),
          shared_decay(args.grad_log_w.token == 0),
          terms(terms) {
        for (float*& g : summed) g = take(scratch, kSegment * Kp);
        gu = take(scratch, Kp);
        sum_u = LongSum(shared, take(scratch, Kp), Kp);
        sum_d = LongSum(shared + Kp, take(scratch, Kp), Kp);
        gy = take(scratch, kSegment * Vp);
        checkpoints = take(scratch, n_segments(task.length) * Kp * Vp);
        G = take(scratch, Kp * Vp);
        buffer = take(scratch, Kp * Vp);
        states = take(scratch, kSegment * kRows * Kp);
    }

    void run() {
        run_forward();
        read_flipped(G, buffer, args.grad_final_state, args.in.sizes, task);
        for (int64_t begin = (n_segments(task.length) - 1) * kSegment; begin >= 0; begin -= kSegment) {
            const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
            x.read(begin, end);
            read_rows(gy, args.grad_o, task, begin, end, task.v_begin, x.n_v);
            add_bonus(end - begin);
            const float* start = checkpoints + begin / kSegment * Kp * Vp;
            if (Kp == 64)
                differentiate<64>(start, end - begin);
            else if (Kp == 32)
                differentiate<32>(start, end - begin);
            else if (Kp == 128)
                differentiate<128>(start, end - begin);
            else
                differentiate<0>(start, end - begin);
            write_segment(begin, end);
        }
        for (int64_t j = 0; shared_decay && task.length > 0 && j < Kp; j += kLanes)
            store(sum_d.sum + j, load(sum_d.sum + j) * load(x.d + j));
        if (args.grad_state.data != nullptr) write_flipped(args.grad_state, buffer, G, args.in.sizes, task);
    }

    // The recurrence without its output, up to the beginning of the last segment.
    void run_forward() {
        read_flipped(task.length > 0 ? checkpoints : G, buffer, args.in.state, args.in.sizes, task);
        for (int64_t begin = 0; begin + kSegment < task.length; begin += kSegment) {
            x.read_update(begin, begin + kSegment);
            const float* from = checkpoints + begin / kSegment * Kp * Vp;
            for (int64_t row = 0; row < Vp; row += 2) {
                int64_t j = 0;
                for (; j + 2 * kLanes <= Kp; j += 2 * kLanes) advance<2>(from + row * Kp, row, j);
                for (; j < Kp; j += kLanes) advance<1>(from + row * Kp, row, j);
            }
        }
    }

    // A whole segment for two rows and kN vectors of columns; the result lies behind what it is made from.
    template <int kN>
    WKV_INLINE void advance(const float* from, int64_t row, int64_t j) {
        Vec s[2][kN];
        for (int i = 0; i < 2; ++i)
            for (int c = 0; c < kN; ++c) s[i][c] = load(from + i * Kp + j + c * kLanes);
        for (int64_t t = 0; t < kSegment; ++t)
            for (int c = 0; c < kN; ++c) {
                const Vec d = load(x.d + t * x.d_row + j + c * kLanes), k = load(x.k + t * Kp + j + c * kLanes);
                for (int i = 0; i < 2; ++i) s[i][c] = x.v[t * Vp + row + i] * k + d * s[i][c];
            }
        float* to = const_cast<float*>(from) + Kp * Vp;
        for (int i = 0; i < 2; ++i)
            for (int c = 0; c < kN; ++c) store(to + i * Kp + j + c * kLanes, s[i][c]);
    }

    // What the bonus adds to the gradients, which begin here.
    void add_bonus(int64_t n_tokens) {
        fill_zero(gu, Kp);
        fill_zero(summed[2], n_tokens * Kp);
        for (int64_t i = 0; i < n_tokens; ++i) {
            Vec sum{};
            for (int64_t j = 0; j < Vp; j += kLanes) sum += load(x.v + i * Vp + j) * load(gy + i * Vp + j);
            const float v_gy = sum_lanes(sum);
            for (int64_t j = 0; j < Kp; j += kLanes) {
                const int64_t at = i * Kp + j;
                const Vec r = load(x.r + at) * v_gy, k = load(x.k + at), u = load(x.u + j);
                store(summed[0] + at, u * k * v_gy);
                store(summed[1] + at, u * r);
                store(gu + j, load(gu + j) + r * k);
            }
        }
        sum_u.add(gu);
    }

    // The tokens of a segment, forth and back. kLength is the length of a row, 0 where the compiler does not know it.
    template <int kLength>
    void differentiate(const float* start, int64_t n_tokens) {
        const int64_t Kp = kLength > 0 ? kLength : this->Kp;
        constexpr int kN = kLength == 0 || kLength >= kTile * kLanes ? kTile : kLength / kLanes;
        for (int64_t row = 0; row < Vp; row += kRows) {
            for (int64_t i = 0; i < n_tokens; ++i) {
                const TokenRows rows = token_rows(start, i, row);
                int64_t j = 0;
                if (i + 1 < n_tokens) {
                    for (; j + kN * kLanes <= Kp; j += kN * kLanes) rebuild<kN, true>(rows, j, Kp);
                    for (; j < Kp; j += kLanes) rebuild<1, true>(rows, j, Kp);
                } else {
                    for (; j < Kp; j += kLanes) rebuild<1, false>(rows, j, Kp);
                }
            }
            for (int64_t i = n_tokens - 1; i >= 0; --i) {
                const TokenRows rows = token_rows(start, i, row);
                Vec dots[kRows] = {};
                int64_t j = 0;
                for (; j + kN * kLanes <= Kp; j += kN * kLanes) walk_back<kN>(rows, dots, j, Kp);
                for (; j < Kp; j += kLanes) walk_back<1>(rows, dots, j, Kp);
                write_value_gradient(dots, i, row);
            }
        }
    }

    TokenRows token_rows(const float* start, int64_t i, int64_t row) const {
        const int64_t token = i * Kp, value = i * Vp + row;
        return {x.r + token,
                x.d + i * x.d_row,
                x.k + token,
                summed[0] + token,
                summed[1] + token,
                summed[2] + (shared_decay ? 0 : token),
                x.v + value,
                gy + value,
                i == 0 ? start + row * Kp : states + (i - 1) * kRows * Kp,
                states + i * kRows * Kp,
                G + row * Kp};
    }

    // gv takes the place of v, which is read no more.
    void write_value_gradient(const Vec (&dots)[kRows], int64_t i, int64_t row) {
        constexpr int kN = kRows < kLanes ? kRows : kLanes;
        for (int64_t n = 0; n < kRows; n += kN) {
            Vec gv = sum_each<kN>(dots + n);
            for (int width = kLanes / kN; width > 1; width /= 2) gv = add_pairs(gv, gv);
            float* to = x.v + i * Vp + row + n;
            const float* dy = gy + i * Vp + row + n;
            for (int lane = 0; lane < kN; ++lane) to[lane] = gv[lane] + x.ruk[i] * dy[lane];
        }
    }

    void write_segment(int64_t begin, int64_t end) {
        if (shared_decay) {
            sum_d.add(summed[2]);
        } else {
            // The gradient of the decay becomes that of its logarithm.
            for (int64_t i = 0; i < end - begin; ++i)
                for (int64_t j = 0; j < Kp; j += kLanes)
                    store(summed[2] + i * Kp + j, load(summed[2] + i * Kp + j) * load(x.d + i * x.d_row + j));
        }
        const wkv_tensor* const to[] = {&args.grad_r, &args.grad_k, shared_decay ? nullptr : &args.grad_log_w};
        for (int64_t t = begin; t < end; ++t) {
            write_summed<kWkv6Summed>(to, summed, terms, args.in.sizes, task, t, t - begin);
            write_row(args.grad_v, x.v + (t - begin) * Vp, task, t, task.v_begin, x.n_v);
        }
    }
};

}  // namespace

void wkv6_backward(const wkv6_backward_args& args, const Task& task, float* scratch, float* terms, float* shared) {
    Backward(args, task, scratch, terms, shared).run();
}

}  // namespace WKV_SIMD
}  // namespace wkv
