"""The operator wkv4 in Triton: a program walks through the tokens of some channels of a sequence.

Letters: T tokens, C channels; a, b, p the state of a channel, A = a e^p and B = b e^p; m = a / b, the mean of the
values so far. p is kept in two parts, `high` and `low`: a constant decay would be rounded alike in every step. Updates
and outputs weigh the past and the token by e^(p - q) and e^(s - q), q the larger of p and the token's exponent s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The p of an empty state: its weight is zero beside any key.
EMPTY = tl.constexpr(-1e38)
# Erases every state, and can be added and subtracted.
LOWEST = tl.constexpr(-1e30)

# Channels of a program, and how many tokens ahead their rows are asked for.
CHANNELS = 64
STAGES = 4


@triton.jit
def _add(high, low, x):
    """high + low + x, again in two parts."""
    total = high + x
    added = total - high
    return total, low + ((high - (total - added)) + (x - added))


@triton.jit
def _weigh(difference):
    """Weights of the past and the token, given p - s; the larger is 1."""
    less = tl.exp(-tl.abs(difference))
    return tl.where(difference >= 0, 1.0, less), tl.where(difference >= 0, less, 1.0)


@triton.jit
def _output_weights(high, low, u, k):
    """u + k would lose digits of u."""
    return _weigh(((high - k) - u) + low)


@triton.jit
def _update_weights(high, low, w, k):
    """And p of the state with the token."""
    high, low = _add(high, low, w)
    difference = (high - k) + low
    past, token = _weigh(difference)
    return past, token, tl.where(difference >= 0, high, k), tl.where(difference >= 0, low, 0.0)


@triton.jit
def _tokens(cu_seqlens, sequence, T):
    """First token of a sequence among those of all rows, and the one after its last."""
    begin, end = sequence * T, sequence * T + T
    if cu_seqlens is not None:
        begin = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0)
        end = tl.maximum(tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), T), begin)
    return begin, end


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_decay(log_w, row_stride, token_stride, t, T, c, inside):
    x = _load(log_w, t // T * row_stride + t % T * token_stride + c, inside)
    # Written so that NaN stays.
    return tl.where(x < LOWEST, LOWEST, x)


@triton.jit
def _load_state(state, at, inside, zeros):
    """a, b and p; an empty state where there is none."""
    a, b, p = zeros, zeros, zeros + EMPTY
    if state is not None:
        a = _load(state, at, inside)
        b = _load(state, at + 1, inside)
        p = tl.where(b == 0, EMPTY, _load(state, at + 2, inside))
    return a, b, p


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    log_w, u, k, v, row_stride, token_stride, state, o, final, cu_seqlens, T, C,
    BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs and final state of BC channels of a sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    begin, end = _tokens(cu_seqlens, sequence, T)
    own = (sequence * C + c) * 3
    a, b, high = _load_state(state, own, inside, tl.zeros([BC], tl.float32))
    low = tl.zeros([BC], tl.float32)
    bonus = _load(u, c, inside)
    for t in tl.range(begin, end, num_stages=STAGES):
        key, value = _load(k, t * C + c, inside), _load(v, t * C + c, inside)
        w = _load_decay(log_w, row_stride, token_stride, t, T, c, inside)
        past, token = _output_weights(high, low, bonus, key)
        y = (past * a + token * value) / (past * b + token)
        tl.store(o + t * C + c, y.to(o.dtype.element_ty), mask=inside)
        past, token, high, low = _update_weights(high, low, w, key)
        a = past * a + token * value
        b = past * b + token
    # p goes out as one number; a and b take what it cannot hold.
    rest = tl.exp(low)
    tl.store(final + own, a * rest, mask=inside)
    tl.store(final + own + 1, b * rest, mask=inside)
    tl.store(final + own + 2, high, mask=inside)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    log_w, u, k, v, gy, row_stride, token_stride, state, grad_final, kept,
    gw, gu, gk, gv, grad_state, cu_seqlens, T, C, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of BC channels of a sequence; derivation in kernels/README.md.

    `kept` (B T, 4, C) gets m, b, and p in two parts, before every token.
    """
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    begin, end = _tokens(cu_seqlens, sequence, T)
    own = (sequence * C + c) * 3
    zeros = tl.zeros([BC], tl.float32)
    a, b0, high = _load_state(state, own, inside, zeros)
    m0 = tl.where(b0 == 0, 0.0, a / b0)
    bonus = _load(u, c, inside)
    m, b, low = m0, b0, zeros
    for t in tl.range(begin, end, num_stages=STAGES):
        at = kept + t * 4 * C + c
        tl.store(at, m, mask=inside)
        tl.store(at + C, b, mask=inside)
        tl.store(at + 2 * C, high, mask=inside)
        tl.store(at + 3 * C, low, mask=inside)
        w = _load_decay(log_w, row_stride, token_stride, t, T, c, inside)
        past, token, high, low = _update_weights(high, low, w, _load(k, t * C + c, inside))
        b = past * b + token
        m += (_load(v, t * C + c, inside) - m) * (token / b)
    # Other threads of the program may read what this one has kept.
    tl.debug_barrier()
    ga, gb = zeros, zeros
    if grad_final is not None:
        ga, gb = _load(grad_final, own, inside), _load(grad_final, own + 1, inside)
    # z takes the place of gb: it and ga m nearly cancel.
    z = ga * m + gb
    sum_high, sum_low = zeros, zeros
    for step in tl.range(0, end - begin, num_stages=STAGES):
        t = end - 1 - step
        at = t * 4 * C + c
        m, b = _load(kept, at, inside), _load(kept, at + C, inside)
        high, low = _load(kept, at + 2 * C, inside), _load(kept, at + 3 * C, inside)
        key, g = _load(k, t * C + c, inside), _load(gy, t * C + c, inside)
        w = _load_decay(log_w, row_stride, token_stride, t, T, c, inside)
        difference = _load(v, t * C + c, inside) - m
        # What the output passes on.
        past, token = _output_weights(high, low, bonus, key)
        share = 1.0 / (past * b + token)
        g *= share
        through_mean = past * token * g * difference * share
        through_bonus = b * through_mean
        grad_value = token * g
        to_a = past * g
        past, token, high, low = _update_weights(high, low, w, key)
        scaled = difference / (past * b + token)
        z_before = z - ga * (scaled * token)
        grad_key = through_bonus + token * (ga * (scaled * past * b) + z)
        grad_value += token * ga
        tl.store(gk + t * C + c, grad_key.to(gk.dtype.element_ty), mask=inside)
        tl.store(gv + t * C + c, grad_value.to(gv.dtype.element_ty), mask=inside)
        tl.store(gw + t * C + c, (past * b * z_before).to(gw.dtype.element_ty), mask=inside)
        sum_high, sum_low = _add(sum_high, sum_low, through_bonus)
        ga = past * ga + to_a
        z = past * z_before - through_mean
    tl.store(gu + sequence * C + c, sum_high + sum_low, mask=inside)
    # Without a token the final state is the initial one, but for its p.
    empty = begin == end
    tl.store(grad_state + own, ga, mask=inside)
    tl.store(grad_state + own + 1, tl.where(empty, gb, z - ga * m0), mask=inside)
    tl.store(grad_state + own + 2, tl.where(empty, 0.0, b0 * z), mask=inside)


def _rows(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple:
    """The inputs as kernels read them, and the strides of log_w: 0 where rows or tokens share one."""
    if log_w.stride(2) != 1:
        log_w = log_w.contiguous()
    strides = [log_w.stride(i) if log_w.shape[i] > 1 else 0 for i in (0, 1)]
    return (log_w, u.contiguous(), k.contiguous(), v.contiguous()), strides


def _sequences(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def forward(log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """o and the final state; arguments as in the operator."""
    rows, strides = _rows(log_w, u, k, v)
    _, T, C = k.shape
    sequences = _sequences(k, cu_seqlens)
    o = torch.empty_like(rows[3])
    final = k.new_empty((sequences, C, 3), dtype=torch.float32)
    if final.numel() > 0:
        state, cu_seqlens = (None if x is None else x.contiguous() for x in (state, cu_seqlens))
        grid = sequences, triton.cdiv(C, CHANNELS)
        forward_kernel[grid](
            *rows, *strides, state, o, final, cu_seqlens, T, C, BC=CHANNELS, STAGES=STAGES, num_warps=1
        )
    return o, final


def backward(grad_o, grad_final_state, log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, ...]:
    """The gradients of log_w, u, k, v and state; arguments as in the operator."""
    rows, strides = _rows(log_w, u, k, v)
    B, T, C = k.shape
    sequences = _sequences(k, cu_seqlens)
    gy = torch.zeros_like(rows[3]) if grad_o is None else grad_o.contiguous()
    gk, gv = torch.empty_like(rows[2]), torch.empty_like(rows[3])
    shared = log_w.shape != k.shape
    gw = k.new_empty(k.shape, dtype=torch.float32 if shared else log_w.dtype)
    gu = k.new_empty((sequences, C), dtype=torch.float32)
    grad_state = k.new_empty((sequences, C, 3), dtype=torch.float32)
    if grad_state.numel() > 0:
        kept = k.new_empty((B * T, 4, C), dtype=torch.float32)
        state, gradient, cu_seqlens = (
            None if x is None else x.contiguous() for x in (state, grad_final_state, cu_seqlens)
        )
        backward_kernel[sequences, triton.cdiv(C, CHANNELS)](
            *rows, gy, *strides, state, gradient, kept, gw, gu, gk, gv, grad_state, cu_seqlens, T, C,
            BC=CHANNELS, STAGES=STAGES, num_warps=1,
        )  # fmt: skip
    if shared:
        gw = gw.sum([i for i in (0, 1) if log_w.shape[i] == 1], keepdim=True).to(log_w.dtype)
    return gw, gu.sum(0).to(u.dtype), gk, gv, grad_state
