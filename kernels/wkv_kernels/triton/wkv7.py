"""The operator wkv7 of RWKV-7 in Triton: chunks of n tokens in parallel, or token by token where there are few.

Letters: as in wkv_kernels/wkv7.py, and n tokens of a chunk; c sums of log_w from the chunk's first token, e the same
without the token itself, m that of the middle token, the reference of exponents. A chunk changes the state by
S' = M S + N and puts out Y + Q S, all of which kernels/README.md derives. Needs log_w >= -exp(-1/2), but for calls of
few tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import chunk_tokens, chunks_of, cut, load_rows, padded, precision, store_rows, unit_lower_inverse, warps

# Up to this many tokens a call runs token by token.
FEW_TOKENS = 32
MAX_HEAD_SIZE = 128


@dataclass(frozen=True)
class Configuration:
    """Tokens of a chunk, value channels in a turn of the loops of either pass, and threads of a program.

    What spills fewest registers on sm_90, see kernels/triton_table.py.
    """

    n: int
    turn: int
    backward_turn: int
    threads: int
    scan_threads: int


# By padded head size.
CONFIGURATIONS = {
    16: Configuration(n=32, turn=16, backward_turn=16, threads=128, scan_threads=64),
    32: Configuration(n=32, turn=32, backward_turn=32, threads=256, scan_threads=64),
    64: Configuration(n=32, turn=64, backward_turn=32, threads=256, scan_threads=128),
    128: Configuration(n=16, turn=16, backward_turn=16, threads=256, scan_threads=128),
}
# Value channels of a program, where programs share them.
SCAN_COLUMNS, COLUMNS = 16, 64


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


@triton.jit(do_not_specialize=["T", "H"])
def prepare_kernel(
    r, log_w, k, v, a, b, grad_o, bounds, M, N, Q, Y, X, T, H, K: tl.constexpr, V: tl.constexpr, n: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, PRECISION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: M (BK, BK), N (BK, VP); forward Q (n, BK) and Y (n, VP), backward the inverse X (n, n)
    and Q^T grad_o (BK, VP) in place of Y."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    begin, end = chunk_tokens(bounds, chunk, T, n)
    head = chunk.to(tl.int64) * H + h
    t, i = tl.arange(0, n), tl.arange(0, BK)
    below, not_above = t[:, None] > t[None, :], t[:, None] >= t[None, :]

    w = load_rows(log_w, begin, end, h, H, n, K, 0, BK)
    c = tl.cumsum(w, 0)
    total = tl.sum(w, 0)
    m = tl.sum(tl.where((t == n // 2)[:, None], c, 0.0), 0)
    to_end, from_start = tl.exp(total - m), tl.exp(m)
    to_middle = tl.exp(m[None, :] - c)
    Am = load_rows(a, begin, end, h, H, n, K, 0, BK) * tl.exp(c - w - m[None, :])
    Bm = load_rows(b, begin, end, h, H, n, K, 0, BK) * to_middle
    ab = tl.where(below, tl.dot(Am, tl.trans(Bm), input_precision=PRECISION), 0.0)
    inverse = unit_lower_inverse(ab, n, PRECISION)
    W = tl.dot(inverse, Am, input_precision=PRECISION)
    carried = tl.dot(tl.trans(Bm), W, input_precision=PRECISION) * to_end[:, None] * from_start[None, :]
    carried += tl.where(i[:, None] == i[None, :], tl.exp(total)[:, None], 0.0)
    tl.store(M + head * BK * BK + i[:, None] * BK + i[None, :], carried)

    Km = load_rows(k, begin, end, h, H, n, K, 0, BK) * to_middle
    Rm = load_rows(r, begin, end, h, H, n, K, 0, BK) * tl.exp(c - m[None, :])
    ak = tl.where(below, tl.dot(Am, tl.trans(Km), input_precision=PRECISION), 0.0)
    rb = tl.where(not_above, tl.dot(Rm, tl.trans(Bm), input_precision=PRECISION), 0.0)
    q = (Rm + tl.dot(rb, W, input_precision=PRECISION)) * from_start[None, :]
    if BACKWARD:
        tl.store(X + head * n * n + t[:, None] * n + t[None, :], inverse)
    else:
        rk = tl.where(not_above, tl.dot(Rm, tl.trans(Km), input_precision=PRECISION), 0.0)
        tl.store(Q + head * n * BK + t[:, None] * BK + i[None, :], q)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        V_ = load_rows(v, begin, end, h, H, n, V, first, BV)
        U = tl.dot(inverse, tl.dot(ak, V_, input_precision=PRECISION), input_precision=PRECISION)
        new = tl.dot(tl.trans(Km), V_, input_precision=PRECISION)
        new = tl.dot(tl.trans(Bm), U, new, input_precision=PRECISION) * to_end[:, None]
        tl.store(N + (head * BK + i[:, None]) * VP + j[None, :], new)
        if BACKWARD:
            G = load_rows(grad_o, begin, end, h, H, n, V, first, BV)
            tl.store(Y + (head * BK + i[:, None]) * VP + j[None, :], tl.dot(tl.trans(q), G, input_precision=PRECISION))
        else:
            y = tl.dot(rk, V_, input_precision=PRECISION)
            y = tl.dot(rb, U, y, input_precision=PRECISION)
            tl.store(Y + (head * n + t[:, None]) * VP + j[None, :], y)


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
        S = tl.dot(tl.trans(carried) if REVERSE else carried, S, new, input_precision=PRECISION)
    tl.store(final_state + at, S, mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    Q, Y, start, o, bounds, T, H, V: tl.constexpr, n: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = Y + Q S of one chunk and head."""
    chunk, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    begin, end = chunk_tokens(bounds, chunk, T, n)
    head = chunk.to(tl.int64) * H + h
    t, i, j = tl.arange(0, n), tl.arange(0, BK), column + tl.arange(0, BV)
    q = tl.load(Q + head * n * BK + t[:, None] * BK + i[None, :])
    S = tl.load(start + (head * BK + i[:, None]) * VP + j[None, :])
    y = tl.load(Y + (head * n + t[:, None]) * VP + j[None, :])
    store_rows(o, tl.dot(q, S, y, input_precision=PRECISION), begin, end, h, H, n, V, column, BV)


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

    w = load_rows(log_w, begin, end, h, H, n, K, 0, BK)
    c = tl.cumsum(w, 0)
    total = tl.sum(w, 0)
    m = tl.sum(tl.where((t == n // 2)[:, None], c, 0.0), 0)
    to_middle = tl.exp(m[None, :] - c)
    here = (head * BK + i[:, None]) * VP + j[None, :]
    Am = load_rows(a, begin, end, h, H, n, K, 0, BK) * tl.exp(c - w - m[None, :])
    Km = load_rows(k, begin, end, h, H, n, K, 0, BK) * to_middle
    V_ = load_rows(v, begin, end, h, H, n, V, column, BV)
    ak = tl.where(below, tl.dot(Am, tl.trans(Km), input_precision=PRECISION), 0.0)
    u = tl.dot(ak, V_, input_precision=PRECISION)
    u = tl.dot(Am, tl.load(start + here) * tl.exp(m)[:, None], u, input_precision=PRECISION)
    inverse = tl.load(X + head * n * n + t[:, None] * n + t[None, :])
    tl.store(U + (head * n + t[:, None]) * VP + j[None, :], tl.dot(inverse, u, input_precision=PRECISION))

    Gm = tl.load(G + here) * tl.exp(total - m)[:, None]
    Rm = load_rows(r, begin, end, h, H, n, K, 0, BK) * tl.exp(c - m[None, :])
    rk = tl.where(not_above, tl.dot(Rm, tl.trans(Km), input_precision=PRECISION), 0.0)
    grad = load_rows(grad_o, begin, end, h, H, n, V, column, BV)
    gv = tl.dot(tl.trans(rk), grad, input_precision=PRECISION)
    gv = tl.dot(Km, Gm, gv, input_precision=PRECISION)
    Bm = load_rows(b, begin, end, h, H, n, K, 0, BK) * to_middle
    rb = tl.where(not_above, tl.dot(Rm, tl.trans(Bm), input_precision=PRECISION), 0.0)
    z = tl.dot(tl.trans(rb), grad, input_precision=PRECISION)
    z = tl.dot(Bm, Gm, z, input_precision=PRECISION)
    z = tl.dot(tl.trans(inverse), z, input_precision=PRECISION)
    tl.store(Z + (head * n + t[:, None]) * VP + j[None, :], z)
    gv = tl.dot(tl.trans(ak), z, gv, input_precision=PRECISION)
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

    w = load_rows(log_w, begin, end, h, H, n, K, 0, BK)
    c = tl.cumsum(w, 0)
    total = tl.sum(w, 0)[None, :]
    m = tl.sum(tl.where((t == n // 2)[:, None], c, 0.0), 0)[None, :]
    from_middle, from_middle_before, to_middle = tl.exp(c - m), tl.exp(c - w - m), tl.exp(m - c)

    # What tokens read from the past: r and a.
    gr = tl.zeros([n, BK], tl.float32)
    ga = gr
    ab = tl.zeros([n, n], tl.float32)
    ak, rb, rk = ab, ab, ab
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        S = tl.trans(tl.load(start + (head * BK + i[:, None]) * VP + j[None, :])) * tl.exp(m)
        z = tl.load(Z + (head * n + t[:, None]) * VP + j[None, :])
        grad = load_rows(grad_o, begin, end, h, H, n, V, first, BV)
        gr = tl.dot(grad, S, gr, input_precision=PRECISION)
        ga = tl.dot(z, S, ga, input_precision=PRECISION)
        u = tl.trans(tl.load(U + (head * n + t[:, None]) * VP + j[None, :]))
        ab = tl.dot(z, u, ab, input_precision=PRECISION)
        rb = tl.dot(grad, u, rb, input_precision=PRECISION)
        V_ = tl.trans(load_rows(v, begin, end, h, H, n, V, first, BV))
        ak = tl.dot(z, V_, ak, input_precision=PRECISION)
        rk = tl.dot(grad, V_, rk, input_precision=PRECISION)
    ab, ak = tl.where(below, ab, 0.0), tl.where(below, ak, 0.0)
    rb, rk = tl.where(not_above, rb, 0.0), tl.where(not_above, rk, 0.0)
    B_ = load_rows(b, begin, end, h, H, n, K, 0, BK) * to_middle
    gr = tl.dot(rb, B_, gr, input_precision=PRECISION)
    ga = tl.dot(ab, B_, ga, input_precision=PRECISION)
    K_ = load_rows(k, begin, end, h, H, n, K, 0, BK) * to_middle
    gr = tl.dot(rk, K_, gr, input_precision=PRECISION) * from_middle
    ga = tl.dot(ak, K_, ga, input_precision=PRECISION) * from_middle_before
    store_rows(grad_r, gr, begin, end, h, H, n, K, 0, BK)
    store_rows(grad_a, ga, begin, end, h, H, n, K, 0, BK)
    # c of a token gathers from r of the same token and from a of the next.
    ga *= load_rows(a, begin, end, h, H, n, K, 0, BK)
    gw = tl.cumsum(load_rows(r, begin, end, h, H, n, K, 0, BK) * gr + ga, 0, reverse=True) - ga

    # What tokens leave for the future: k and b.
    gk = tl.zeros([n, BK], tl.float32)
    gb = gk
    g_total = tl.zeros([BK], tl.float32)
    for first in range(0, V, BV):
        j = first + tl.arange(0, BV)
        D = tl.load(G + (head * BK + i[:, None]) * VP + j[None, :])
        S = tl.load(start + (head * BK + i[:, None]) * VP + j[None, :])
        g_total += tl.sum(S * D, 1)
        D = tl.trans(D)
        gk = tl.dot(load_rows(v, begin, end, h, H, n, V, first, BV), D, gk, input_precision=PRECISION)
        gb = tl.dot(tl.load(U + (head * n + t[:, None]) * VP + j[None, :]), D, gb, input_precision=PRECISION)
    gk *= tl.exp(total - m)
    gb *= tl.exp(total - m)
    K_ = load_rows(k, begin, end, h, H, n, K, 0, BK) * to_middle
    B_ = load_rows(b, begin, end, h, H, n, K, 0, BK) * to_middle
    gw += (tl.sum(K_ * gk + B_ * gb, 0) + tl.exp(tl.sum(w, 0)) * g_total)[None, :]
    A_ = load_rows(a, begin, end, h, H, n, K, 0, BK) * from_middle_before
    gk = tl.dot(tl.trans(ak), A_, gk, input_precision=PRECISION)
    gb = tl.dot(tl.trans(ab), A_, gb, input_precision=PRECISION)
    R_ = load_rows(r, begin, end, h, H, n, K, 0, BK) * from_middle
    gk = tl.dot(tl.trans(rk), R_, gk, input_precision=PRECISION)
    gb = tl.dot(tl.trans(rb), R_, gb, input_precision=PRECISION)
    gw -= tl.cumsum(K_ * gk + B_ * gb, 0, reverse=True)
    store_rows(grad_w, gw, begin, end, h, H, n, K, 0, BK)
    store_rows(grad_k, gk * to_middle, begin, end, h, H, n, K, 0, BK)
    store_rows(grad_b, gb * to_middle, begin, end, h, H, n, K, 0, BK)


class _Call:
    """Sizes of a call, its chunks, and the arguments that its kernels share."""

    def __init__(self, r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        B, T, self.H, self.K = r.shape
        self.V = v.shape[3]
        if self.K > MAX_HEAD_SIZE:
            raise ValueError(f"r must have heads of at most {MAX_HEAD_SIZE} channels on {r.device.type}, not {self.K}")
        self.BK = padded(self.K)
        self.config = CONFIGURATIONS[self.BK]
        self.n = self.config.n
        self.columns = min(padded(self.V), COLUMNS)
        self.turn = min(padded(self.V), self.config.turn)
        self.backward_turn = min(padded(self.V), self.config.backward_turn)
        self.VP = triton.cdiv(self.V, self.columns) * self.columns
        self.chunks = cut(cu_seqlens, B, T, self.n)
        self.programs = (self.chunks.count, self.H)
        self.sizes = {"T": T, "H": self.H, "V": self.V, "n": self.n, "BK": self.BK, "VP": self.VP}
        self.sizes["PRECISION"] = precision()

    def scratch(self, like: Tensor, *shape: int) -> Tensor:
        """Of every chunk and head."""
        return torch.empty((*self.programs, *shape), dtype=torch.float32, device=like.device)

    def prepare(self, rows: list[Tensor], grad_o: Tensor | None, Q: Tensor | None, Y: Tensor, X: Tensor | None):
        M, N = self.scratch(Y, self.BK, self.BK), self.scratch(Y, self.BK, self.VP)
        BV = self.turn if X is None else self.backward_turn
        prepare_kernel[self.programs](
            *rows, grad_o, self.chunks.bounds, M, N, Q, Y, X, K=self.K, BV=BV, BACKWARD=X is not None,
            num_warps=warps(self.config.threads), **self.sizes,
        )  # fmt: skip
        return M, N

    def scan(self, M: Tensor, N: Tensor, state: Tensor | None, final_state: Tensor, reverse: bool = False) -> Tensor:
        """What the state is before each chunk, or its gradient after each."""
        start = torch.empty_like(N)
        scan_kernel[(self.chunks.sequences * self.H, self.VP // SCAN_COLUMNS)](
            M, N, start, state, final_state, self.chunks.first, K=self.K, BV=SCAN_COLUMNS, REVERSE=reverse,
            num_warps=warps(self.config.scan_threads), **self.sizes,
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
    rows = [x.contiguous() for x in rows]
    r, v = rows[0], rows[3]
    state, final_state = _states(state, cu_seqlens, r, v)
    o = torch.empty_like(v)
    if r.shape[1] <= FEW_TOKENS:
        _few_tokens(rows, state, cu_seqlens, o, final_state)
        return o, final_state
    call = _Call(r, v, cu_seqlens)
    Q, Y = call.scratch(r, call.n, call.BK), call.scratch(r, call.n, call.VP)
    M, N = call.prepare(rows, None, Q, Y, None)
    start = call.scan(M, N, state, final_state)
    output_kernel[(*call.programs, call.VP // call.columns)](
        Q, Y, start, o, call.chunks.bounds, BV=call.columns, num_warps=warps(128), **call.sizes
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
    grad_r, grad_w, grad_k, grad_v, grad_a, grad_b = grads = [torch.empty_like(x) for x in rows]
    call = _Call(r, v, cu_seqlens)
    QG, X = call.scratch(r, call.BK, call.VP), call.scratch(r, call.n, call.n)
    M, N = call.prepare(rows, grad_o, None, QG, X)
    start = call.scan(M, N, state, torch.empty_like(grad_state))
    G = call.scan(M, QG, grad_final_state, grad_state, reverse=True)
    U, Z = call.scratch(r, call.n, call.VP), call.scratch(r, call.n, call.VP)
    bounds, num_warps = call.chunks.bounds, warps(call.config.threads)
    value_gradient_kernel[(*call.programs, call.VP // call.columns)](
        *rows, grad_o, X, start, G, bounds, U, Z, grad_v, K=call.K, BV=call.columns, num_warps=num_warps, **call.sizes
    )
    key_gradient_kernel[call.programs](
        *rows, grad_o, start, G, bounds, U, Z, grad_r, grad_w, grad_k, grad_a, grad_b, K=call.K, BV=call.backward_turn,
        num_warps=num_warps, **call.sizes,
    )  # fmt: skip
    return *grads, grad_state
