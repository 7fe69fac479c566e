// rwkv7_fused, the pieces that know no heads: token shift and its mixes, value residual, relu squared.
//
// Letters: p the token before x; g* gradients.
#include "rwkv7_fused_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

// The token before (batch, token), in float32.
struct PreviousReader {
    const rwkv7_shift_mix_args& args;
    Reader x, before;
    float* zeros;

    PreviousReader(const rwkv7_shift_mix_args& args, const Chunk& chunk, Buffers& buffers)
        : args(args), x(args.x, chunk, buffers), before(args.before, chunk, buffers), zeros(buffers.take()) {
        for (int64_t i = 0; i < chunk.size(); ++i) zeros[i] = 0.0f;
    }
    const float* operator()(int64_t batch, int64_t token) const {
        if (args.before_each) return before(batch, token);
        if (token > 0) return x(batch, token - 1);
        return args.before.data == nullptr ? zeros : before(batch, 0);
    }
};

}  // namespace

void rwkv7_shift_mix(const rwkv7_shift_mix_args& args, Rwkv7Block block) {
    const int64_t T = args.sizes.T;
    for_channel_chunks(args.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const float* mixes[RWKV7_MAX_MIXES];
        for (int64_t i = 0; i < args.n_mixes; ++i) mixes[i] = read_vector(args.mixes[i], chunk, buffers);
        const Reader read_x(args.x, chunk, buffers);
        const PreviousReader read_previous(args, chunk, buffers);
        float* delta = buffers.take();
        const Buffers rest = buffers;
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *x = read_x(batch, token), *previous = read_previous(batch, token);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) store(delta + c, load(previous + c) - load(x + c));
            for (int64_t i = 0; i < args.n_mixes; ++i) {
                Buffers output = rest;
                const Writer writer(args.mixed[i], chunk, output);
                float* mixed = writer.at(batch, token);
                for (int64_t c = 0; c < chunk.size(); c += kLanes)
                    store(mixed + c, load(x + c) + load(delta + c) * load(mixes[i] + c));
                writer.write(batch, token);
            }
        }
    });
}

void rwkv7_shift_mix_backward(const rwkv7_shift_mix_backward_args& args, Rwkv7Block block) {
    const rwkv7_shift_mix_args& of = args.of;
    const int64_t T = of.sizes.T, sum_size = rwkv7_sum_size(of.sizes);
    for_channel_chunks(of.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const float* mixes[RWKV7_MAX_MIXES];
        for (int64_t i = 0; i < of.n_mixes; ++i) mixes[i] = read_vector(of.mixes[i], chunk, buffers);
        const Reader read_x(of.x, chunk, buffers);
        const PreviousReader read_previous(of, chunk, buffers);
        const Writer grad_x(args.grad_x, chunk, buffers), grad_before(args.grad_before, chunk, buffers);
        float *delta = buffers.take(), *gp = buffers.take(), *from_next = buffers.take();
        const Buffers rest = buffers;
        // The gradient of a token's p, into gp; that of x itself without it, and the sums, when asked for.
        const auto differentiate = [&](int64_t batch, int64_t token, float* gx) {
            for (int64_t c = 0; c < chunk.size(); c += kLanes) store(gp + c, Vec{});
            for (int64_t i = 0; i < of.n_mixes; ++i) {
                Buffers input = rest;
                const float* g = Reader(of.mixed[i], chunk, input)(batch, token);
                float* sum = block.sums + i * sum_size + chunk.begin;
                for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                    const Vec y = load(g + c);
                    add_to(gp + c, y * load(mixes[i] + c));
                    if (gx == nullptr) continue;
                    add_to(gx + c, y);
                    add_to(sum + c, y * load(delta + c));
                }
            }
        };
        // Backwards through the tokens, so that each gets from the next one what that took from it.
        if (!of.before_each && block.end % T != 0) {
            differentiate(block.end / T, block.end % T, nullptr);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) store(from_next + c, load(gp + c));
        } else {
            for (int64_t c = 0; c < chunk.size(); c += kLanes) store(from_next + c, Vec{});
        }
        for (int64_t row = block.end - 1; row >= block.begin; --row) {
            const int64_t batch = row / T, token = row % T;
            const float *x = read_x(batch, token), *previous = read_previous(batch, token);
            float* gx = grad_x.at(batch, token);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                store(delta + c, load(previous + c) - load(x + c));
                store(gx + c, load(from_next + c));
            }
            differentiate(batch, token, gx);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                const Vec to_previous = load(gp + c);
                store(gx + c, load(gx + c) - to_previous);
                if (!of.before_each) store(from_next + c, token > 0 ? to_previous : Vec{});
            }
            grad_x.write(batch, token);
            if (args.grad_before.data == nullptr || (token > 0 && !of.before_each)) continue;
            float* gb = grad_before.at(batch, token);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) store(gb + c, load(gp + c));
            grad_before.write(batch, token);
        }
    });
}

void rwkv7_value_residual(const rwkv7_value_residual_args& args, Rwkv7Block block) {
    const int64_t T = args.sizes.T;
    for_channel_chunks(args.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const Reader read_v(args.v, chunk, buffers), read_first(args.v_first, chunk, buffers);
        const Reader read_raw(args.raw, chunk, buffers);
        const Writer writer(args.mixed, chunk, buffers);
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *v = read_v(batch, token), *first = read_first(batch, token), *raw = read_raw(batch, token);
            float* mixed = writer.at(batch, token);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                const Vec own = load(v + c);
                store(mixed + c, own + (load(first + c) - own) * sigmoid(load(raw + c)));
            }
            writer.write(batch, token);
        }
    });
}

void rwkv7_value_residual_backward(const rwkv7_value_residual_backward_args& args, Rwkv7Block block) {
    const rwkv7_value_residual_args& of = args.of;
    const int64_t T = of.sizes.T;
    for_channel_chunks(of.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const Reader read_v(of.v, chunk, buffers), read_first(of.v_first, chunk, buffers);
        const Reader read_raw(of.raw, chunk, buffers), read_grad(of.mixed, chunk, buffers);
        const Writer grad_v(args.grad_v, chunk, buffers), grad_first(args.grad_v_first, chunk, buffers);
        const Writer grad_raw(args.grad_raw, chunk, buffers);
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *v = read_v(batch, token), *first = read_first(batch, token), *raw = read_raw(batch, token);
            const float* grad = read_grad(batch, token);
            float *gv = grad_v.at(batch, token), *gf = grad_first.at(batch, token), *gr = grad_raw.at(batch, token);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                const Vec s = sigmoid(load(raw + c)), g = load(grad + c), difference = load(first + c) - load(v + c);
                store(gv + c, g * (1.0f - s));
                store(gf + c, g * s);
                store(gr + c, g * difference * s * (1.0f - s));
            }
            grad_v.write(batch, token);
            grad_first.write(batch, token);
            grad_raw.write(batch, token);
        }
    });
}

void rwkv7_relu_squared(const rwkv7_relu_squared_args& args, Rwkv7Block block) {
    const int64_t T = args.sizes.T;
    for_channel_chunks(args.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const Reader read_x(args.x, chunk, buffers);
        const Writer writer(args.y, chunk, buffers);
        for (int64_t row = block.begin; row < block.end; ++row) {
            const float* x = read_x(row / T, row % T);
            float* y = writer.at(row / T, row % T);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                const Vec value = load(x + c);
                // The other branch for NaN, which it keeps.
                const Vec positive = value < 0.0f ? Vec{} : value;
                store(y + c, positive * positive);
            }
            writer.write(row / T, row % T);
        }
    });
}

void rwkv7_relu_squared_backward(const rwkv7_relu_squared_backward_args& args, Rwkv7Block block) {
    const rwkv7_relu_squared_args& of = args.of;
    const int64_t T = of.sizes.T;
    for_channel_chunks(of.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const Reader read_x(of.x, chunk, buffers), read_grad(of.y, chunk, buffers);
        const Writer writer(args.grad_x, chunk, buffers);
        for (int64_t row = block.begin; row < block.end; ++row) {
            const float *x = read_x(row / T, row % T), *grad = read_grad(row / T, row % T);
            float* gx = writer.at(row / T, row % T);
            for (int64_t c = 0; c < chunk.size(); c += kLanes) {
                const Vec value = load(x + c);
                store(gx + c, 2.0f * (value < 0.0f ? Vec{} : value) * load(grad + c));
            }
            writer.write(row / T, row % T);
        }
    });
}

void rwkv7_write_sum(const rwkv7_sizes& sizes, const wkv_vector& to, float* parts, int64_t n_parts, int64_t part_size) {
    const int64_t Np = padded_channels(sizes.N);
    for (int64_t part = 1; part < n_parts; ++part)
        for (int64_t c = 0; c < sizes.H * Np; c += kLanes) add_to(parts + c, load(parts + part * part_size + c));
    char* out = static_cast<char*>(to.data);
    for (int64_t h = 0; h < sizes.H; ++h, out += item_size(to.dtype) * sizes.N)
        pack(out, parts + h * Np, to.dtype, sizes.N);
}

}  // namespace WKV_SIMD
}  // namespace wkv
