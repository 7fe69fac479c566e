"""The kernels of the operator wkv6, which wkv6.py launches.

Letters: T tokens, H heads, K key and V value channels of a head, n tokens of a chunk; S the state before a chunk,
(K, V); y the output, u the bonus; g* gradients, gy that of the output, G that of the state after a chunk.

Token i reads what token j < i wrote, weighted by the decays of the tokens between them. Within a block of 8 tokens
such a weight is multiplied up token by token. Between blocks it is the product of two exponentials of sums of log_w,
both at most 1, which meet between two blocks: between the halves of 16 tokens, of 32, and so on up to the chunk. No sum
is ever the difference of two, so nothing overflows and nothing cancels, whatever the decay.
"""

# Triton knows no starred tuples.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from .common import chunk_tokens, chunks_of, dot, exact_dot, load_rows, store_rows

# exp() of less is zero in float32; sums of log_w stay finite.
LOWEST = tl.constexpr(-128.0)

# Tokens of a block, and its logarithm.
BLOCK = tl.constexpr(8)
LOG_BLOCK = tl.constexpr(3)


@triton.jit
def _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """log_w of a chunk; zeros, which leave a state as it is, beyond its end.  # (n, BK)"""
    row = begin // tl.maximum(T, 1)
    t = begin + tl.arange(0, n)
    i = tl.arange(0, BK)
    at = log_w + row * row_stride + (t - row * T)[:, None] * token_stride + (h * K + i)[None, :]
    x = tl.load(at, mask=(t < end)[:, None] & (i < K)[None, :], other=0.0).to(tl.float32)
    # Written so that NaN stays.
    return tl.where(x < LOWEST, LOWEST, x)


@triton.jit
def _between(t, s, shift: tl.constexpr):
    """Whether token s lies between t and the middle of the 2^(shift + 1) tokens around t."""
    return ((t >> shift) == (s >> shift)) & tl.where((t >> shift) % 2 == 1, s < t, s > t)


@triton.jit
def _decay(summed, w, PRECISION: tl.constexpr):
    """The decays of all tokens that `summed` chooses for a token.  # (n, BK)"""
    return tl.exp(exact_dot(summed.to(tl.float32), w, None, PRECISION, True))


@triton.jit(do_not_specialize=["T", "H"])
def add_up_kernel(
    x, y, log_w, row_stride, token_stride, states, decays, bounds, T,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    n: tl.constexpr, LOG_N: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state: k^T v, decayed until its end; reversed, to G: r^T gy, decayed since its start."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    w = _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n, K, BK)
    t = tl.arange(0, n)
    summed = (t[:, None] > t[None, :]) if REVERSED else (t[:, None] < t[None, :])
    factor = tl.trans(load_rows(x, begin, end, h, H, n, K, 0, BK) * _decay(summed, w, PRECISION))
    i = tl.arange(0, BK)
    to = chunk.to(tl.int64) * H + h
    tl.store(decays + to * K + i, tl.exp(tl.sum(w, 0)), mask=i < K)
    for column in tl.static_range(0, V, BV):
        yy = load_rows(y, begin, end, h, H, n, V, column, BV)
        S = dot(factor, yy, None, PRECISION, False, y.dtype.element_ty != tl.float32)
        j = column + tl.arange(0, BV)
        tl.store(states + to * K * V + i[:, None] * V + j[None, :], S, mask=(i < K)[:, None] & (j < V)[None, :])


@triton.jit(do_not_specialize=["T", "H"])
def scan_kernel(
    states, decays, initial, final, first, T,
    H, K: tl.constexpr, V: tl.constexpr, E: tl.constexpr, n: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Puts the state before each chunk in the place of what the chunk adds to it; reversed, the gradient after it."""
    sequence, h = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2) * E + tl.arange(0, E)
    inside = e < K * V
    begin, end = chunks_of(first, sequence, T, n)
    own = (sequence.to(tl.int64) * H + h) * K * V + e
    S = tl.zeros([E], tl.float32)
    if initial is not None:
        S = tl.load(initial + own, mask=inside, other=0.0)
    for step in tl.range(0, end - begin, num_stages=8):
        at = (end - 1 - step if REVERSED else begin + step) * H + h
        added = tl.load(states + at * K * V + e, mask=inside, other=0.0)
        decay = tl.load(decays + at * K + e // V, mask=inside, other=0.0)
        tl.store(states + at * K * V + e, S, mask=inside)
        S = decay * S + added
    tl.store(final + own, S, mask=inside)


@triton.jit
def _load_state(states, at, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    i = tl.arange(0, BK)
    j = column + tl.arange(0, BV)
    inside = (i < K)[:, None] & (j < V)[None, :]
    return tl.load(states + at * K * V + i[:, None] * V + j[None, :], mask=inside, other=0.0)  # (BK, BV)


@triton.jit
def _block_rows(row_stride, token_stride, begin, T, h, H, K: tl.constexpr, BK: tl.constexpr, n: tl.constexpr):
    """The first token of each block, and where its row begins in weights, in r and k, and in log_w."""
    first = begin + tl.arange(0, n // BLOCK) * BLOCK
    i = tl.arange(0, BK)[None, :]
    row = begin // tl.maximum(T, 1)
    decays = row * row_stride + (first - row * T)[:, None] * token_stride + h * K + i
    return first, (first * H + h) * BLOCK, (first[:, None] * H + h) * K + i, decays


@triton.jit(do_not_specialize=["T", "H"])
def weights_kernel(
    r, log_w, u, k, row_stride, token_stride, weights, bounds, T,
    H, K: tl.constexpr, BK: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    """What a token reads of the tokens of its block, its own bonus included: (tokens, H, BLOCK).

    Readers wait with the decays of the tokens that were passed on the way back, from the last key of a block to the
    first. A program takes all blocks of a chunk side by side.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    first, to, at, at_w = _block_rows(row_stride, token_stride, begin, T, h, H, K, BK, n)
    i = tl.arange(0, BK)
    bonus = tl.load(u + h * K + i, mask=i < K, other=0.0).to(tl.float32)[None, :]
    readers, places, exist = (), (), ()
    for j in tl.static_range(BLOCK - 1, -1, -1):
        exists = first + j < end
        inside = exists[:, None] & (i < K)[None, :]
        kk = tl.load(k + (at + j * H * K), mask=inside, other=0.0).to(tl.float32)
        rr = tl.load(r + (at + j * H * K), mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_w + (at_w + j * token_stride), mask=inside, other=0.0).to(tl.float32))
        waiting = ()
        for p in tl.static_range(0, BLOCK - 1 - j):
            tl.store(places[p] + j, tl.sum(readers[p] * kk, 1), mask=exist[p])
            waiting = waiting + (readers[p] * decay,)
        readers, places, exist = waiting + (rr,), places + (weights + (to + j * H * BLOCK),), exist + (exists,)
        tl.store(places[BLOCK - 1 - j] + j, tl.sum(rr * bonus * kk, 1), mask=exists)


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    r, log_w, k, v, weights, row_stride, token_stride, states, o, bounds, T,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    n: tl.constexpr, LOG_N: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk, from the state before it; reversed, gv from gy in the place of v, and G."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    EXACT: tl.constexpr = v.dtype.element_ty != tl.float32
    t = tl.arange(0, n)
    row, other = t[:, None], t[None, :]
    reader, key = (other, row) if REVERSED else (row, other)
    inside = (reader // BLOCK == key // BLOCK) & (reader >= key) & (begin + reader < end)
    within = tl.load(weights + ((begin + reader) * H + h) * BLOCK + key % BLOCK, mask=inside, other=0.0)
    w = _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n, K, BK)
    rr = load_rows(r, begin, end, h, H, n, K, 0, BK)
    kk = load_rows(k, begin, end, h, H, n, K, 0, BK)
    for shift in tl.static_range(LOG_BLOCK, LOG_N):
        factor = tl.where((row >> shift) % 2 == 1, rr, kk) * _decay(_between(row, other, shift), w, PRECISION)
        meet = ((reader >> shift) == (key >> shift) + 1) & ((key >> shift) % 2 == 0)
        within = tl.where(meet, dot(factor, tl.trans(factor), None, PRECISION), within)
    outside = (kk if REVERSED else rr) * _decay((row < other) if REVERSED else (row > other), w, PRECISION)
    at = chunk.to(tl.int64) * H + h
    for column in tl.static_range(0, V, BV):
        S = _load_state(states, at, column, K, V, BK, BV)
        y = dot(outside, S, None, PRECISION)
        y = dot(within, load_rows(v, begin, end, h, H, n, V, column, BV), y, PRECISION, False, EXACT)
        store_rows(o, y, begin, end, h, H, n, V, column, BV)


@triton.jit(do_not_specialize=["T", "H"])
def gradient_kernel(
    r, log_w, k, v, gy, row_stride, token_stride, states, gradients, xr, xw, xk, gweights, bounds, T,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    n: tl.constexpr, LOG_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of r, log_w and k of a chunk, from S before it, G after it, and from other blocks.

    `gweights` get the gradient of what `weights_kernel` makes. What crosses a token's decay is added up directly: the
    keys before it, up to where they are read from, and the readers after it.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    at = chunk.to(tl.int64) * H + h
    EXACT_V: tl.constexpr = v.dtype.element_ty != tl.float32
    EXACT_GY: tl.constexpr = gy.dtype.element_ty != tl.float32
    # What leads out of the chunk, and the gradient of the weights within, readers in rows and in columns.
    below = tl.zeros([n, n], tl.float32)
    above = tl.zeros([n, n], tl.float32)
    grr = tl.zeros([n, BK], tl.float32)
    gkk = tl.zeros([n, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for column in tl.static_range(0, V, BV):
        S = _load_state(states, at, column, K, V, BK, BV)
        G = _load_state(gradients, at, column, K, V, BK, BV)
        vv = load_rows(v, begin, end, h, H, n, V, column, BV)
        g = load_rows(gy, begin, end, h, H, n, V, column, BV)
        below = dot(g, tl.trans(vv), below, PRECISION, EXACT_GY, EXACT_V)
        above = dot(vv, tl.trans(g), above, PRECISION, EXACT_V, EXACT_GY)
        grr = dot(g, tl.trans(S), grr, PRECISION, EXACT_GY)
        gkk = dot(vv, tl.trans(G), gkk, PRECISION, EXACT_V)
        through += tl.sum(S * G, 1)
    t = tl.arange(0, n)
    row, other = t[:, None], t[None, :]
    inside = (row // BLOCK == other // BLOCK) & (row >= other) & (begin + row < end)
    tl.store(gweights + ((begin + row) * H + h) * BLOCK + other % BLOCK, below, mask=inside)
    passed = tl.where(row < other, above, below)
    w = _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n, K, BK)
    rr = load_rows(r, begin, end, h, H, n, K, 0, BK)
    kk = load_rows(k, begin, end, h, H, n, K, 0, BK)
    grr *= _decay(row > other, w, PRECISION)
    gkk *= _decay(row < other, w, PRECISION)
    gww = tl.broadcast_to((tl.exp(tl.sum(w, 0)) * through)[None, :], [n, BK])
    gww = dot((row < other).to(tl.float32), rr * grr, gww, PRECISION, True)
    gww = dot((row > other).to(tl.float32), kk * gkk, gww, PRECISION, True)
    for shift in tl.static_range(LOG_BLOCK, LOG_N):
        reads = (row >> shift) % 2 == 1
        meet = (row >> shift) == ((other >> shift) ^ 1)
        own = tl.where(reads, rr, kk)
        decay = _decay(_between(row, other, shift), w, PRECISION)
        x = decay * dot(tl.where(meet, passed, 0.0), own * decay, None, PRECISION)
        grr += tl.where(reads, x, 0.0)
        gkk += tl.where(reads, 0.0, x)
        gww = dot(_between(other, row, shift).to(tl.float32), own * x, gww, PRECISION, True)
    store_rows(xr, grr, begin, end, h, H, n, K, 0, BK)
    store_rows(xk, gkk, begin, end, h, H, n, K, 0, BK)
    store_rows(xw, gww, begin, end, h, H, n, K, 0, BK)


@triton.jit(do_not_specialize=["T", "H"])
def key_gradient_kernel(
    r, log_w, u, k, gweights, xw, xk, row_stride, token_stride, gw, gu, gk, bounds, T,
    H, K: tl.constexpr, BK: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    """Adds what readers of a block pass to its keys to the gradients of k and log_w; a chunk's part of u's."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    first, to, at, at_w = _block_rows(row_stride, token_stride, begin, T, h, H, K, BK, n)
    i = tl.arange(0, BK)
    bonus = tl.load(u + h * K + i, mask=i < K, other=0.0).to(tl.float32)[None, :]
    guu = tl.zeros([n // BLOCK, BK], tl.float32)
    # As in `weights_kernel`; `crossed` is what crossed the decays of the tokens so far.
    readers, crossed, places, exist = (), (), (), ()
    for j in tl.static_range(BLOCK - 1, -1, -1):
        exists = first + j < end
        inside = exists[:, None] & (i < K)[None, :]
        kk = tl.load(k + (at + j * H * K), mask=inside, other=0.0).to(tl.float32)
        rr = tl.load(r + (at + j * H * K), mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_w + (at_w + j * token_stride), mask=inside, other=0.0).to(tl.float32))
        # What key j gets from the readers behind each token.
        x = tl.zeros([n // BLOCK, BK], tl.float32)
        waiting, crossing = (), ()
        for p in tl.static_range(0, BLOCK - 1 - j):
            crossing = crossing + (crossed[p] + kk * x,)
            x += tl.load(places[p] + j, mask=exist[p], other=0.0)[:, None] * readers[p]
            waiting = waiting + (readers[p] * decay,)
        past = tl.load(xw + (at + j * H * K), mask=inside, other=0.0)
        readers, crossed = waiting + (rr,), crossing + (past,)
        places, exist = places + (gweights + (to + j * H * BLOCK),), exist + (exists,)
        own = tl.load(places[BLOCK - 1 - j] + j, mask=exists, other=0.0)[:, None] * rr
        guu += own * kk
        x += tl.load(xk + (at + j * H * K), mask=inside, other=0.0) + bonus * own
        tl.store(gk + (at + j * H * K), x.to(gk.dtype.element_ty), mask=inside)
    tl.store(gu + (chunk.to(tl.int64) * H + h) * K + i, tl.sum(guu, 0), mask=i < K)
    for j in tl.static_range(0, BLOCK):
        inside = exist[BLOCK - 1 - j][:, None] & (i < K)[None, :]
        tl.store(gw + (at + j * H * K), crossed[BLOCK - 1 - j].to(gw.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def reader_gradient_kernel(
    log_w, u, k, gweights, xr, row_stride, token_stride, gr, bounds, T,
    H, K: tl.constexpr, BK: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    """Adds what the keys of a block pass to its readers to the gradient of r; here the keys wait."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    first, to, at, at_w = _block_rows(row_stride, token_stride, begin, T, h, H, K, BK, n)
    i = tl.arange(0, BK)
    bonus = tl.load(u + h * K + i, mask=i < K, other=0.0).to(tl.float32)[None, :]
    keys = ()
    for t in tl.static_range(0, BLOCK):
        exists = first + t < end
        inside = exists[:, None] & (i < K)[None, :]
        kk = tl.load(k + (at + t * H * K), mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_w + (at_w + t * token_stride), mask=inside, other=0.0).to(tl.float32))
        place = gweights + (to + t * H * BLOCK)
        own = tl.load(place + t, mask=exists, other=0.0)[:, None]
        x = tl.load(xr + (at + t * H * K), mask=inside, other=0.0) + bonus * kk * own
        waiting = ()
        for p in tl.static_range(0, t):
            x += tl.load(place + p, mask=exists, other=0.0)[:, None] * keys[p]
            waiting = waiting + (keys[p] * decay,)
        keys = waiting + (kk,)
        tl.store(gr + (at + t * H * K), x.to(gr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def recurrent_kernel(
    r, log_w, u, k, v, row_stride, token_stride, initial, o, final, cu_seqlens, T,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The definition, for BV value channels of a head."""
    sequence, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BK)
    j = tl.program_id(2) * BV + tl.arange(0, BV)
    row, begin, end = sequence, 0, T
    if cu_seqlens is not None:
        row = 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), T).to(tl.int32)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1), T).to(tl.int32)
    inside = (i < K)[:, None] & (j < V)[None, :]
    own = (sequence * H + h) * K * V + i[:, None] * V + j[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        S = tl.load(initial + own, mask=inside, other=0.0)
    bonus = tl.load(u + h * K + i, mask=i < K, other=0.0).to(tl.float32)
    for t in range(begin, end):
        token = (row * T + t) * H + h
        w = tl.load(log_w + row * row_stride + t * token_stride + h * K + i, mask=i < K, other=0.0).to(tl.float32)
        rr = tl.load(r + token * K + i, mask=i < K, other=0.0).to(tl.float32)
        kk = tl.load(k + token * K + i, mask=i < K, other=0.0).to(tl.float32)
        vv = tl.load(v + token * V + j, mask=j < V, other=0.0).to(tl.float32)
        kv = kk[:, None] * vv[None, :]
        y = tl.sum(rr[:, None] * (S + bonus[:, None] * kv), 0)
        tl.store(o + token * V + j, y.to(o.dtype.element_ty), mask=j < V)
        S = tl.exp(w)[:, None] * S + kv
    tl.store(final + own, S, mask=inside)
