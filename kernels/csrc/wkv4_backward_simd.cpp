// The backward pass of wkv4 for one task; derivation in kernels/README.md.
//
// Letters: m = a / b; x its difference to a token's value; g* gradients, gy that of the output; ga and gb those of a
// and b, whose p counts as a constant; z = ga m + gb, kept instead of gb because the two nearly cancel.
#include "wkv4_step.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

struct Backward {
    const wkv4_backward_args& args;
    const Task& task;
    Inputs x;
    const int64_t n, Vp;
    const bool shared_decay;
    LongSum sum_u, sum_w;
    // One row per token of the block.
    float *gy, *gw;
    // The states before each block, with m instead of a.
    float* checkpoints;
    // ga, z, and gb of the final state.
    State G;

    Backward(const wkv4_backward_args& args, const Task& task, float* scratch, float* shared, int64_t n_shared)
        : args(args),
          task(task),
          x(args.in, task, scratch),
          n(x.n),
          Vp(x.Vp),
          shared_decay(args.grad_log_w.token == 0),
          sum_u(shared, take(scratch, Vp), Vp),
          sum_w(shared + n_shared, take(scratch, Vp), Vp),
          gy(take(scratch, kBlock * Vp)),
          gw(take(scratch, kBlock * Vp)),
          checkpoints(take(scratch, ((task.length + kBlock - 1) / kBlock + 1) * kWkv4State * Vp)),
          G(take(scratch, kWkv4State * Vp), Vp) {}

    State checkpoint(int64_t i) const { return State(checkpoints + i * kWkv4State * Vp, Vp); }

    void run() {
        if (task.length == 0) return copy_gradient();
        read_gradient();
        run_forward();
        for (int64_t begin = (task.length - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
            const int64_t end = begin + kBlock < task.length ? begin + kBlock : task.length;
            x.read(begin, end);
            read_rows(gy, args.grad_o, task, begin, end, task.v_begin, n);
            for (int64_t j = 0; j < Vp; j += kLanes)
                differentiate(checkpoint(begin / kBlock), end - begin, end == task.length, j);
            for (int64_t t = begin; t < end; ++t) {
                const int64_t row = (t - begin) * Vp;
                write_row(args.grad_k, x.k + row, task, t, task.v_begin, n);
                write_row(args.grad_v, x.v + row, task, t, task.v_begin, n);
                if (!shared_decay) write_row(args.grad_log_w, gw + row, task, t, task.v_begin, n);
            }
        }
        if (args.grad_state.data != nullptr) write_gradient();
    }

    // Without a token the final state is the initial one, but for its p.
    void copy_gradient() {
        if (args.grad_state.data == nullptr) return;
        read_gradient();
        float* to = channels(args.grad_state, task);
        for (int64_t i = 0; i < n; ++i) to[3 * i] = G.first[i], to[3 * i + 1] = G.high[i], to[3 * i + 2] = 0.0f;
    }

    void read_gradient() {
        fill_zero(G.first, kWkv4State * Vp);
        if (args.grad_final_state.data == nullptr) return;
        const float* from = channels(args.grad_final_state, task);
        for (int64_t i = 0; i < n; ++i) G.first[i] = from[3 * i], G.high[i] = from[3 * i + 1];
    }

    void write_gradient() {
        float* to = channels(args.grad_state, task);
        const State first = checkpoint(0);
        for (int64_t i = 0; i < n; ++i) {
            to[3 * i] = G.first[i];
            to[3 * i + 1] = G.b[i] - G.first[i] * first.first[i];
            to[3 * i + 2] = first.b[i] * G.b[i];
        }
    }

    // The state before each block, and behind the last.
    void run_forward() {
        const State first = checkpoint(0);
        read_channels(first, args.in.state, task, n);
        for (int64_t i = 0; i < n; ++i) first.first[i] = first.b[i] == 0.0f ? 0.0f : first.first[i] / first.b[i];
        for (int64_t begin = 0; begin + kBlock < task.length; begin += kBlock) {
            x.read(begin, begin + kBlock);
            const State from = checkpoint(begin / kBlock), to = checkpoint(begin / kBlock + 1);
            for (int64_t j = 0; j < Vp; j += kLanes) {
                Vec m = load(from.first + j), b = load(from.b + j);
                Exponent p{load(from.high + j), load(from.low + j)};
                for (int64_t t = 0; t < kBlock; ++t) {
                    const int64_t at = t * Vp + j;
                    const Weights update = weigh_update(p, load(x.w + t * x.w_row + j), load(x.k + at));
                    b = update.past * b + update.token;
                    m += (load(x.v + at) - m) * (update.token / b);
                }
                store(to.first + j, m), store(to.b + j, b), store(to.high + j, p.high), store(to.low + j, p.low);
            }
        }
    }

    // The tokens of a block, forth and back, for one vector of channels. Gradients take the places of k and v.
    WKV_INLINE void differentiate(const State& start, int64_t n_tokens, bool last, int64_t j) {
        // Before each token.
        Vec means[kBlock], weights[kBlock];
        Weights outputs[kBlock], updates[kBlock];
        Vec m = load(start.first + j), b = load(start.b + j);
        Exponent p{load(start.high + j), load(start.low + j)};
        const Vec u = load(x.u + j);
        for (int64_t t = 0; t < n_tokens; ++t) {
            const Vec k = load(x.k + t * Vp + j);
            means[t] = m, weights[t] = b;
            outputs[t] = weigh_output(p, u, k);
            updates[t] = weigh_update(p, load(x.w + t * x.w_row + j), k);
            b = updates[t].past * b + updates[t].token;
            m += (load(x.v + t * Vp + j) - m) * (updates[t].token / b);
        }
        Vec ga = load(G.first + j), z = last ? ga * m + load(G.high + j) : load(G.b + j);
        Vec gu{}, gw_sum{};
        // b is the sum of weights after the token.
        for (int64_t t = n_tokens - 1; t >= 0; --t) {
            const int64_t at = t * Vp + j;
            const Weights output = outputs[t], update = updates[t];
            const Vec before = weights[t], difference = load(x.v + at) - means[t];
            // What the output passes on.
            const Vec share = 1.0f / (output.past * before + output.token), gn = load(gy + at) * share;
            const Vec through_mean = output.past * output.token * gn * difference * share, gk = before * through_mean;
            // m_t - m_{t-1} and v - m_t.
            const Vec scaled = difference / b, moved = scaled * update.token;
            const Vec left = scaled * update.past * before;
            const Vec z_before = z - ga * moved;
            store(x.k + at, gk + update.token * (ga * left + z));
            store(x.v + at, output.token * gn + update.token * ga);
            const Vec g = update.past * before * z_before;
            store(gw + at, g);
            gu += gk, gw_sum += g;
            ga = update.past * ga + output.past * gn;
            z = update.past * z_before - through_mean;
            b = before;
        }
        store(G.first + j, ga), store(G.b + j, z);
        sum_u.add(j, gu);
        if (shared_decay) sum_w.add(j, gw_sum);
    }
};

}  // namespace

void wkv4_backward(const wkv4_backward_args& args, const Task& task, float* scratch, float* shared, int64_t n_shared) {
    Backward(args, task, scratch, shared, n_shared).run();
}

}  // namespace WKV_SIMD
}  // namespace wkv
