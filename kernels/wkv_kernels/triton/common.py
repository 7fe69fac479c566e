"""What the kernels share: rows in and out, chunks of sequences, products as exact as float32, the triangular inverse.

Letters: B batch rows, T tokens, H heads, N channels of a head, n tokens of a chunk. Rows are contiguous (B, T, H, N),
token t of batch row i is token i T + t of B T; packed sequences are stretches of tokens of one batch row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a diagonal block that `unit_lower_inverse` inverts row by row.
BLOCK = tl.constexpr(16)


def precision() -> str:
    """How products of float32 matrices reach the accuracy of float32 on tensor cores.

    Three products of tf32, or six of bfloat16 on AMD, which has no tf32x3. The latter spills fewer registers, but on an
    H100 Triton 3.6 makes wrong gradients of bfloat16 rows of it (4e-4 of log_w; all of them with num_stages=1).
    """
    return "bf16x6" if torch.version.hip else "tf32x3"


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
    t = begin + tl.arange(0, n)
    i = column + tl.arange(0, BN)
    return (t[:, None] * H + h) * N + i[None, :], (t < end)[:, None] & (i < N)[None, :]


@triton.jit
def load_rows(x, begin, end, h, H, n: tl.constexpr, N: tl.constexpr, column, BN: tl.constexpr):
    """Channels `column` to `column + BN` of head h, in float32; zeros beyond the end or the last channel.  # (n, BN)"""
    at, inside = _rows(begin, end, h, H, n, N, column, BN)
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, begin, end, h, H, n: tl.constexpr, N: tl.constexpr, column, BN: tl.constexpr):
    """The reverse of `load_rows`: nothing is written beyond the end or the last channel."""
    at, inside = _rows(begin, end, h, H, n, N, column, BN)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def unit_lower_inverse(A, n: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 of a strictly lower triangular A (n, n), n = 16, 32 or 64.

    Diagonal blocks of 16 by substitution, row by row; powers of A would cancel catastrophically where keys repeat.
    With D the inverses of these blocks and F = D times the rest of A, the inverse is (I + F + F^2 + F^3) D.
    """
    blocks: tl.constexpr = n // BLOCK
    # A[block, row, other block, column], of which the diagonal blocks stay, transposed.
    one = tl.arange(0, blocks)
    diagonal = (one[:, None] == one[None, :])[:, None, :, None]
    own = tl.sum(tl.where(diagonal, tl.reshape(A, [blocks, BLOCK, blocks, BLOCK]), 0.0), 2)
    own = tl.permute(own, [0, 2, 1])  # (block, column, row)
    i = tl.arange(0, BLOCK)
    X = tl.broadcast_to((i[:, None] == i[None, :]).to(tl.float32)[None, :, :], [blocks, BLOCK, BLOCK])
    for row in tl.static_range(1, BLOCK):
        factors = tl.sum(tl.where(i[None, None, :] == row, own, 0.0), 2)
        added = tl.sum(factors[:, :, None] * X, 1)
        X = tl.where(i[None, :, None] == row, X + added[:, None, :], X)
    if blocks == 1:
        return tl.reshape(X, [n, n])
    D = tl.reshape(tl.where(diagonal, X[:, :, None, :], 0.0), [n, n])
    t = tl.arange(0, n) // BLOCK
    F = tl.dot(D, tl.where(t[:, None] != t[None, :], A, 0.0), input_precision=PRECISION)
    if blocks > 2:
        D += tl.dot(tl.dot(F, F, input_precision=PRECISION), D, input_precision=PRECISION)
    return D + tl.dot(F, D, input_precision=PRECISION)
