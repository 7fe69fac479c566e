"""The operator wkv6 in Triton: by chunks, all of them at a time, or token by token where there are few.

Letters: T tokens, H heads, K key and V value channels of a head, n tokens of a chunk; S the state before a chunk,
(K, V); y the output, u the bonus; g* gradients, gy that of the output, G that of the state after a chunk.

Token i reads what token j < i wrote, weighted by the decays of the tokens between them. Such a weight is the product of
two exponentials of sums of log_w, both at most 1, which meet between two blocks of tokens: blocks of n / 2 give the
weights between the halves of a chunk, blocks of n / 4 those between the halves of the halves, and so on down to single
tokens. No sum is ever the difference of two, so nothing overflows and nothing cancels, whatever the decay.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Chunks, chunk_tokens, chunks_of, cut, load_rows, padded, precision, store_rows, warps

# exp() of less is zero in float32; sums of log_w stay finite.
LOWEST = tl.constexpr(-128.0)

# Up to this many tokens a call runs token by token.
FEW_TOKENS = 16
MAX_HEAD_SIZE = 128

# Elements of a state that one program of `scan_kernel` carries along.
SCANNED = 512


@dataclass(frozen=True)
class Configuration:
    """Tokens of a chunk, value channels that a program takes at a time, threads of a program."""

    n: int
    value_block: int
    threads: int


# By padded head size.
CONFIGURATIONS = {
    16: Configuration(n=32, value_block=16, threads=128),
    32: Configuration(n=32, value_block=32, threads=256),
    64: Configuration(n=32, value_block=64, threads=256),
    128: Configuration(n=16, value_block=32, threads=256),
}


@triton.jit
def _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """log_w of a chunk; zeros, which leave a state as it is, beyond its end.  # (n, BK)"""
    row = begin // T
    t = begin + tl.arange(0, n)
    i = tl.arange(0, BK)
    at = log_w + row * row_stride + (t - row * T)[:, None] * token_stride + (h * K + i)[None, :]
    x = tl.load(at, mask=(t < end)[:, None] & (i < K)[None, :], other=0.0).to(tl.float32)
    # Written so that NaN stays.
    return tl.where(x < LOWEST, LOWEST, x)


@triton.jit
def _in_block(n: tl.constexpr, shift):
    """(t, s): s comes before t in the same block of 2^shift tokens; and the transpose.  # (n, n) twice"""
    t = tl.arange(0, n)
    same = (t[:, None] >> shift) == (t[None, :] >> shift)
    return (same & (t[:, None] > t[None, :])).to(tl.float32), (same & (t[:, None] < t[None, :])).to(tl.float32)


@triton.jit
def _reads_block_before(n: tl.constexpr, shift):
    """(i, j): i lies in the second, j in the first half of the same 2^(shift + 1) tokens.  # (n, n)"""
    i = tl.arange(0, n)[:, None]
    j = tl.arange(0, n)[None, :]
    return ((i >> (shift + 1)) == (j >> (shift + 1))) & ((i >> shift) > (j >> shift))


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
    before, after = _in_block(n, LOG_N)
    reach = tl.exp(tl.dot(before if REVERSED else after, w, input_precision=PRECISION))
    factor = tl.trans(load_rows(x, begin, end, h, H, n, K, 0, BK) * reach)
    i = tl.arange(0, BK)
    to = chunk.to(tl.int64) * H + h
    tl.store(decays + to * K + i, tl.exp(tl.sum(w, 0)), mask=i < K)
    for column in tl.static_range(0, V, BV):
        S = tl.dot(factor, load_rows(y, begin, end, h, H, n, V, column, BV), input_precision=PRECISION)
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
    for step in tl.range(0, end - begin, num_stages=4):
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


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    r, log_w, u, k, v, row_stride, token_stride, states, o, bounds, T,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    n: tl.constexpr, LOG_N: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk, from the state before it; reversed, gv from gy in the place of v, and G."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    w = _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n, K, BK)
    rr = load_rows(r, begin, end, h, H, n, K, 0, BK)
    kk = load_rows(k, begin, end, h, H, n, K, 0, BK)
    i = tl.arange(0, BK)
    bonus = tl.load(u + h * K + i, mask=i < K, other=0.0).to(tl.float32)
    t = tl.arange(0, n)
    own = tl.sum(rr * bonus[None, :] * kk, 1)
    weights = tl.where(t[:, None] == t[None, :], own[:, None], 0.0)
    for shift in range(0, LOG_N):
        before, after = _in_block(n, shift)
        readers = rr * tl.exp(tl.dot(before, w, input_precision=PRECISION))
        keys = kk * tl.exp(tl.dot(after, w, input_precision=PRECISION))
        product = tl.dot(readers, tl.trans(keys), input_precision=PRECISION)
        weights += tl.where(_reads_block_before(n, shift), product, 0.0)
    before, after = _in_block(n, LOG_N)
    if REVERSED:
        weights = tl.trans(weights)
        outside = kk * tl.exp(tl.dot(after, w, input_precision=PRECISION))
    else:
        outside = rr * tl.exp(tl.dot(before, w, input_precision=PRECISION))
    at = chunk.to(tl.int64) * H + h
    for column in tl.static_range(0, V, BV):
        S = _load_state(states, at, column, K, V, BK, BV)
        y = tl.dot(outside, S, input_precision=PRECISION)
        y = tl.dot(weights, load_rows(v, begin, end, h, H, n, V, column, BV), y, input_precision=PRECISION)
        store_rows(o, y, begin, end, h, H, n, V, column, BV)


@triton.jit(do_not_specialize=["T", "H"])
def gradient_kernel(
    r, log_w, u, k, v, gy, row_stride, token_stride, states, gradients, gr, gw, gu, gk, bounds, T,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    n: tl.constexpr, LOG_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of r, log_w and k of a chunk, and its part of u's, from S before it and G after it.

    Blocks of one size pass `xr` to the readers, `xk` to the keys. What crosses a token's decay is added up directly:
    the keys before it in its block, where these are read from outside, and the readers after it.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    at = chunk.to(tl.int64) * H + h
    # What leads out of the chunk, and the gradient of the weights within.
    gweights = tl.zeros([n, n], tl.float32)
    xr = tl.zeros([n, BK], tl.float32)
    xk = tl.zeros([n, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for column in tl.static_range(0, V, BV):
        S = _load_state(states, at, column, K, V, BK, BV)
        G = _load_state(gradients, at, column, K, V, BK, BV)
        vv = load_rows(v, begin, end, h, H, n, V, column, BV)
        g = load_rows(gy, begin, end, h, H, n, V, column, BV)
        gweights = tl.dot(g, tl.trans(vv), gweights, input_precision=PRECISION)
        xr = tl.dot(g, tl.trans(S), xr, input_precision=PRECISION)
        xk = tl.dot(vv, tl.trans(G), xk, input_precision=PRECISION)
        through += tl.sum(S * G, 1)
    w = _load_decays(log_w, row_stride, token_stride, begin, end, T, h, n, K, BK)
    rr = load_rows(r, begin, end, h, H, n, K, 0, BK)
    kk = load_rows(k, begin, end, h, H, n, K, 0, BK)
    i = tl.arange(0, BK)
    bonus = tl.load(u + h * K + i, mask=i < K, other=0.0).to(tl.float32)
    t = tl.arange(0, n)
    c = tl.sum(tl.where(t[:, None] == t[None, :], gweights, 0.0), 1)[:, None]
    tl.store(gu + at * K + i, tl.sum(rr * kk * c, 0), mask=i < K)
    grr = bonus[None, :] * kk * c
    gkk = bonus[None, :] * rr * c
    gww = tl.broadcast_to((tl.exp(tl.sum(w, 0)) * through)[None, :], [n, BK])
    for level in range(0, LOG_N + 1):
        before, after = _in_block(n, LOG_N - level)
        passed = tl.where(_reads_block_before(n, LOG_N - level), gweights, 0.0)
        since = tl.exp(tl.dot(before, w, input_precision=PRECISION))
        xk = tl.dot(tl.trans(passed), rr * since, xk, input_precision=PRECISION)
        until = tl.exp(tl.dot(after, w, input_precision=PRECISION))
        xr = since * tl.dot(passed, kk * until, xr, input_precision=PRECISION)
        xk *= until
        grr += xr
        gkk += xk
        gww = tl.dot(after, rr * xr, gww, input_precision=PRECISION)
        gww = tl.dot(before, kk * xk, gww, input_precision=PRECISION)
        xr = tl.zeros([n, BK], tl.float32)
        xk = tl.zeros([n, BK], tl.float32)
    store_rows(gr, grr, begin, end, h, H, n, K, 0, BK)
    store_rows(gk, gkk, begin, end, h, H, n, K, 0, BK)
    store_rows(gw, gww, begin, end, h, H, n, K, 0, BK)


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


class _Call:
    """Rows laid out for the kernels, and their sizes.

    A decay that rows or tokens share has stride 0 there; so has one that the caller expanded.
    """

    def __init__(self, r: Tensor, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        B, self.T, H, K = r.shape
        V = v.shape[3]
        if log_w.stride()[2:] != (K, 1):
            log_w = log_w.contiguous()
        self.r, self.u, self.k, self.v = (x.contiguous() for x in (r, u, k, v))
        self.log_w = log_w
        self.strides = [log_w.stride(i) if log_w.shape[i] > 1 else 0 for i in (0, 1)]
        self.cu_seqlens, self.B = None if cu_seqlens is None else cu_seqlens.contiguous(), B
        self.H, self.K, self.V = H, K, V
        self.sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if K > MAX_HEAD_SIZE:
            raise ValueError(f"r must have heads of at most {MAX_HEAD_SIZE} channels on {r.device.type}, not {K}")
        self.config = CONFIGURATIONS[padded(K)]
        self.warps = warps(self.config.threads)
        self.sizes = {"H": H, "K": K, "V": V, "BK": padded(K)}

    def chunked(self) -> tuple[Chunks, dict]:
        """The chunks, and what the kernels that work on them need to know."""
        n = self.config.n
        options = {"n": n, "LOG_N": n.bit_length() - 1, "PRECISION": precision()}
        options["BV"] = min(self.config.value_block, padded(self.V))
        return cut(self.cu_seqlens, self.B, self.T, n), {**self.sizes, **options}

    def states(self, chunks: Chunks, options: dict, x, y, initial, final, reverse: bool) -> Tensor:
        """The states before all chunks, or the gradients after them; `final` gets what comes out in the end."""
        H, K, V, n = self.H, self.K, self.V, options["n"]
        states = self.r.new_empty((chunks.count, H, K, V), dtype=torch.float32)
        decays = self.r.new_empty((chunks.count, H, K), dtype=torch.float32)
        if chunks.count > 0:
            add_up_kernel[chunks.count, H](
                x, y, self.log_w, *self.strides, states, decays, chunks.bounds, self.T, **options, REVERSED=reverse,
                num_warps=4,
            )  # fmt: skip
        grid = chunks.sequences, H, triton.cdiv(K * V, SCANNED)
        scan_kernel[grid](
            states, decays, initial, final, chunks.first, self.T, H, K, V, SCANNED, n, REVERSED=reverse, num_warps=4
        )
        return states


def forward(r, log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """o and the final state; arguments as in the operator."""
    call = _Call(r, log_w, u, k, v, cu_seqlens)
    o = torch.empty_like(call.v)
    final = call.r.new_empty((call.sequences, call.H, call.K, call.V), dtype=torch.float32)
    if final.numel() == 0:
        return o, final
    initial = None if state is None else state.contiguous()
    rows = call.r, call.log_w, call.u, call.k, call.v, *call.strides
    if call.T <= FEW_TOKENS:
        BV = 16
        grid = call.sequences, call.H, triton.cdiv(call.V, BV)
        recurrent_kernel[grid](*rows, initial, o, final, call.cu_seqlens, call.T, **call.sizes, BV=BV, num_warps=2)
        return o, final
    chunks, options = call.chunked()
    states = call.states(chunks, options, call.k, call.v, initial, final, reverse=False)
    output_kernel[chunks.count, call.H](
        *rows, states, o, chunks.bounds, call.T, **options, REVERSED=False, num_warps=call.warps
    )
    return o, final


def backward(grad_o, grad_final_state, r, log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, ...]:
    """The gradients of r, log_w, u, k, v and state; arguments as in the operator."""
    call = _Call(r, log_w, u, k, v, cu_seqlens)
    chunks, options = call.chunked()
    gy = torch.zeros_like(call.v) if grad_o is None else grad_o.contiguous()
    gr, gk, gv = (torch.empty_like(x) for x in (call.r, call.k, call.v))
    shared = log_w.shape != r.shape
    gw = call.r.new_empty(r.shape, dtype=torch.float32 if shared else log_w.dtype)
    gu = call.r.new_empty((chunks.count, call.H, call.K), dtype=torch.float32)
    grad_state = call.r.new_empty((call.sequences, call.H, call.K, call.V), dtype=torch.float32)
    if grad_state.numel() > 0:
        initial, gradient = (None if x is None else x.contiguous() for x in (state, grad_final_state))
        scratch = torch.empty_like(grad_state)
        states = call.states(chunks, options, call.k, call.v, initial, scratch, reverse=False)
        gradients = call.states(chunks, options, call.r, gy, gradient, grad_state, reverse=True)
        if chunks.count > 0:
            programs, rest = (chunks.count, call.H), (chunks.bounds, call.T)
            rows = call.r, call.log_w, call.u, call.k
            output_kernel[programs](
                *rows, gy, *call.strides, gradients, gv, *rest, **options, REVERSED=True, num_warps=call.warps
            )
            results = gr, gw, gu, gk
            gradient_kernel[programs](
                *rows, call.v, gy, *call.strides, states, gradients, *results, *rest, **options,
                num_warps=call.warps,
            )  # fmt: skip
    if shared:
        axes = [i for i in (0, 1) if log_w.shape[i] == 1]
        gw = gw.sum(axes, keepdim=True).to(log_w.dtype)
    return gr, gw, gu.sum(0).to(u.dtype), gk, gv, grad_state
