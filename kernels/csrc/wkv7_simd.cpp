// wkv7, forward and backward, for one task. Compiled once per instruction set; see vec.h and kernels/README.md.
//
// Letters: S state, d = exp(log_w), sa = a S_{t-1}, y = r S_t; g* gradients, G = dL/dS; ld distance between rows.
// The forward pass keeps S as (K, V) and vectorises along V: sums over K then stay within a lane. The backward pass keeps
// states as (V, K): five of its six sums run over V and stay within a lane, and the rows of G are independent.
#include "vec.h"
#include "wkv7.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The inputs of one segment in float32, one row of padded(K) or padded(n_v) per token. `a` has one row more than the
// others: the first token of the next segment, zeros at the end.
struct Segment {
    float *r, *d, *k, *b, *a, *v;
};

float* take(float*& scratch, int64_t n) {
    float* taken = scratch;
    scratch += n;
    return taken;
}

void fill_zero(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}

Segment take_segment(float*& scratch, int64_t Kp, int64_t Vp) {
    Segment x;
    x.r = take(scratch, kSegment * Kp);
    x.d = take(scratch, kSegment * Kp);
    x.k = take(scratch, kSegment * Kp);
    x.b = take(scratch, kSegment * Kp);
    x.a = take(scratch, (kSegment + 1) * Kp);
    x.v = take(scratch, kSegment * Vp);
    return x;
}

char* address(const wkv_tensor& x, int64_t batch, int64_t token, int64_t head, int64_t channel) {
    const int64_t size = x.dtype == WKV_FLOAT32 ? 4 : 2;
    return static_cast<char*>(x.data) + size * (batch * x.batch + token * x.token + head * x.head + channel);
}

float* address(const wkv_state& x, const Wkv7Task& task) {
    return x.data + task.state_row * x.batch + task.head * x.head + task.v_begin;
}

// Tokens [begin, end) of the task, end - begin <= kSegment.
void read_segment(const Segment& x, const wkv7_inputs& in, const Wkv7Task& task, int64_t begin, int64_t end) {
    const int64_t K = in.K, Kp = padded(K), n_v = task.v_end - task.v_begin, Vp = padded(n_v);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t token = task.first_token + t, row = t - begin;
        const auto read = [&](float* to, const wkv_tensor& from) {
            unpack(to + row * Kp, address(from, task.batch, token, task.head, 0), from.dtype, K, Kp);
        };
        read(x.r, in.r);
        read(x.d, in.log_w);
        read(x.k, in.k);
        read(x.a, in.a);
        read(x.b, in.b);
        unpack(x.v + row * Vp, address(in.v, task.batch, token, task.head, task.v_begin), in.v.dtype, n_v, Vp);
    }
    for (int64_t i = 0; i < (end - begin) * Kp; i += kLanes) store(x.d + i, exp(load(x.d + i)));
    if (end < task.length) {
        const char* next = address(in.a, task.batch, task.first_token + end, task.head, 0);
        unpack(x.a + (end - begin) * Kp, next, in.a.dtype, K, Kp);
    }
}

void copy_rows(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t n_rows, int64_t n) {
    for (int64_t i = 0; i < n_rows; ++i) __builtin_memcpy(to + i * ld_to, from + i * ld_from, n * sizeof(float));
}

// sa = a S for n_v value channels, a multiple of kLanes.
void read_out(float* sa, const float* a, const float* S, int64_t ld, int64_t K, int64_t n_v) {
    for (int64_t j = 0; j < n_v; j += kLanes) {
        Vec even{}, odd{};
        int64_t i = 0;
        for (; i + 1 < K; i += 2) {
            even += a[i] * load(S + i * ld + j);
            odd += a[i + 1] * load(S + (i + 1) * ld + j);
        }
        if (i < K) even += a[i] * load(S + i * ld + j);
        store(sa + j, even + odd);
    }
}

struct Step {
    const float *d, *k, *b, *r, *a_next;
    const float *v, *sa;
    float *sa_next, *y;
};

// One token for kN vectors of value channels, in one sweep over the state: the new state, what it reads out through r and,
// for the token that follows, through a.
template <int kN, bool kOutput, bool kNext>
WKV_INLINE void step_columns(const Step& x, const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t K) {
    Vec sa[kN], v[kN], y[kN], next[kN];
    for (int j = 0; j < kN; ++j) {
        sa[j] = load(x.sa + j * kLanes);
        v[j] = load(x.v + j * kLanes);
        y[j] = next[j] = Vec{};
    }
    for (int64_t i = 0; i < K; ++i) {
        for (int j = 0; j < kN; ++j) {
            Vec s = load(from + i * ld_from + j * kLanes) * x.d[i];
            s = x.b[i] * sa[j] + s;
            s = x.k[i] * v[j] + s;
            store(to + i * ld_to + j * kLanes, s);
            if (kOutput) y[j] += x.r[i] * s;
            if (kNext) next[j] += x.a_next[i] * s;
        }
    }
    for (int j = 0; j < kN; ++j) {
        if (kOutput) store(x.y + j * kLanes, y[j]);
        if (kNext) store(x.sa_next + j * kLanes, next[j]);
    }
}

template <bool kOutput, bool kNext>
void step(Step x, const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t K, int64_t n_v) {
    const auto advance = [&](int64_t n) {
        x.v += n, x.sa += n, x.sa_next += n, from += n, to += n;
        if (kOutput) x.y += n;
    };
    for (; n_v >= kTile * kLanes; n_v -= kTile * kLanes, advance(kTile * kLanes))
        step_columns<kTile, kOutput, kNext>(x, from, ld_from, to, ld_to, K);
    if (kTile == 4 && n_v >= 2 * kLanes) {
        step_columns<2, kOutput, kNext>(x, from, ld_from, to, ld_to, K);
        n_v -= 2 * kLanes;
        advance(2 * kLanes);
    }
    for (; n_v > 0; n_v -= kLanes, advance(kLanes)) step_columns<1, kOutput, kNext>(x, from, ld_from, to, ld_to, K);
}

void forward(const wkv7_forward_args& args, const Wkv7Task& task, float* scratch) {
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
            const Step token{x.d + at,      x.k + at, x.b + at, x.r + at,  x.a + at + Kp,
                             x.v + i * Vp, sa,       sa,       y + i * Vp};
            if (t + 1 < task.length)
                step<true, true>(token, from, ld_from, S, ld, K, width);
            else
                step<true, false>(token, from, ld_from, S, ld, K, width);
            from = S;
            ld_from = ld;
            pack(address(args.o, task.batch, task.first_token + t, task.head, task.v_begin), token.y, args.o.dtype, n_v);
        }
    }
    if (!in_place) copy_rows(final_state, in.V, S, ld, K, n_v);
}

// The backward pass of one task. States and G have padded(n_v) rows of padded(K) values; the padding stays zero.
struct Backward {
    const wkv7_backward_args& args;
    const Wkv7Task& task;
    const int64_t K, Kp, n_v, Vp;
    float* partial;
    Segment x;
    // One row per token of the segment.
    float *gy, *gv, *summed[kSummed];
    // One row per token of the sequence.
    float* sa;
    float* gsa;
    // (segment, K, Vp): the state before each segment.
    float* checkpoints;
    // (kSegment + 1, Vp, Kp): the states before each token of the segment and after its last.
    float* states;
    float* G;

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
        gv = take(scratch, kSegment * Vp);
        for (float*& g : summed) g = take(scratch, kSegment * Kp);
        sa = take(scratch, task.length * Vp);
        gsa = take(scratch, Vp);
        checkpoints = take(scratch, n_segments(task.length) * Kp * Vp);
        states = take(scratch, (kSegment + 1) * Kp * Vp);
        G = take(scratch, Kp * Vp);
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
            flip(states, Kp, checkpoints + begin / kSegment * Kp * Vp, Vp, K, Vp);
            for (int64_t i = 0; i < end - begin; ++i) rebuild(i, sa + (begin + i) * Vp);
            for (int64_t i = end - begin - 1; i >= 0; --i) {
                add_output_gradient(i);
                walk_back(i, sa + (begin + i) * Vp);
            }
            write_segment(begin, end);
        }
        if (args.grad_state.data != nullptr) write_state(args.grad_state, G);
    }

    // to (columns, ld_to) = from (rows, ld_from) transposed; both have room up to padded sizes, rows past the end read as zero.
    void flip(float* to, int64_t ld_to, float* from, int64_t ld_from, int64_t rows, int64_t columns) {
        for (int64_t i = rows; i < padded(rows); ++i) fill_zero(from + i * ld_from, columns);
        for (int64_t i = 0; i < padded(rows); i += kLanes)
            for (int64_t j = 0; j < columns; j += kLanes)
                transpose(to + j * ld_to + i, ld_to, from + i * ld_from + j, ld_from);
    }

    // to (Vp, Kp) from a caller's (K, V); `states` is free at that time.
    void read_state(float* to, const wkv_state& from) {
        fill_zero(states, K * Vp);
        if (from.data != nullptr) copy_rows(states, Vp, address(from, task), args.in.V, K, n_v);
        flip(to, Kp, states, Vp, K, Vp);
    }

    void write_state(const wkv_state& to, float* from) {
        flip(states, Vp, from, Kp, Vp, Kp);
        copy_rows(address(to, task), args.in.V, states, Vp, K, n_v);
    }

    // The recurrence without its output: fills sa and checkpoints. The last update is of no use.
    void run_forward() {
        fill_zero(checkpoints, K * Vp);
        const wkv_state& state = args.in.state;
        if (state.data != nullptr) copy_rows(checkpoints, Vp, address(state, task), args.in.V, K, n_v);
        // Between two checkpoints the state stands in `states`.
        const float* from = checkpoints;
        for (int64_t begin = 0; begin < task.length; begin += kSegment) {
            const int64_t end = begin + kSegment < task.length ? begin + kSegment : task.length;
            read_segment(x, args.in, task, begin, end);
            if (begin == 0) read_out(sa, x.a, from, Vp, K, Vp);
            for (int64_t t = begin; t < end && t + 1 < task.length; ++t) {
                const int64_t i = t - begin, at = i * Kp;
                float* to = t + 1 == end ? checkpoints + end / kSegment * Kp * Vp : states;
                const Step token{x.d + at,      x.k + at,    x.b + at,          nullptr, x.a + at + Kp,
                                 x.v + i * Vp, sa + t * Vp, sa + (t + 1) * Vp, nullptr};
                step<false, true>(token, from, Vp, to, Vp, K, Vp);
                from = to;
            }
        }
    }

    // The state after token i, and gr = gy S.
    void rebuild(int64_t i, const float* sa_i) {
        int64_t j = 0;
        for (; j + kTile * kLanes <= Kp; j += kTile * kLanes) rebuild_columns<kTile>(i, j, sa_i);
        for (; j < Kp; j += kLanes) rebuild_columns<1>(i, j, sa_i);
    }

    template <int kN>
    WKV_INLINE void rebuild_columns(int64_t i, int64_t j, const float* sa_i) {
        const float* from = states + i * Kp * Vp + j;
        float* to = states + (i + 1) * Kp * Vp + j;
        const float *v = x.v + i * Vp, *gy_i = gy + i * Vp;
        Vec d[kN], k[kN], b[kN], gr[kN];
        for (int c = 0; c < kN; ++c) {
            const int64_t at = i * Kp + j + c * kLanes;
            d[c] = load(x.d + at), k[c] = load(x.k + at), b[c] = load(x.b + at);
            gr[c] = Vec{};
        }
        for (int64_t row = 0; row < Vp; ++row, from += Kp, to += Kp) {
            for (int c = 0; c < kN; ++c) {
                Vec s = load(from + c * kLanes) * d[c];
                s = sa_i[row] * b[c] + s;
                s = v[row] * k[c] + s;
                store(to + c * kLanes, s);
                gr[c] += gy_i[row] * s;
            }
        }
        for (int c = 0; c < kN; ++c) store(summed[0] + i * Kp + j + c * kLanes, gr[c]);
    }

    // G += gy^T r, then gv = G k and gsa = G b: sums along the rows, a vector of rows at a time.
    void add_output_gradient(int64_t i) {
        for (int64_t row = 0; row < Vp; row += kLanes) {
            const Dots dots = add_rows<kLanes>(i, row);
            store(gv + i * Vp + row, dots.gv);
            store(gsa + row, dots.gsa);
        }
    }

    struct Dots {
        Vec gv, gsa;
    };

    template <int kRows>
    WKV_INLINE Dots add_rows(int64_t i, int64_t row) {
        if constexpr (kRows > 1) {
            const Dots p = add_rows<kRows / 2>(i, row), q = add_rows<kRows / 2>(i, row + kRows / 2);
            return {add_pairs(p.gv, q.gv), add_pairs(p.gsa, q.gsa)};
        } else {
            const float *r = x.r + i * Kp, *k = x.k + i * Kp, *b = x.b + i * Kp;
            const float gy_row = gy[i * Vp + row];
            float* g_row = G + row * Kp;
            Dots sum{};
            for (int64_t j = 0; j < Kp; j += kLanes) {
                const Vec g = gy_row * load(r + j) + load(g_row + j);
                store(g_row + j, g);
                sum.gv += g * load(k + j);
                sum.gsa += g * load(b + j);
            }
            return sum;
        }
    }

    // The gradients of token i that sum over rows, then G from after the token to before it.
    void walk_back(int64_t i, const float* sa_i) {
        int64_t j = 0;
        for (; j + kTile * kLanes <= Kp; j += kTile * kLanes) walk_back_columns<kTile>(i, j, sa_i);
        for (; j < Kp; j += kLanes) walk_back_columns<1>(i, j, sa_i);
    }

    template <int kN>
    WKV_INLINE void walk_back_columns(int64_t i, int64_t j, const float* sa_i) {
        const float* before = states + i * Kp * Vp + j;
        const float* v = x.v + i * Vp;
        float* g_row = G + j;
        Vec d[kN], a[kN], glw[kN], gk[kN], ga[kN], gb[kN];
        for (int c = 0; c < kN; ++c) {
            d[c] = load(x.d + i * Kp + j + c * kLanes), a[c] = load(x.a + i * Kp + j + c * kLanes);
            glw[c] = gk[c] = ga[c] = gb[c] = Vec{};
        }
        for (int64_t row = 0; row < Vp; ++row, before += Kp, g_row += Kp) {
            for (int c = 0; c < kN; ++c) {
                const Vec g = load(g_row + c * kLanes), s = load(before + c * kLanes);
                glw[c] += g * s;
                gk[c] += v[row] * g;
                gb[c] += sa_i[row] * g;
                ga[c] += gsa[row] * s;
                store(g_row + c * kLanes, gsa[row] * a[c] + g * d[c]);
            }
        }
        for (int c = 0; c < kN; ++c) {
            const int64_t at = i * Kp + j + c * kLanes;
            store(summed[1] + at, glw[c] * d[c]);
            store(summed[2] + at, gk[c]);
            store(summed[3] + at, ga[c]);
            store(summed[4] + at, gb[c]);
        }
    }

    void write_segment(int64_t begin, int64_t end) {
        const wkv_tensor* to[kSummed] = {&args.grad_r, &args.grad_log_w, &args.grad_k, &args.grad_a, &args.grad_b};
        for (int64_t t = begin; t < end; ++t) {
            const int64_t token = task.first_token + t, i = t - begin;
            for (int g = 0; g < kSummed; ++g) {
                if (partial != nullptr)
                    copy_rows(partial + ((token * args.in.H + task.head) * kSummed + g) * Kp, Kp, summed[g] + i * Kp, Kp,
                              1, Kp);
                else
                    pack(address(*to[g], task.batch, token, task.head, 0), summed[g] + i * Kp, to[g]->dtype, K);
            }
            char* grad_v = address(args.grad_v, task.batch, token, task.head, task.v_begin);
            pack(grad_v, gv + i * Vp, args.grad_v.dtype, n_v);
        }
    }
};

void backward(const wkv7_backward_args& args, const Wkv7Task& task, float* scratch, float* partial) {
    Backward(args, task, scratch, partial).run();
}

void sum_parts(const wkv7_backward_args& args, int64_t batch, int64_t token, int64_t head, float* parts, int64_t n_parts,
               int64_t part_size) {
    const int64_t Kp = padded(args.in.K);
    const wkv_tensor* to[kSummed] = {&args.grad_r, &args.grad_log_w, &args.grad_k, &args.grad_a, &args.grad_b};
    for (int64_t part = 1; part < n_parts; ++part)
        for (int64_t i = 0; i < kSummed * Kp; i += kLanes)
            store(parts + i, load(parts + i) + load(parts + part * part_size + i));
    for (int g = 0; g < kSummed; ++g) pack(address(*to[g], batch, token, head, 0), parts + g * Kp, to[g]->dtype, args.in.K);
}

}  // namespace

extern const Wkv7Kernels wkv7_kernels;
const Wkv7Kernels wkv7_kernels = {forward, backward, sum_parts};

}  // namespace WKV_SIMD
}  // namespace wkv
