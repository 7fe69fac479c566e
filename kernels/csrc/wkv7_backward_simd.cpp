// The backward pass of wkv7 for one task; derivation in kernels/README.md.
//
// Letters: S state, d = exp(log_w), sa = a S_{t-1}; g* gradients, gy that of the output, G = dL/dS.
// States are kept as (V, K), the transpose of the interface: five of the six sums then run over rows and stay within a
// lane, and the rows of G do not depend on each other.
#include "wkv7_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// Where the gradients go that sum over the value channels, in the order of their terms.
struct SummedGradients {
    const wkv_tensor* tensors[kSummed];

    explicit SummedGradients(const wkv7_backward_args& args)
        : tensors{&args.grad_r, &args.grad_log_w, &args.grad_k, &args.grad_a, &args.grad_b} {}
};

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
    const Wkv7Task& task;
    const int64_t K, Kp, n_v, Vp;
    float* partial;
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

    Backward(const wkv7_backward_args& args, const Wkv7Task& task, float* scratch, float* partial)
        : args(args),
          task(task),
          K(args.in.K),
          Kp(padded(K)),
          n_v(task.v_end - task.v_begin),
          Vp(padded(n_v)),
          partial(partial) {
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
        read_state(G, args.grad_final_state);
        for (int64_t begin = (n_segments(task.length) - 1) * kSegment; begin >= 0; begin -= kSegment) {
            const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
            read_segment(x, args.in, task, begin, end);
            for (int64_t t = begin; t < end; ++t) {
                const char* from = address(args.grad_o, task.batch, task.first_token + t, task.head, task.v_begin);
                unpack(gy + (t - begin) * Vp, from, args.grad_o.dtype, n_v, Vp);
            }
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
        if (args.grad_state.data != nullptr) write_state(args.grad_state, G);
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

    // to (columns, ld_to) = from (rows, ld_from) transposed; both have room up to padded sizes, rows past the end read
    // as zero.
    void flip(float* to, int64_t ld_to, float* from, int64_t ld_from, int64_t rows, int64_t columns) {
        for (int64_t i = rows; i < padded(rows); ++i) fill_zero(from + i * ld_from, columns);
        for (int64_t i = 0; i < padded(rows); i += kLanes)
            for (int64_t j = 0; j < columns; j += kLanes)
                transpose(to + j * ld_to + i, ld_to, from + i * ld_from + j, ld_from);
    }

    // to (Vp, Kp) from a caller's (K, V); `start` is free at that time.
    void read_state(float* to, const wkv_state& from) {
        fill_zero(start, K * Vp);
        if (from.data != nullptr) copy_rows(start, Vp, address(from, task), args.in.V, K, n_v);
        flip(to, Kp, start, Vp, K, Vp);
    }

    void write_state(const wkv_state& to, float* from) {
        flip(start, Vp, from, Kp, Vp, Kp);
        copy_rows(address(to, task), args.in.V, start, Vp, K, n_v);
    }

    // The recurrence without its output: fills sa and checkpoints. The last update is of no use.
    void run_forward() {
        fill_zero(checkpoints, K * Vp);
        const wkv_state& state = args.in.state;
        if (state.data != nullptr) copy_rows(checkpoints, Vp, address(state, task), args.in.V, K, n_v);
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
        const SummedGradients to(args);
        // The gradient of the decay becomes that of its logarithm.
        for (int64_t j = 0; j < (end - begin) * Kp; j += kLanes)
            store(summed[1] + j, load(summed[1] + j) * load(x.d + j));
        for (int64_t t = begin; t < end; ++t) {
            const int64_t token = task.first_token + t, i = t - begin;
            for (int g = 0; g < kSummed; ++g) {
                if (partial != nullptr)
                    copy_rows(partial + ((token * args.in.H + task.head) * kSummed + g) * Kp, Kp, summed[g] + i * Kp,
                              Kp, 1, Kp);
                else
                    pack(address(*to.tensors[g], task.batch, token, task.head, 0), summed[g] + i * Kp,
                         to.tensors[g]->dtype, K);
            }
            float* gv = gy + i * Vp;
            for (int64_t j = 0; j < Vp; j += kLanes)
                store(gv + j, even_lanes(load(dots + 2 * (i * Vp + j)), load(dots + 2 * (i * Vp + j) + kLanes)));
            pack(address(args.grad_v, task.batch, token, task.head, task.v_begin), gv, args.grad_v.dtype, n_v);
        }
    }
};

}  // namespace

void wkv7_backward(const wkv7_backward_args& args, const Wkv7Task& task, float* scratch, float* partial) {
    Backward(args, task, scratch, partial).run();
}

void wkv7_sum_parts(const wkv7_backward_args& args, int64_t batch, int64_t token, int64_t head, float* parts,
                    int64_t n_parts, int64_t part_size) {
    const int64_t Kp = padded(args.in.K);
    const SummedGradients to(args);
    for (int64_t part = 1; part < n_parts; ++part)
        for (int64_t i = 0; i < kSummed * Kp; i += kLanes)
            store(parts + i, load(parts + i) + load(parts + part * part_size + i));
    for (int g = 0; g < kSummed; ++g)
        pack(address(*to.tensors[g], batch, token, head, 0), parts + g * Kp, to.tensors[g]->dtype, args.in.K);
}

}  // namespace WKV_SIMD
}  // namespace wkv
