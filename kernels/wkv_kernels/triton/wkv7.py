"""The operator wkv7 of RWKV-7 in Triton: chunks of n tokens in parallel, or token by token where there are few.

Letters: as in wkv_kernels/wkv7.py, and n tokens of a chunk; c sums of log_w from the chunk's first token, e the same
without the token itself, m that of the middle token, the reference of exponents. A chunk changes the state by
S' = M S + N and puts out P V + Q S, all of which kernels/README.md derives. Needs log_w >= -exp(-1/2), but for the
forward pass of few tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    check_head_size,
    chunk_tokens,
    chunks_of,
    cut,
    dot,
    exact_dot,
    is_coarse,
    load_rows,
    padded,
    precision,
    store_rows,
    unit_lower_inverse,
    warps,
)

# Up to this many tokens a call runs token by token.
FEW_TOKENS = 32


@dataclass(frozen=True)
class Configuration:
    """Tokens of a chunk, value channels in a turn of the loops, and threads of a program; of a program of the scan:
    value channels, threads, and chunks that are under way.

    What takes fewest instructions on sm_90 without spilling much, see kernels/triton_table.py.
    """

    n: int
    turn: int
    threads: int
    scan_columns: int
    scan_threads: int
    scan_stages: int


# By padded head size: of bfloat16 rows, and of rows whose products are as exact as float32.
CONFIGURATIONS = {
    16: Configuration(n=32, turn=16, threads=64, scan_columns=16, scan_threads=64, scan_stages=3),
    32: Configuration(n=32, turn=32, threads=64, scan_columns=16, scan_threads=64, scan_stages=3),
    64: Configuration(n=32, turn=32, threads=128, scan_columns=32, scan_threads=128, scan_stages=3),
    128: Configuration(n=16, turn=16, threads=128, scan_columns=16, scan_threads=256, scan_stages=2),
}
EXACT_CONFIGURATIONS = {
    16: Configuration(n=16, turn=16, threads=64, scan_columns=16, scan_threads=64, scan_stages=3),
    32: Configuration(n=16, turn=32, threads=64, scan_columns=16, scan_threads=64, scan_stages=3),
    64: Configuration(n=16, turn=16, threads=128, scan_columns=32, scan_threads=128, scan_stages=3),
    128: Configuration(n=16, turn=16, threads=256, scan_columns=16, scan_threads=256, scan_stages=2),
}
# Value channels of a program of those kernels that share a chunk.
COLUMNS = 64


@triton.jit(do_not_specialize=["T", "H"])
def recurrent_kernel(
    r, log_w, k, v, a, b, state, o, final_state, cu_seqlens, T, H, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The definition, for BV value channels of one head of one sequence."""
    sequence, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i, j = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = i < K, j < V
    at = (tl.program_id(0).to(tl.int64) * K + i[:, None]) * V + j[None, :]
    inside = in_k[:, None] & in_v[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S = tl.load(state + at, mask=inside, other=0.0)
    if cu_seqlens is None:
        begin, end = sequence * T, sequence * T + T
    else:
        begin = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), T)
    for t in range(begin, end):
        key, value = (t * H + h) * K + i, (t * H + h) * V + j
        d = tl.exp(tl.load(log_w + key, mask=in_k, other=0.0).to(tl.float32))
        k_t = tl.load(k + key, mask=in_k, other=0.0).to(tl.float32)
        a_t = tl.load(a + key, mask=in_k, other=0.0).to(tl.float32)
        b_t = tl.load(b + key, mask=in_k, other=0.0).to(tl.float32)
        r_t = tl.load(r + key, mask=in_k, other=0.0).to(tl.float32)
        v_t = tl.load(v + value, mask=in_v, other=0.0).to(tl.float32)
        sa = tl.sum(a_t[:, None] * S, 0)
        S = d[:, None] * S + b_t[:, None] * sa[None, :] + k_t[:, None] * v_t[None, :]
        tl.store(o + value, tl.sum(r_t[:, None] * S, 0).to(o.dtype.element_ty), mask=in_v)
    tl.store(final_state + at, S, mask=inside)


@triton.jit
def _load_decays(log_w, begin, end, h, H, n: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """log_w of a chunk and c, (n, BK); their sum and m, (BK,)."""
    w = load_rows(log_w, begin, end, h, H, n, K, 0, BK)
    c = tl.cumsum(w, 0)
    return w, c, tl.sum(w, 0), tl.sum(tl.where((tl.arange(0, n) == n // 2)[:, None], c, 0.0), 0)


@triton.jit(do_not_specialize=["T", "H"])
def prepare_kernel(
    r, log_w, k, v, a, b, grad_o, bounds, M, N, Q, P, T, H, K: tl.constexpr, V: tl.constexpr, n: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, PRECISION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: M (BK, BK), N (BK, VP); forward Q (n, BK) and P (n, n), backward Q^T grad_o (BK, VP) and
    the inverse X in their place."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    head = chunk.to(tl.int64) * H + h
    t, i = tl.arange(0, n), tl.arange(0, BK)
    below, not_above = t[:, None] > t[None, :], t[:, None] >= t[None, :]

    w, c, total, m = _load_decays(log_w, begin, end, h, H, n, K, BK)
    to_end, from_start = tl.exp(total - m), tl.exp(m)
    Am = load_rows(a, begin, end, h, H, n, K, 0, BK) * tl.exp(c - w - m[None, :])
    Bm = load_rows(b, begin, end, h, H, n, K, 0, BK) * tl.exp(m[None, :] - c)
    inverse = tl.where(below, exact_dot(Am, tl.trans(Bm), None, PRECISION), 0.0)
    inverse = unit_lower_inverse(inverse, n, PRECISION)
    W = dot(inverse, Am, None, PRECISION)
    carried = dot(tl.trans(Bm), W, None, PRECISION) * to_end[:, None] * from_start[None, :]
    carried += tl.where(i[:, None] == i[None, :], tl.exp(total)[:, None], 0.0)
    tl.store(M + head * BK * BK + i[:, None] * BK + i[None, :], carried)

    Rm = load_rows(r, begin, end, h, H, n, K, 0, BK) * tl.exp(c - m[None, :])
    rb = tl.where(not_above, dot(Rm, tl.trans(Bm), None, PRECISION), 0.0)
    q = dot(rb, W, Rm, PRECISION) * from_start[None, :]
    Km = load_rows(k, begin, end, h, H, n, K, 0, BK) * tl.exp(m[None, :] - c)
    ak = tl.where(below, dot(Am, tl.trans(Km), None, PRECISION), 0.0)
    p = dot(inverse, ak, None, PRECISION)
    if BACKWARD:
        tl.store(P + head * n * n + t[:, None] * n + t[None, :], inverse)
    else:
        tl.store(Q + head * n * BK + t[:, None] * BK + i[None, :], q)
        rk = tl.where(not_above, dot(Rm, tl.trans(Km), None, PRECISION), 0.0)
        tl.store(P + head * n * n + t[:, None] * n + t[None, :], dot(rb, p, rk, PRECISION))
    keys = tl.trans(dot(tl.trans(p), Bm, Km, PRECISION)) * to_end[:, None]
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        new = dot(keys, load_rows(v, begin, end, h, H, n, V, first, BV), None, PRECISION)
        tl.store(N + (head * BK + i[:, None]) * VP + j[None, :], new)
        if BACKWARD:
            read = dot(tl.trans(q), load_rows(grad_o, begin, end, h, H, n, V, first, BV), None, PRECISION)
            tl.store(Q + (head * BK + i[:, None]) * VP + j[None, :], read)


@triton.jit(do_not_specialize=["T", "H"])
def scan_kernel(
    M, N, start, state, final_state, first, T, H, K: tl.constexpr, V: tl.constexpr, n: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, VP: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S' = M S + N from chunk to chunk, BV value channels of one head; `start` gets what S is before each.

    REVERSE goes from the last chunk to the first by M^T: S is then the gradient of the state.
    """
    sequence, h = tl.program_id(0) // H, tl.program_id(0) % H
    i, j = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    at = (tl.program_id(0).to(tl.int64) * K + i[:, None]) * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S = tl.load(state + at, mask=inside, other=0.0)
    begin, end = chunks_of(first, sequence, T, n)
    for chunk in range(begin, end):
        head = (begin + end - 1 - chunk if REVERSE else chunk) * H + h
        here = (head * BK + i[:, None]) * VP + j[None, :]
        carried = tl.load(M + head * BK * BK + i[:, None] * BK + i[None, :])
        new = tl.load(N + here)
        tl.store(start + here, S)
        S = exact_dot(tl.trans(carried) if REVERSE else carried, S, new, PRECISION)
    tl.store(final_state + at, S, mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    v, Q, P, start, o, bounds, T, H, V: tl.constexpr, n: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = P V + Q S of one chunk and head."""
    chunk, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    begin, end = chunk_tokens(bounds, chunk, T, n)
    head = chunk.to(tl.int64) * H + h
    t, i, j = tl.arange(0, n), tl.arange(0, BK), column + tl.arange(0, BV)
    S = tl.load(start + (head * BK + i[:, None]) * VP + j[None, :])
    o_ = dot(tl.load(Q + head * n * BK + t[:, None] * BK + i[None, :]), S, None, PRECISION)
    p = tl.load(P + head * n * n + t[:, None] * n + t[None, :])
    o_ = dot(p, load_rows(v, begin, end, h, H, n, V, column, BV), o_, PRECISION)
    store_rows(o, o_, begin, end, h, H, n, V, column, BV)


@triton.jit(do_not_specialize=["T", "H"])
def value_gradient_kernel(
    r, log_w, k, v, a, b, grad_o, X, start, G, bounds, U, Z, grad_v, T, H, K: tl.constexpr, V: tl.constexpr,
    n: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: U, the rows a S of its tokens, Z = X^T dU, each (n, VP), and the gradient of v."""
    chunk, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    begin, end = chunk_tokens(bounds, chunk, T, n)
    head = chunk.to(tl.int64) * H + h
    t, i, j = tl.arange(0, n), tl.arange(0, BK), column + tl.arange(0, BV)
    below, not_above = t[:, None] > t[None, :], t[:, None] >= t[None, :]

    w, c, total, m = _load_decays(log_w, begin, end, h, H, n, K, BK)
    to_middle = tl.exp(m[None, :] - c)
    here = (head * BK + i[:, None]) * VP + j[None, :]
    Am = load_rows(a, begin, end, h, H, n, K, 0, BK) * tl.exp(c - w - m[None, :])
    Km = load_rows(k, begin, end, h, H, n, K, 0, BK) * to_middle
    V_ = load_rows(v, begin, end, h, H, n, V, column, BV)
    ak = tl.where(below, dot(Am, tl.trans(Km), None, PRECISION), 0.0)
    u = dot(ak, V_, None, PRECISION)
    u = dot(Am, tl.load(start + here) * tl.exp(m)[:, None], u, PRECISION)
    inverse = tl.load(X + head * n * n + t[:, None] * n + t[None, :])
    tl.store(U + (head * n + t[:, None]) * VP + j[None, :], dot(inverse, u, None, PRECISION))

    Gm = tl.load(G + here) * tl.exp(total - m)[:, None]
    Rm = load_rows(r, begin, end, h, H, n, K, 0, BK) * tl.exp(c - m[None, :])
    rk = tl.where(not_above, dot(Rm, tl.trans(Km), None, PRECISION), 0.0)
    grad = load_rows(grad_o, begin, end, h, H, n, V, column, BV)
    gv = dot(tl.trans(rk), grad, None, PRECISION)
    gv = dot(Km, Gm, gv, PRECISION)
    Bm = load_rows(b, begin, end, h, H, n, K, 0, BK) * to_middle
    rb = tl.where(not_above, dot(Rm, tl.trans(Bm), None, PRECISION), 0.0)
    z = dot(tl.trans(rb), grad, None, PRECISION)
    z = dot(Bm, Gm, z, PRECISION)
    z = dot(tl.trans(inverse), z, None, PRECISION)
    tl.store(Z + (head * n + t[:, None]) * VP + j[None, :], z)
    gv = dot(tl.trans(ak), z, gv, PRECISION)
    store_rows(grad_v, gv, begin, end, h, H, n, V, column, BV)


@triton.jit(do_not_specialize=["T", "H"])
def key_gradient_kernel(
    r, log_w, k, v, a, b, grad_o, start, G, bounds, U, Z, grad_r, grad_w, grad_k, grad_a, grad_b, T, H,
    K: tl.constexpr, V: tl.constexpr, n: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: the gradients of r, log_w, k, a and b."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    head = chunk.to(tl.int64) * H + h
    t, i = tl.arange(0, n), tl.arange(0, BK)
    below, not_above = t[:, None] > t[None, :], t[:, None] >= t[None, :]

    _, c, total, m = _load_decays(log_w, begin, end, h, H, n, K, BK)
    # Exponents from here on: of the token, from the middle.
    c -= m[None, :]

    # What tokens read from the past: r and a.
    gr = tl.zeros([n, BK], tl.float32)
    ga = gr
    ab = tl.zeros([n, n], tl.float32)
    ak, rb, rk = ab, ab, ab
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        S = tl.trans(tl.load(start + (head * BK + i[:, None]) * VP + j[None, :])) * tl.exp(m)[None, :]
        grad = load_rows(grad_o, begin, end, h, H, n, V, first, BV)
        gr = dot(grad, S, gr, PRECISION)
        z = tl.load(Z + (head * n + t[:, None]) * VP + j[None, :])
        ga = dot(z, S, ga, PRECISION)
        u = tl.trans(tl.load(U + (head * n + t[:, None]) * VP + j[None, :]))
        ab = dot(z, u, ab, PRECISION)
        rb = dot(grad, u, rb, PRECISION)
        V_ = tl.trans(load_rows(v, begin, end, h, H, n, V, first, BV))
        ak = dot(z, V_, ak, PRECISION)
        rk = dot(grad, V_, rk, PRECISION)
    ab, ak = tl.where(below, ab, 0.0), tl.where(below, ak, 0.0)
    rb, rk = tl.where(not_above, rb, 0.0), tl.where(not_above, rk, 0.0)
    B_ = load_rows(b, begin, end, h, H, n, K, 0, BK) * tl.exp(-c)
    gr = dot(rb, B_, gr, PRECISION)
    ga = dot(ab, B_, ga, PRECISION)
    K_ = load_rows(k, begin, end, h, H, n, K, 0, BK) * tl.exp(-c)
    gr = dot(rk, K_, gr, PRECISION) * tl.exp(c)
    store_rows(grad_r, gr, begin, end, h, H, n, K, 0, BK)
    gr *= load_rows(r, begin, end, h, H, n, K, 0, BK)
    ga = dot(ak, K_, ga, PRECISION) * tl.exp(c - load_rows(log_w, begin, end, h, H, n, K, 0, BK))
    store_rows(grad_a, ga, begin, end, h, H, n, K, 0, BK)
    ga *= load_rows(a, begin, end, h, H, n, K, 0, BK)
    # c of a token gathers from r of the same token and from a of the next.
    later = tl.trans(not_above).to(tl.float32)
    gw = exact_dot(later, gr + ga, None, PRECISION, True) - ga

    # What tokens leave for the future: k and b.
    gk = tl.zeros([n, BK], tl.float32)
    gb = gk
    g_total = tl.zeros([BK], tl.float32)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        D = tl.load(G + (head * BK + i[:, None]) * VP + j[None, :])
        g_total += tl.sum(D * tl.load(start + (head * BK + i[:, None]) * VP + j[None, :]), 1)
        D = tl.trans(D)
        gk = dot(load_rows(v, begin, end, h, H, n, V, first, BV), D, gk, PRECISION)
        gb = dot(tl.load(U + (head * n + t[:, None]) * VP + j[None, :]), D, gb, PRECISION)
    gk *= tl.exp(total - m)[None, :]
    gb *= tl.exp(total - m)[None, :]
    K_ = load_rows(k, begin, end, h, H, n, K, 0, BK) * tl.exp(-c)
    B_ = load_rows(b, begin, end, h, H, n, K, 0, BK) * tl.exp(-c)
    gw += (tl.sum(K_ * gk + B_ * gb, 0) + tl.exp(total) * g_total)[None, :]
    A_ = load_rows(a, begin, end, h, H, n, K, 0, BK)
    A_ *= tl.exp(c - load_rows(log_w, begin, end, h, H, n, K, 0, BK))
    gk = dot(tl.trans(ak), A_, gk, PRECISION)
    gb = dot(tl.trans(ab), A_, gb, PRECISION)
    R_ = load_rows(r, begin, end, h, H, n, K, 0, BK) * tl.exp(c)
    gk = dot(tl.trans(rk), R_, gk, PRECISION) * tl.exp(-c)
    gb = dot(tl.trans(rb), R_, gb, PRECISION) * tl.exp(-c)
    store_rows(grad_k, gk, begin, end, h, H, n, K, 0, BK)
    store_rows(grad_b, gb, begin, end, h, H, n, K, 0, BK)
    gk *= load_rows(k, begin, end, h, H, n, K, 0, BK)
    gb *= load_rows(b, begin, end, h, H, n, K, 0, BK)
    gw -= exact_dot(later, gk + gb, None, PRECISION, True)
    store_rows(grad_w, gw, begin, end, h, H, n, K, 0, BK)


class _Call:
    """Sizes of a call, its chunks, and the arguments that its kernels share."""

    def __init__(self, rows: list[Tensor], cu_seqlens: Tensor | None) -> None:
        r, _, k, v, a, b = rows
        B, T, self.H, self.K = r.shape
        self.V = v.shape[3]
        self.BK = padded(self.K)
        products = precision(r, k, v, a, b)
        self.config = (CONFIGURATIONS if is_coarse(products) else EXACT_CONFIGURATIONS)[self.BK]
        self.n = self.config.n
        self.columns = min(padded(self.V), COLUMNS)
        self.turn = min(padded(self.V), self.config.turn)
        self.VP = triton.cdiv(self.V, self.columns) * self.columns
        self.chunks = cut(cu_seqlens, B, T, self.n)
        self.programs = (self.chunks.count, self.H)
        self.sizes = {"T": T, "H": self.H, "V": self.V, "n": self.n, "BK": self.BK, "VP": self.VP}
        self.sizes["PRECISION"] = products

    def scratch(self, like: Tensor, *shape: int) -> Tensor:
        """Of every chunk and head."""
        return torch.empty((*self.programs, *shape), dtype=torch.float32, device=like.device)

    def prepare(self, rows: list[Tensor], grad_o: Tensor | None, Q: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
        M, N = self.scratch(P, self.BK, self.BK), self.scratch(P, self.BK, self.VP)
        prepare_kernel[self.programs](
            *rows, grad_o, self.chunks.bounds, M, N, Q, P, K=self.K, BV=self.turn, BACKWARD=grad_o is not None,
            num_warps=warps(self.config.threads), **self.sizes,
        )  # fmt: skip
        return M, N

    def scan(self, M: Tensor, N: Tensor, state: Tensor | None, final_state: Tensor, reverse: bool = False) -> Tensor:
        """What the state is before each chunk, or its gradient after each."""
        start = torch.empty_like(N)
        columns = min(self.config.scan_columns, self.columns)
        scan_kernel[(self.chunks.sequences * self.H, self.VP // columns)](
            M, N, start, state, final_state, self.chunks.first, K=self.K, BV=columns, REVERSE=reverse,
            num_warps=warps(self.config.scan_threads), num_stages=1 if torch.version.hip else self.config.scan_stages,
            **self.sizes,
        )  # fmt: skip
        return start


def _states(state: Tensor | None, cu_seqlens: Tensor | None, r: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """The state that kernels read, and a new one."""
    rows = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = torch.empty((rows, r.shape[2], r.shape[3], v.shape[3]), dtype=torch.float32, device=r.device)
    return None if state is None else state.contiguous(), new


def forward(*args: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator's arguments, checked, to its results."""
    *rows, state, cu_seqlens = args
    check_head_size("wkv7", rows[0])
    rows = [x.contiguous() for x in rows]
    r, v = rows[0], rows[3]
    state, final_state = _states(state, cu_seqlens, r, v)
    o = torch.empty_like(v)
    if final_state.numel() == 0:
        return o.zero_(), final_state
    if r.shape[1] <= FEW_TOKENS:
        _few_tokens(rows, state, cu_seqlens, o, final_state)
        return o, final_state
    call = _Call(rows, cu_seqlens)
    Q, P = call.scratch(r, call.n, call.BK), call.scratch(r, call.n, call.n)
    M, N = call.prepare(rows, None, Q, P)
    start = call.scan(M, N, state, final_state)
    output_kernel[(*call.programs, call.VP // call.columns)](
        v, Q, P, start, o, call.chunks.bounds, BV=call.columns, num_warps=warps(128), **call.sizes
    )
    return o, final_state


def _few_tokens(rows, state, cu_seqlens, o, final_state):
    r, v = rows[0], rows[3]
    _, T, H, K = r.shape
    V = v.shape[3]
    BK = padded(K)
    BV = min(16, padded(V))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    recurrent_kernel[(final_state.shape[0] * H, triton.cdiv(V, BV))](
        *rows, state, o, final_state, cu_seqlens, T=T, H=H, K=K, V=V, BK=BK, BV=BV, num_warps=1 if BK <= 64 else 2
    )


def backward(grad_o: Tensor | None, grad_final_state: Tensor | None, *args: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the rows and of the initial state."""
    *rows, state, cu_seqlens = args
    rows = [x.contiguous() for x in rows]
    r, v = rows[0], rows[3]
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o.contiguous()
    if grad_final_state is not None:
        grad_final_state = grad_final_state.contiguous()
    state, grad_state = _states(state, cu_seqlens, r, v)
    if grad_state.numel() == 0:
        return *map(torch.zeros_like, rows), grad_state
    grad_r, grad_w, grad_k, grad_v, grad_a, grad_b = grads = [torch.empty_like(x) for x in rows]
    call = _Call(rows, cu_seqlens)
    QG, X = call.scratch(r, call.BK, call.VP), call.scratch(r, call.n, call.n)
    M, N = call.prepare(rows, grad_o, QG, X)
    start = call.scan(M, N, state, torch.empty_like(grad_state))
    G = call.scan(M, QG, grad_final_state, grad_state, reverse=True)
    U, Z = call.scratch(r, call.n, call.VP), call.scratch(r, call.n, call.VP)
    bounds, num_warps = call.chunks.bounds, warps(call.config.threads)
    value_gradient_kernel[(*call.programs, call.VP // call.columns)](
        *rows, grad_o, X, start, G, bounds, U, Z, grad_v, K=call.K, BV=call.columns, num_warps=num_warps, **call.sizes
    )
    key_gradient_kernel[call.programs](
        *rows, grad_o, start, G, bounds, U, Z, grad_r, grad_w, grad_k, grad_a, grad_b, K=call.K, BV=call.turn,
        num_warps=num_warps, **call.sizes,
    )  # fmt: skip
    return *grads, grad_state
