"""The WKV operator of RWKV-6 and RWKV-5, defined in plain PyTorch.

Glossary: B batch, T time, H heads, K key channels and V value channels of a head; `r` receptance, `log_w` logarithm of
the decay (<= 0, unbounded), `u` bonus of the current token, `k` key, `v` value, `S` the state of a head, (K, V), always
float32. RWKV-5 is the case of a decay that is the same for all tokens.

`naive_recurrent_wkv6` is the definition. `chunk_wkv6` computes the same with matrix products and is what a machine
without the compiled kernels runs. `wkv6` picks the compiled kernel where there is one.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (2024), section 4.
"""

import torch
import torch.nn.functional as F

from .wkv_operators import chunks, each_sequence, in_full_precision, initial_state, is_compiled, outer, to_float

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels.wkv6 import wkv6 as compiled_wkv6
except ImportError:
    compiled_wkv6 = None

CHUNK_LENGTH = 16


def wkv6(r, log_w, u, k, v, state=None, cu_seqlens=None):
    """The WKV operator of RWKV-6, by the fastest implementation for the tensors' device.

    Shapes: r, k (B, T, H, K), v (B, T, H, V), u (H, K), state (B, H, K, V) float32 or None for zeros; log_w
    (B, T, H, K), where B and T may be 1 for a decay that all rows or tokens share. With `cu_seqlens` (n + 1,), B is 1,
    the row holds n sequences one after the other, and state is (n, H, K, V). Returns the output (B, T, H, V) in v's
    dtype and the final state in float32, shaped like `state`.
    """
    if compiled_wkv6 is not None and is_compiled(k, "wkv6"):
        return compiled_wkv6(r, log_w, u, k, v, state, cu_seqlens)
    if r.shape[1] == 1:
        return naive_recurrent_wkv6(r, log_w, u, k, v, state, cu_seqlens)
    return chunk_wkv6(r, log_w, u, k, v, state, cu_seqlens)


@in_full_precision
def naive_recurrent_wkv6(r, log_w, u, k, v, state=None, cu_seqlens=None):
    """The definition: one step per token, everything in float32 (float64 when given float64).

        o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)        S_t = diag(exp(log_w_t)) S_{t-1} + k_t^T v_t

    Shapes and returns as in `wkv6`.
    """
    log_w = log_w.expand_as(r)
    if cu_seqlens is not None:
        return _each_sequence(naive_recurrent_wkv6, r, log_w, u, k, v, state, cu_seqlens)
    dtype = v.dtype
    r, log_w, u, k, v = (to_float(x) for x in (r, log_w, u, k, v))
    S = initial_state(k, v, state)
    outputs = []
    for t in range(r.shape[1]):
        kv = outer(k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S + u.unsqueeze(-1) * kv))
        S = log_w[:, t].exp().unsqueeze(-1) * S + kv
    return (torch.stack(outputs, 1) if outputs else v).to(dtype), S


@in_full_precision
def chunk_wkv6(r, log_w, u, k, v, state=None, cu_seqlens=None):
    """The same operator by chunks of 16 tokens, whose pairs of tokens are computed one by one: no decay can overflow.

    Shapes and returns as in `wkv6`.
    """
    log_w = log_w.expand_as(r)
    if cu_seqlens is not None:
        return _each_sequence(chunk_wkv6, r, log_w, u, k, v, state, cu_seqlens)
    dtype, T = v.dtype, r.shape[1]
    n = min(CHUNK_LENGTH, T)
    r, log_w, u, k, v = (to_float(x) for x in (r, log_w, u, k, v))
    S = initial_state(k, v, state)
    if T == 0:
        return v.to(dtype), S
    r, log_w, k, v = (chunks(x, n) for x in (r, log_w, k, v))  # (B, H, chunks, n, K)

    # What decays token j until token i reads it is a sum of its own: differences of sums from the chunk's start would
    # lose a weak decay beside a strong one, and -inf makes them NaN.
    before = F.pad(log_w, (0, 0, 1, -1))
    later = torch.ones(n, n, dtype=torch.bool, device=k.device).tril(-2).unsqueeze(-1)
    between = torch.where(later, before.unsqueeze(-2), 0).cumsum(-3)  # (B, H, chunks, n, n, K)
    weights = torch.einsum("bhcik,bhcjk,bhcijk->bhcij", r, k, between.exp()).tril(-1)
    bonus = (r * u[:, None, None] * k).sum(-1, keepdim=True)
    within = weights @ v + bonus * v
    r_start, carried = r * before.cumsum(-2).exp(), log_w.sum(-2, keepdim=True).mT.exp()
    k_end = k * F.pad(log_w, (0, 0, -1, 1)).flip(-2).cumsum(-2).flip(-2).exp()
    outputs = []
    for i in range(k.shape[2]):
        outputs.append(within[:, :, i] + r_start[:, :, i] @ S)
        S = carried[:, :, i] * S + k_end[:, :, i].mT @ v[:, :, i]
    return torch.cat(outputs, 2).transpose(1, 2)[:, :T].to(dtype), S


def _each_sequence(op, r, log_w, u, k, v, state, cu_seqlens):
    return each_sequence(
        lambda r, log_w, k, v, state: op(r, log_w, u, k, v, state), (r, log_w, k, v), v, state, cu_seqlens
    )
