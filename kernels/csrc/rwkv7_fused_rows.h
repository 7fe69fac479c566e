// Reading and writing tokens as float32 for the parts of rwkv7_fused.
#pragma once

#include "rwkv7_fused.h"
#include "vec.h"

namespace wkv {
namespace WKV_SIMD {
namespace {

WKV_INLINE int64_t smaller(int64_t x, int64_t y) {
    return x < y ? x : y;
}

// Some channels of every token: n_heads heads of N from channel `begin` on. In float32 each head is padded to Np with
// zeros.
struct Chunk {
    int64_t begin, n_heads, N, Np;

    int64_t n() const { return n_heads * N; }
    int64_t size() const { return n_heads * Np; }
    // Where the chunk begins in a sum over tokens.
    int64_t sum_begin() const { return begin / N * Np; }
};

// Calls f for the chunks of whole heads.
template <class F>
WKV_INLINE void for_head_chunks(const rwkv7_sizes& sizes, F&& f) {
    const int64_t Np = padded_channels(sizes.N), heads = Np < kChunk ? kChunk / Np : 1;
    for (int64_t h = 0; h < sizes.H; h += heads) f(Chunk{h * sizes.N, smaller(heads, sizes.H - h), sizes.N, Np});
}

// Calls f for the chunks of one long head.
template <class F>
WKV_INLINE void for_channel_chunks(const rwkv7_sizes& sizes, F&& f) {
    const int64_t n_channels = sizes.H * sizes.N;
    for (int64_t c = 0; c < n_channels; c += kChunk) {
        const int64_t n = smaller(kChunk, n_channels - c);
        f(Chunk{c, 1, n, padded_channels(n)});
    }
}

// Hands out buffers of one chunk.
struct Buffers {
    float* next;
    int64_t size;

    Buffers(float* scratch, const Chunk& chunk) : next(scratch), size(chunk.size()) {}
    float* take() {
        float* taken = next;
        next += size;
        return taken;
    }
};

WKV_INLINE int64_t item_size(int64_t dtype) {
    return dtype == WKV_FLOAT32 ? 4 : 2;
}

WKV_INLINE char* address(const wkv_rows& x, int64_t batch, int64_t token, const Chunk& chunk) {
    return static_cast<char*>(x.data) + item_size(x.dtype) * (batch * x.batch + token * x.token + chunk.begin);
}

// Whether memory of this dtype holds the chunk as it is worked on.
WKV_INLINE bool in_place(int64_t dtype, const Chunk& chunk) {
    return dtype == WKV_FLOAT32 && chunk.N == chunk.Np;
}

const float* read_chunk(const void* from, int64_t dtype, const Chunk& chunk, float* buffer) {
    if (in_place(dtype, chunk)) return static_cast<const float*>(from);
    if (chunk.N == chunk.Np) {
        unpack(buffer, from, dtype, chunk.n(), chunk.n());
        return buffer;
    }
    const char* head = static_cast<const char*>(from);
    for (int64_t h = 0; h < chunk.n_heads; ++h, head += item_size(dtype) * chunk.N)
        unpack(buffer + h * chunk.Np, head, dtype, chunk.N, chunk.Np);
    return buffer;
}

// One input, a token at a time.
struct Reader {
    const wkv_rows& x;
    const Chunk& chunk;
    float* buffer;

    Reader(const wkv_rows& x, const Chunk& chunk, Buffers& buffers) : x(x), chunk(chunk), buffer(buffers.take()) {}
    const float* operator()(int64_t batch, int64_t token) const {
        return read_chunk(address(x, batch, token, chunk), x.dtype, chunk, buffer);
    }
};

const float* read_vector(const wkv_vector& x, const Chunk& chunk, Buffers& buffers) {
    const char* from = static_cast<const char*>(x.data) + item_size(x.dtype) * chunk.begin;
    return read_chunk(from, x.dtype, chunk, buffers.take());
}

// One output, a token at a time: `at` gives where to put the float32 values, `write` brings them to their place.
struct Writer {
    const wkv_rows& x;
    const Chunk& chunk;
    float* buffer;

    Writer(const wkv_rows& x, const Chunk& chunk, Buffers& buffers) : x(x), chunk(chunk), buffer(buffers.take()) {}
    float* at(int64_t batch, int64_t token) const {
        return in_place(x.dtype, chunk) ? reinterpret_cast<float*>(address(x, batch, token, chunk)) : buffer;
    }
    void write(int64_t batch, int64_t token) const {
        if (in_place(x.dtype, chunk)) return;
        char* to = address(x, batch, token, chunk);
        if (chunk.N == chunk.Np) {
            pack(to, buffer, x.dtype, chunk.n());
            return;
        }
        for (int64_t h = 0; h < chunk.n_heads; ++h, to += item_size(x.dtype) * chunk.N)
            pack(to, buffer + h * chunk.Np, x.dtype, chunk.N);
    }
};

// The sum of all values of x, in every lane.
WKV_INLINE Vec total(Vec x) {
    for (int step = 1; step < kLanes; step *= 2) x = add_pairs(x, x);
    return x;
}

WKV_INLINE void add_to(float* sum, Vec x) {
    store(sum, load(sum) + x);
}

}  // namespace
}  // namespace WKV_SIMD
}  // namespace wkv
