"""What the kernels share: rows in and out, chunks of sequences, products on tensor cores, the triangular inverse.

Letters: B batch rows, T tokens, H heads, N channels of a head, n tokens of a chunk. Rows are contiguous (B, T, H, N),
token t of batch row i is token i T + t of B T; packed sequences are stretches of tokens of one batch row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import MAX_HEAD_SIZE

# Of log_w from token to token: kernels multiply it by up to 16 tokens in 32 bits.
LONGEST_STRIDE = 1 << 27
# Adds between 0.36 and 0.72 of the last digit that tensor cores keep of a float32.
ROUNDING = tl.constexpr(1 + 0.72 * 2**-11)


def precision(*rows: Tensor) -> str:
    """How products are made on tensor cores from rows of these dtypes.

    Of bfloat16, which has eight digits, tf32, which has eleven; what is inverted, and states from chunk to chunk, are
    multiplied exactly all the same. Else as exact as float32: three products of tf32, or six of bfloat16 on AMD, which
    has no tf32.
    """
    coarse = len(rows) > 0 and all(x.dtype == torch.bfloat16 for x in rows)
    if torch.version.hip:
        return "bf16x3" if coarse else "bf16x6"
    return "tf32" if coarse else "tf32x3"


def check_head_size(op: str, r: Tensor) -> None:
    """Raises ValueError where the heads of r (B, T, H, K) are too large for an operator."""
    most, K = MAX_HEAD_SIZE[op], r.shape[3]
    if most < K:
        raise ValueError(f"r must have heads of at most {most} channels on {r.device.type}, not {K}")


def is_coarse(products: str) -> bool:
    """Whether products that `precision` names are coarser than float32."""
    return products in ("tf32", "bf16x3")


def warps(threads: int) -> int:
    """Of a program of so many threads."""
    return threads // (64 if torch.version.hip else 32)


def padded(N: int) -> int:
    """The number of channels in registers: tiles are powers of two, those of tensor cores 16 or more."""
    return max(16, triton.next_power_of_2(N))


@dataclass(frozen=True)
class Chunks:
    """How `sequences` sequences are cut into chunks of at most n tokens: `count` of them, some of which may be empty.

    Packed sequences have `bounds` (count, 2), where a chunk begins and where its sequence ends, and `first`
    (sequences + 1,), their first chunks. Else both are None and each sequence has `T` tokens and as many chunks.
    """

    count: int
    sequences: int
    T: int
    bounds: Tensor | None = None
    first: Tensor | None = None


def cut(cu_seqlens: Tensor | None, B: int, T: int, n: int) -> Chunks:
    """Cuts B rows of T tokens, or the sequences of one row, without asking the device for their lengths."""
    if cu_seqlens is None:
        return Chunks(B * triton.cdiv(T, n), B, T)
    count = T // n + cu_seqlens.shape[0] - 1
    # Lengths cannot be checked without waiting for the device, but must not lead out of the row.
    edges = cu_seqlens.long().clamp(0, T).cummax(0).values
    first = torch.zeros_like(edges)
    first[1:] = ((edges[1:] - edges[:-1] + n - 1) // n).cumsum(0)
    chunk = torch.arange(count, device=edges.device)
    # A chunk beyond the last one begins beyond the end of the last sequence.
    sequence = torch.searchsorted(first[1:].contiguous(), chunk, right=True).clamp(max=edges.shape[0] - 2)
    begin = edges[sequence] + (chunk - first[sequence]) * n
    return Chunks(count, edges.shape[0] - 1, T, torch.stack([begin, edges[sequence + 1]], 1), first)


@triton.jit
def chunk_tokens(bounds, chunk, T, n: tl.constexpr):
    """First token of a chunk, and the end of its sequence."""
    if bounds is None:
        per_sequence = tl.cdiv(T, n)
        sequence = (chunk // per_sequence).to(tl.int64)
        begin = sequence * T + (chunk % per_sequence) * n
        end = sequence * T + T
    else:
        begin = tl.load(bounds + 2 * chunk).to(tl.int64)
        end = tl.load(bounds + 2 * chunk + 1).to(tl.int64)
    return begin, end


@triton.jit
def chunks_of(first, sequence, T, n: tl.constexpr):
    """First chunk of a sequence, and the one after its last."""
    if first is None:
        per_sequence = tl.cdiv(T, n)
        begin = (sequence * per_sequence).to(tl.int64)
        end = begin + per_sequence
    else:
        begin = tl.load(first + sequence).to(tl.int64)
        end = tl.load(first + sequence + 1).to(tl.int64)
    return begin, end


@triton.jit
def _rows(begin, end, h, H, n: tl.constexpr, N: tl.constexpr, column, BN: tl.constexpr):
    t = tl.arange(0, n)
    i = tl.arange(0, BN)
    inside = (t < end - begin)[:, None]
    if N % BN != 0:
        inside = inside & (column + i < N)[None, :]
    return (begin * H + h) * N + column, t[:, None] * (H * N) + i[None, :], inside


@triton.jit
def load_rows(x, begin, end, h, H, n: tl.constexpr, N: tl.constexpr, column, BN: tl.constexpr):
    """Channels `column` to `column + BN` of head h, in float32; zeros beyond the end or the last channel.  # (n, BN)"""
    first, at, inside = _rows(begin, end, h, H, n, N, column, BN)
    return tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, begin, end, h, H, n: tl.constexpr, N: tl.constexpr, column, BN: tl.constexpr):
    """The reverse of `load_rows`: nothing is written beyond the end or the last channel."""
    first, at, inside = _rows(begin, end, h, H, n, N, column, BN)
    tl.store(x + first + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(x):
    """x made so that what tensor cores keep of it, ten digits behind the point, is about the nearest.

    Without integers, to which a GPU's NaN, 0x7fffffff, would be next to -0.
    """
    return x * ROUNDING


@triton.jit
def _split(x):
    """x to ten digits behind the point, and the rest, which keeps NaN."""
    big = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return big, x - big


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr, X_EXACT: tl.constexpr = False, Y_EXACT: tl.constexpr = False):
    """acc + x y, as `precision` says; acc may be None. EXACT says that a factor has no more than eleven digits.

    tf32x3 by hand, since Triton's own also looks for NaN and infinities, in every part of every product.
    """
    if PRECISION == "tf32":
        acc = tl.dot(_rounded(x), _rounded(y), acc, input_precision="tf32")
    elif PRECISION == "tf32x3":
        x_big, y_big = x, y
        if not X_EXACT:
            x_big, x_small = _split(x)
        if not Y_EXACT:
            y_big, y_small = _split(y)
        if not X_EXACT:
            acc = tl.dot(x_small, y_big, acc, input_precision="tf32")
        if not Y_EXACT:
            acc = tl.dot(x_big, y_small, acc, input_precision="tf32")
        acc = tl.dot(x_big, y_big, acc, input_precision="tf32")
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def exact_dot(x, y, acc, PRECISION: tl.constexpr, X_EXACT: tl.constexpr = False):
    """acc + x y as exact as float32, whatever the rows are."""
    if PRECISION == "tf32" or PRECISION == "tf32x3":
        acc = dot(x, y, acc, "tf32x3", X_EXACT)
    else:
        acc = dot(x, y, acc, "bf16x6")
    return acc


@triton.jit
def unit_lower_inverse(A, n: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 of a strictly lower triangular A (n, n).

    From diagonal blocks of 2 to blocks of n: with the inverses P and Q of two blocks and L of A below and left of them,
    [[P, 0], [Q L P, Q]]. Powers of A would cancel catastrophically where keys repeat. A step of Newton's makes up for
    coarse products.
    """
    t = tl.arange(0, n)
    row, column = t[:, None], t[None, :]
    identity = tl.where(row == column, 1.0, 0.0)
    X = identity + tl.where(row // 2 == column // 2, A, 0.0)
    for log in tl.static_range(1, 6):
        if (2 << log) <= n:
            below = (row >> (log + 1) == column >> (log + 1)) & (row >> log > column >> log)
            X += dot(X, dot(tl.where(below, A, 0.0), X, None, PRECISION), None, PRECISION)
    if PRECISION == "tf32" or PRECISION == "bf16x3":
        X += dot(X, exact_dot(A, X, identity - X, PRECISION), None, PRECISION)
    return X
