"""The WKV operator of RWKV-7, defined in plain PyTorch.

Glossary: B batch, T time, H heads, K key channels and V value channels of a head; `r` receptance, `log_w` logarithm of
the decay (<= 0), `k` key, `v` value, `a` and `b` the two vectors of the state transition (RWKV-7 passes a = -kk and
b = kk * in-context learning rate), `S` the state of a head, (K, V), always float32.

`naive_recurrent_wkv7` is the definition. `chunk_wkv7` computes the same with matrix products and is what a machine
without the compiled kernels runs. `wkv7` picks the compiled kernel where there is one.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), section 4; the chunked form is the WY form of a
diagonal-plus-rank-one transition.
"""

import torch

from .wkv_operators import chunks, each_sequence, in_full_precision, initial_state, is_compiled, outer, to_float

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels.wkv7 import wkv7 as compiled_wkv7
except ImportError:
    compiled_wkv7 = None

CHUNK_LENGTH = 64


def wkv7(r, log_w, k, v, a, b, state=None, cu_seqlens=None):
    """RWKV-7's WKV operator, by the fastest implementation for the tensors' device.

    Shapes: r, log_w, k, a, b (B, T, H, K), v (B, T, H, V), state (B, H, K, V) float32 or None for zeros. With
    `cu_seqlens` (n + 1,), B is 1, the row holds n sequences one after the other, and state is (n, H, K, V).
    Returns the output (B, T, H, V) in v's dtype and the final state in float32, shaped like `state`.
    """
    if compiled_wkv7 is not None and is_compiled(r, "wkv7"):
        return compiled_wkv7(r, log_w, k, v, a, b, state, cu_seqlens)
    if r.shape[1] == 1:
        return naive_recurrent_wkv7(r, log_w, k, v, a, b, state, cu_seqlens)
    return chunk_wkv7(r, log_w, k, v, a, b, state, cu_seqlens)


@in_full_precision
def naive_recurrent_wkv7(r, log_w, k, v, a, b, state=None, cu_seqlens=None):
    """The definition: one step per token, everything in float32 (float64 when given float64).

        S_t = diag(exp(log_w_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t        o_t = r_t S_t

    Shapes and returns as in `wkv7`.
    """
    if cu_seqlens is not None:
        return each_sequence(naive_recurrent_wkv7, (r, log_w, k, v, a, b), v, state, cu_seqlens)
    dtype = v.dtype
    r, log_w, k, v, a, b = (to_float(x) for x in (r, log_w, k, v, a, b))
    S = initial_state(k, v, state)
    outputs = []
    for t in range(r.shape[1]):
        sa = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = log_w[:, t].exp().unsqueeze(-1) * S + outer(b[:, t], sa) + outer(k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
    return (torch.stack(outputs, 1) if outputs else v).to(dtype), S


@in_full_precision
def chunk_wkv7(r, log_w, k, v, a, b, state=None, cu_seqlens=None):
    """The same operator by chunks of 64 tokens: matrix products inside a chunk, one state update per chunk.

    Needs log_w >= -exp(-1/2) for every token, which RWKV-7's decay guarantees: then the largest intermediate factor is
    exp(20). Shapes and returns as in `wkv7`.
    """
    if cu_seqlens is not None:
        return each_sequence(chunk_wkv7, (r, log_w, k, v, a, b), v, state, cu_seqlens)
    dtype, T = v.dtype, r.shape[1]
    n = min(CHUNK_LENGTH, T)
    r, log_w, k, v, a, b = (to_float(x) for x in (r, log_w, k, v, a, b))
    S = initial_state(k, v, state)
    if T == 0:
        return v.to(dtype), S
    r, log_w, k, v, a, b = (chunks(x, n) for x in (r, log_w, k, v, a, b))  # (B, H, chunks, n, K)

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
