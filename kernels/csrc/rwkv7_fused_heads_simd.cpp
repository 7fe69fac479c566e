// rwkv7_fused, the pieces that work head by head: what the WKV operator reads, and what becomes of its output.
//
// Letters: a in-context learning rate, z = raw_k k_k and kk = z / |z|; g* gradients.
#include "rwkv7_fused_rows.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

constexpr float kLogDecayScale = -0.6065306597126334f;
constexpr float kSmallestNorm = 1e-12f;

// |raw_k k_k| of one head, not below kSmallestNorm.
WKV_INLINE float key_norm(const float* raw_k, const float* k_k, int64_t Np) {
    Vec sum{};
    for (int64_t c = 0; c < Np; c += kLanes) {
        const Vec z = load(raw_k + c) * load(k_k + c);
        sum += z * z;
    }
    const float norm = __builtin_sqrtf(total(sum)[0]);
    return norm < kSmallestNorm ? kSmallestNorm : norm;
}

// centred = o - mean(o) over the N channels of one head, zero in the padding. Returns 1 / sqrt(variance + eps).
WKV_INLINE float centre(float* centred, const float* o, int64_t N, int64_t Np, float eps) {
    Vec sum{}, squares{};
    for (int64_t c = 0; c < Np; c += kLanes) sum += load(o + c);
    const Vec mean = total(sum) / static_cast<float>(N);
    for (int64_t c = 0; c < Np; c += kLanes) store(centred + c, load(o + c) - mean);
    for (int64_t c = N; c < Np; ++c) centred[c] = 0.0f;
    for (int64_t c = 0; c < Np; c += kLanes) squares += load(centred + c) * load(centred + c);
    return 1.0f / __builtin_sqrtf(total(squares)[0] / static_cast<float>(N) + eps);
}

// The bonus of one head, sum of r k r_k, in every lane.
WKV_INLINE Vec bonus(const float* r, const float* k, const float* r_k, int64_t Np) {
    Vec sum{};
    for (int64_t c = 0; c < Np; c += kLanes) sum += load(r + c) * load(k + c) * load(r_k + c);
    return total(sum);
}

}  // namespace

void rwkv7_key_stage(const rwkv7_key_stage_args& args, Rwkv7Block block) {
    const int64_t T = args.sizes.T;
    for_head_chunks(args.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const float *k_k = read_vector(args.k_k, chunk, buffers), *k_a = read_vector(args.k_a, chunk, buffers);
        const Reader read_w(args.raw_w, chunk, buffers), read_k(args.raw_k, chunk, buffers);
        const Reader read_a(args.raw_a, chunk, buffers);
        const Writer write_w(args.log_w, chunk, buffers), write_k(args.k, chunk, buffers);
        const Writer write_a(args.a, chunk, buffers), write_b(args.b, chunk, buffers);
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *raw_w = read_w(batch, token), *raw_k = read_k(batch, token), *raw_a = read_a(batch, token);
            float *log_w = write_w.at(batch, token), *k = write_k.at(batch, token);
            float *a = write_a.at(batch, token), *b = write_b.at(batch, token);
            for (int64_t head = 0; head < chunk.size(); head += chunk.Np) {
                const float scale = 1.0f / key_norm(raw_k + head, k_k + head, chunk.Np);
                for (int64_t c = head; c < head + chunk.Np; c += kLanes) {
                    const Vec rate = sigmoid(load(raw_a + c)), key = load(raw_k + c);
                    const Vec kk = key * load(k_k + c) * scale;
                    store(log_w + c, kLogDecayScale * sigmoid(load(raw_w + c)));
                    store(k + c, key * (1.0f + (rate - 1.0f) * load(k_a + c)));
                    store(a + c, -kk);
                    store(b + c, kk * rate);
                }
            }
            write_w.write(batch, token);
            write_k.write(batch, token);
            write_a.write(batch, token);
            write_b.write(batch, token);
        }
    });
}

void rwkv7_key_stage_backward(const rwkv7_key_stage_backward_args& args, Rwkv7Block block) {
    const rwkv7_key_stage_args& of = args.of;
    const int64_t T = of.sizes.T, sum_size = rwkv7_sum_size(of.sizes);
    for_head_chunks(of.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const float *k_k = read_vector(of.k_k, chunk, buffers), *k_a = read_vector(of.k_a, chunk, buffers);
        const Reader read_w(of.raw_w, chunk, buffers), read_k(of.raw_k, chunk, buffers);
        const Reader read_a(of.raw_a, chunk, buffers);
        const Reader read_gw(of.log_w, chunk, buffers), read_gk(of.k, chunk, buffers);
        const Reader read_ga(of.a, chunk, buffers), read_gb(of.b, chunk, buffers);
        const Writer grad_w(args.grad_raw_w, chunk, buffers), grad_k(args.grad_raw_k, chunk, buffers);
        const Writer grad_a(args.grad_raw_a, chunk, buffers);
        float *sum_k_k = block.sums + chunk.sum_begin(), *sum_k_a = sum_k_k + sum_size;
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *raw_w = read_w(batch, token), *raw_k = read_k(batch, token), *raw_a = read_a(batch, token);
            const float *gw = read_gw(batch, token), *gk = read_gk(batch, token);
            const float *ga = read_ga(batch, token), *gb = read_gb(batch, token);
            float *g_raw_w = grad_w.at(batch, token), *g_raw_k = grad_k.at(batch, token);
            float* g_raw_a = grad_a.at(batch, token);
            for (int64_t head = 0; head < chunk.size(); head += chunk.Np) {
                const int64_t end = head + chunk.Np;
                const float norm = key_norm(raw_k + head, k_k + head, chunk.Np), scale = 1.0f / norm;
                // kk . gkk, with gkk = gb rate - ga.
                Vec dot{};
                for (int64_t c = head; c < end; c += kLanes) {
                    const Vec rate = sigmoid(load(raw_a + c));
                    dot += load(raw_k + c) * load(k_k + c) * scale * (load(gb + c) * rate - load(ga + c));
                }
                // A norm at its lower bound does not depend on the key.
                dot = norm > kSmallestNorm ? total(dot) : Vec{};
                for (int64_t c = head; c < end; c += kLanes) {
                    const Vec rate = sigmoid(load(raw_a + c)), key = load(raw_k + c), kk = key * load(k_k + c) * scale;
                    const Vec keep = sigmoid(load(raw_w + c));
                    const Vec gz = (load(gb + c) * rate - load(ga + c) - kk * dot) * scale;
                    const Vec g_rate = load(gk + c) * key * load(k_a + c) + load(gb + c) * kk;
                    const Vec less = rate - 1.0f;
                    store(g_raw_w + c, load(gw + c) * kLogDecayScale * keep * (1.0f - keep));
                    store(g_raw_k + c, gz * load(k_k + c) + load(gk + c) * (1.0f + less * load(k_a + c)));
                    store(g_raw_a + c, -g_rate * rate * less);
                    add_to(sum_k_k + c, gz * key);
                    add_to(sum_k_a + c, load(gk + c) * key * less);
                }
            }
            grad_w.write(batch, token);
            grad_k.write(batch, token);
            grad_a.write(batch, token);
        }
    });
}

void rwkv7_out_stage(const rwkv7_out_stage_args& args, Rwkv7Block block) {
    const int64_t T = args.sizes.T;
    const float eps = static_cast<float>(args.eps);
    for_head_chunks(args.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const float *r_k = read_vector(args.r_k, chunk, buffers), *weight = read_vector(args.weight, chunk, buffers);
        const float* bias = read_vector(args.bias, chunk, buffers);
        const Reader read_o(args.o, chunk, buffers), read_r(args.r, chunk, buffers), read_k(args.k, chunk, buffers);
        const Reader read_v(args.v, chunk, buffers), read_g(args.g, chunk, buffers);
        const Writer writer(args.y, chunk, buffers);
        float* centred = buffers.take();
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *o = read_o(batch, token), *r = read_r(batch, token), *k = read_k(batch, token);
            const float *v = read_v(batch, token), *g = read_g(batch, token);
            float* y = writer.at(batch, token);
            for (int64_t head = 0; head < chunk.size(); head += chunk.Np) {
                const float scale = centre(centred, o + head, chunk.N, chunk.Np, eps);
                const Vec add = bonus(r + head, k + head, r_k + head, chunk.Np);
                for (int64_t c = head; c < head + chunk.Np; c += kLanes) {
                    const Vec normed = load(centred + c - head) * scale * load(weight + c) + load(bias + c);
                    store(y + c, (normed + add * load(v + c)) * load(g + c));
                }
            }
            writer.write(batch, token);
        }
    });
}

void rwkv7_out_stage_backward(const rwkv7_out_stage_backward_args& args, Rwkv7Block block) {
    const rwkv7_out_stage_args& of = args.of;
    const int64_t T = of.sizes.T, sum_size = rwkv7_sum_size(of.sizes);
    const float eps = static_cast<float>(of.eps);
    for_head_chunks(of.sizes, [&](const Chunk& chunk) {
        Buffers buffers(block.scratch, chunk);
        const float *r_k = read_vector(of.r_k, chunk, buffers), *weight = read_vector(of.weight, chunk, buffers);
        const float* bias = read_vector(of.bias, chunk, buffers);
        const Reader read_o(of.o, chunk, buffers), read_r(of.r, chunk, buffers), read_k(of.k, chunk, buffers);
        const Reader read_v(of.v, chunk, buffers), read_g(of.g, chunk, buffers), read_gy(of.y, chunk, buffers);
        const Writer grad_o(args.grad_o, chunk, buffers), grad_r(args.grad_r, chunk, buffers);
        const Writer grad_k(args.grad_k, chunk, buffers), grad_v(args.grad_v, chunk, buffers);
        const Writer grad_g(args.grad_g, chunk, buffers);
        float *normed = buffers.take(), *g_normed = buffers.take();
        float *sum_r_k = block.sums + chunk.sum_begin(), *sum_weight = sum_r_k + sum_size;
        float* sum_bias = sum_weight + sum_size;
        for (int64_t row = block.begin; row < block.end; ++row) {
            const int64_t batch = row / T, token = row % T;
            const float *o = read_o(batch, token), *r = read_r(batch, token), *k = read_k(batch, token);
            const float *v = read_v(batch, token), *g = read_g(batch, token), *gy = read_gy(batch, token);
            float *go = grad_o.at(batch, token), *gr = grad_r.at(batch, token), *gk = grad_k.at(batch, token);
            float *gv = grad_v.at(batch, token), *gg = grad_g.at(batch, token);
            for (int64_t head = 0; head < chunk.size(); head += chunk.Np) {
                const int64_t end = head + chunk.Np;
                const float scale = centre(normed, o + head, chunk.N, chunk.Np, eps);
                const Vec add = bonus(r + head, k + head, r_k + head, chunk.Np);
                // g_add is the gradient of the bonus; sum and dot are those of g_normed, alone and with normed.
                Vec g_add{}, sum{}, dot{};
                for (int64_t c = head; c < end; c += kLanes) {
                    const Vec x = load(normed + c - head) * scale, value = load(v + c), w = load(weight + c);
                    const Vec before_gate = load(gy + c) * load(g + c), gx = before_gate * w;
                    store(normed + c - head, x);
                    store(g_normed + c - head, gx);
                    store(gg + c, load(gy + c) * (x * w + load(bias + c) + add * value));
                    store(gv + c, add * before_gate);
                    g_add += before_gate * value;
                    sum += gx;
                    dot += gx * x;
                    add_to(sum_weight + c, before_gate * x);
                    add_to(sum_bias + c, before_gate);
                }
                g_add = total(g_add);
                sum = total(sum) / static_cast<float>(chunk.N);
                dot = total(dot) / static_cast<float>(chunk.N);
                for (int64_t c = head; c < end; c += kLanes) {
                    const Vec x = load(normed + c - head), rr = load(r + c), kk = load(k + c), rk = load(r_k + c);
                    store(go + c, (load(g_normed + c - head) - sum - x * dot) * scale);
                    store(gr + c, g_add * kk * rk);
                    store(gk + c, g_add * rr * rk);
                    add_to(sum_r_k + c, g_add * rr * kk);
                }
            }
            grad_o.write(batch, token);
            grad_r.write(batch, token);
            grad_k.write(batch, token);
            grad_v.write(batch, token);
            grad_g.write(batch, token);
        }
    });
}

}  // namespace WKV_SIMD
}  // namespace wkv
