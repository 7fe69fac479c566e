"""The WKV operator of RWKV-7, defined in plain PyTorch.

Glossary: B batch, T time, H heads, K key channels and V value channels of a head; `r` receptance, `log_w` logarithm of
the decay (<= 0), `k` key, `v` value, `a` and `b` the two vectors of the state transition (RWKV-7 passes a = -kk and
b = kk * in-context learning rate), `S` the state of a head, (K, V), always float32.

`naive_recurrent_wkv7` is the definition. `chunk_wkv7` computes the same with matrix products and is what a machine
without the compiled kernels runs. `wkv7` picks the compiled kernel where there is one.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), section 4; the chunked form is the WY form of a
diagonal-plus-rank-one transition.
"""

import functools
import itertools
import logging

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

try:
    from wkv_kernels.wkv7 import wkv7 as compiled_wkv7
except ImportError as error:
    compiled_wkv7 = None
    logger.warning(
        "RWKV runs without compiled kernels (%s): plain PyTorch is used, same results but slower; "
        "`pip install wkv` brings them.",
        error,
    )

CHUNK_LENGTH = 64


def _in_full_precision(op):
    """Autocast would run the matrix products of `op` in half precision."""

    @functools.wraps(op)
    def wrapper(r, *args, **kwargs):
        # The meta device knows no autocast.
        if r.is_meta:
            return op(r, *args, **kwargs)
        with torch.autocast(r.device.type, enabled=False):
            return op(r, *args, **kwargs)

    return wrapper


def wkv7(r, log_w, k, v, a, b, state=None, cu_seqlens=None):
    """RWKV-7's WKV operator, by the fastest implementation for the tensors' device.

    Shapes: r, log_w, k, a, b (B, T, H, K), v (B, T, H, V), state (B, H, K, V) float32 or None for zeros. With
    `cu_seqlens` (n + 1,), B is 1, the row holds n sequences one after the other, and state is (n, H, K, V).
    Returns the output (B, T, H, V) in v's dtype and the final state in float32, shaped like `state`.
    """
    # The compiled operator serves CPUs and float32 or less so far; all else runs the chunked form.
    if compiled_wkv7 is not None and r.device.type in ("cpu", "meta") and r.dtype != torch.float64:
        return compiled_wkv7(r, log_w, k, v, a, b, state, cu_seqlens)
    if r.shape[1] == 1:
        return naive_recurrent_wkv7(r, log_w, k, v, a, b, state, cu_seqlens)
    return chunk_wkv7(r, log_w, k, v, a, b, state, cu_seqlens)


@_in_full_precision
def naive_recurrent_wkv7(r, log_w, k, v, a, b, state=None, cu_seqlens=None):
    """The definition: one step per token, everything in float32 (float64 when given float64).

        S_t = diag(exp(log_w_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t        o_t = r_t S_t

    Shapes and returns as in `wkv7`.
    """
    if cu_seqlens is not None:
        return _each_sequence(naive_recurrent_wkv7, r, log_w, k, v, a, b, state, cu_seqlens)
    dtype = v.dtype
    r, log_w, k, v, a, b = (_float(x) for x in (r, log_w, k, v, a, b))
    S = _initial_state(k, v, state)
    outputs = []
    for t in range(r.shape[1]):
        sa = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = log_w[:, t].exp().unsqueeze(-1) * S + _outer(b[:, t], sa) + _outer(k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
    return torch.stack(outputs, 1).to(dtype), S


@_in_full_precision
def chunk_wkv7(r, log_w, k, v, a, b, state=None, cu_seqlens=None):
    """The same operator by chunks of 64 tokens: matrix products inside a chunk, one state update per chunk.

    Needs log_w >= -exp(-1/2) for every token, which RWKV-7's decay guarantees: then the largest intermediate factor is
    exp(20). Shapes and returns as in `wkv7`.
    """
    if cu_seqlens is not None:
        return _each_sequence(chunk_wkv7, r, log_w, k, v, a, b, state, cu_seqlens)
    dtype, T = v.dtype, r.shape[1]
    n = min(CHUNK_LENGTH, T)
    r, log_w, k, v, a, b = (_float(x) for x in (r, log_w, k, v, a, b))
    S = _initial_state(k, v, state)
    r, log_w, k, v, a, b = (_chunks(x, n) for x in (r, log_w, k, v, a, b))  # (B, H, chunks, n, K)

    # Sums of log-decays from the chunk's start: `c` with the token itself, `e` without it, `total` of the whole chunk.
    c = log_w.cumsum(-2)
    e = c - log_w
    total = c[..., -1:, :]
    middle = c[..., n // 2 : n // 2 + 1, :].detach()
    from_past, to_future = (c - middle).exp(), (middle - c).exp()
    a_past, r_past, b_future, k_future = a * (e - middle).exp(), r * from_past, b * to_future, k * to_future
    ab = (a_past @ b_future.mT).tril(-1)  # (B, H, chunks, n, n)
    ak = (a_past @ k_future.mT).tril(-1)
    rb = (r_past @ b_future.mT).tril()
    rk = (r_past @ k_future.mT).tril()

    # Row i of `u` is a_i S_{i-1}; it solves (I - ab) u = ak v + (a exp(e)) S.
    identity = torch.eye(n, dtype=k.dtype, device=k.device)
    right_hand_side = torch.cat([ak @ v, a * e.exp()], -1)
    solution = torch.linalg.solve_triangular(identity - ab, right_hand_side, upper=False, unitriangular=True)
    u_from_values, u_from_state = solution.split([v.shape[-1], a.shape[-1]], -1)

    to_end = (total - c).exp()
    k_end, b_end, r_start = k * to_end, b * to_end, r * c.exp()
    carried = total.mT.exp()  # (B, H, chunks, K, 1)
    outputs = []
    for i in range(k.shape[2]):
        u = u_from_values[:, :, i] + u_from_state[:, :, i] @ S
        outputs.append(rk[:, :, i] @ v[:, :, i] + rb[:, :, i] @ u + r_start[:, :, i] @ S)
        S = carried[:, :, i] * S + k_end[:, :, i].mT @ v[:, :, i] + b_end[:, :, i].mT @ u
    return torch.cat(outputs, 2).transpose(1, 2)[:, :T].to(dtype), S


def _each_sequence(op, r, log_w, k, v, a, b, state, cu_seqlens):
    """Run `op` on every sequence of a packed row by itself."""
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        row = [x[:, start:end] for x in (r, log_w, k, v, a, b)]
        S = _initial_state(row[2], row[3], None if state is None else state[i : i + 1])
        o = row[3]
        if end > start:
            o, S = op(*row, S)
        outputs.append(o)
        states.append(S)
    return torch.cat(outputs, 1), torch.cat(states, 0)


def _float(x):
    return x if x.dtype == torch.float64 else x.float()


def _outer(x, y):
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _initial_state(k, v, state):
    if state is not None:
        return state.to(torch.promote_types(k.dtype, torch.float32))
    B, _, H, K = k.shape
    return torch.zeros(B, H, K, v.shape[-1], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)


def _chunks(x, n):
    """(B, T, H, K) to (B, H, chunks, n, K); the zeros appended to the last chunk leave the state as it is."""
    B, T, H, K = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -T % n))
    return x.view(B, -1, n, H, K).permute(0, 3, 1, 2, 4)
