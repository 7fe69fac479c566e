"""The WKV operator of RWKV-4, defined in plain PyTorch.

Glossary: B batch, T time, C channels; `log_w` logarithm of the decay (<= 0), `u` bonus of the current token, `k` key,
`v` value. The state of a channel is three float32 numbers: the weighted sum of values is a e^p, the sum of weights
b e^p. `p` only keeps both in range, whatever k is: no gradient flows into it.

`naive_recurrent_wkv4` is the definition. `scan_wkv4` computes the same in log2(T) steps over whole sequences and is
what a machine without the compiled kernels runs. `wkv4` picks the compiled kernel where there is one.

Source: "RWKV: Reinventing RNNs for the Transformer Era" (2023), section 3 and appendix D.
"""

import torch
import torch.nn.functional as F

from .wkv_operators import each_sequence, in_full_precision, is_compiled, to_float

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels.wkv4 import wkv4 as compiled_wkv4
except ImportError:
    compiled_wkv4 = None

# The p of an empty state: its weight is zero beside any key.
EMPTY = -1e38


def wkv4(log_w, u, k, v, state=None, cu_seqlens=None):
    """The WKV operator of RWKV-4, by the fastest implementation for the tensors' device.

    Shapes: k, v (B, T, C), u (C,), state (B, C, 3) float32 with a, b, p in this order, or None for an empty one; log_w
    (B, T, C), where B and T may be 1 for a decay that all rows or tokens share. A channel with b = 0 is empty, whatever
    its p. With `cu_seqlens` (n + 1,), B is 1, the row holds n sequences one after the other, and state is (n, C, 3).
    Returns the output (B, T, C) in v's dtype and the final state in float32, shaped like `state`.
    """
    if compiled_wkv4 is not None and is_compiled(k, "wkv4"):
        return compiled_wkv4(log_w, u, k, v, state, cu_seqlens)
    if k.shape[1] == 1:
        return naive_recurrent_wkv4(log_w, u, k, v, state, cu_seqlens)
    return scan_wkv4(log_w, u, k, v, state, cu_seqlens)


@in_full_precision
def naive_recurrent_wkv4(log_w, u, k, v, state=None, cu_seqlens=None):
    """The definition: one step per token, everything in float32 (float64 when given float64).

        o_t = (A_{t-1} + e^(u + k_t) v_t) / (B_{t-1} + e^(u + k_t))
        A_t = e^(log_w_t) A_{t-1} + e^(k_t) v_t        B_t = e^(log_w_t) B_{t-1} + e^(k_t)

    with A = a e^p and B = b e^p, where p is the largest exponent so far. Shapes and returns as in `wkv4`.
    """
    log_w = log_w.expand_as(k)
    if cu_seqlens is not None:
        return _each_sequence(naive_recurrent_wkv4, log_w, u, k, v, state, cu_seqlens)
    dtype = v.dtype
    log_w, u, k, v = (to_float(x) for x in (log_w, u, k, v))
    a, b, p = _initial_state(k, state)
    outputs = []
    for t in range(k.shape[1]):
        q = torch.maximum(p, u + k[:, t]).detach()
        old, new = (p - q).exp(), (u + k[:, t] - q).exp()
        outputs.append((old * a + new * v[:, t]) / (old * b + new))
        q = torch.maximum(p + log_w[:, t], k[:, t]).detach()
        old, new = (p + log_w[:, t] - q).exp(), (k[:, t] - q).exp()
        a, b, p = old * a + new * v[:, t], old * b + new, q
    return (torch.stack(outputs, 1) if outputs else v).to(dtype), torch.stack([a, b, p.detach()], -1)


@in_full_precision
def scan_wkv4(log_w, u, k, v, state=None, cu_seqlens=None):
    """The same operator by a parallel scan: what 2, 4, 8 ... neighbouring tokens do to the state, all at a time.

    Shapes and returns as in `wkv4`.
    """
    log_w = log_w.expand_as(k)
    if cu_seqlens is not None:
        return _each_sequence(scan_wkv4, log_w, u, k, v, state, cu_seqlens)
    dtype, T = v.dtype, k.shape[1]
    log_w, u, k, v = (to_float(x) for x in (log_w, u, k, v))
    first = [x.unsqueeze(1) for x in _initial_state(k, state)]
    # Token t as (a, b, p) and its decay; the initial state stands before the first token.
    a, b, p = (torch.cat([x, y], 1) for x, y in zip(first, (v, torch.ones_like(v), k), strict=True))  # (B, T + 1, C)
    decay = F.pad(log_w, (0, 0, 1, 0))
    distance = 1
    while distance <= T:
        q = torch.maximum(p[:, :-distance] + decay[:, distance:], p[:, distance:]).detach()
        old, new = (p[:, :-distance] + decay[:, distance:] - q).exp(), (p[:, distance:] - q).exp()
        a = torch.cat([a[:, :distance], old * a[:, :-distance] + new * a[:, distance:]], 1)
        b = torch.cat([b[:, :distance], old * b[:, :-distance] + new * b[:, distance:]], 1)
        p = torch.cat([p[:, :distance], q], 1)
        decay = torch.cat([decay[:, :distance], decay[:, :-distance] + decay[:, distance:]], 1)
        distance *= 2
    q = torch.maximum(p[:, :-1], u + k).detach()
    old, new = (p[:, :-1] - q).exp(), (u + k - q).exp()
    o = (old * a[:, :-1] + new * v) / (old * b[:, :-1] + new)
    return o.to(dtype), torch.stack([a[:, -1], b[:, -1], p[:, -1].detach()], -1)


def _initial_state(k, state):
    """a, b and p, each (B, C)."""
    if state is None:
        zeros = k.new_zeros(k.shape[0], k.shape[2])
        return zeros, zeros, zeros + EMPTY
    a, b, p = state.to(k.dtype).unbind(-1)
    return a, b, torch.where(b == 0, EMPTY, p)


def _each_sequence(op, log_w, u, k, v, state, cu_seqlens):
    return each_sequence(lambda log_w, k, v, state: op(log_w, u, k, v, state), (log_w, k, v), v, state, cu_seqlens)
