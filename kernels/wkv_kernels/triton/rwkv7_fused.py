"""The pieces of rwkv7_fused in Triton: one kernel for each direction, and one that adds up gradients of parameters.

Letters: B batch rows, T tokens, C channels, H heads of N channels, g_* gradients; token n of all rows is token t of row
b. `rows` are memory and its strides along rows and tokens, `at` are b, t, channels and which of them there are.

Everything is read once, computed in float32 and written once. A program takes a tile of a few tokens. Where it must
add up gradients of parameters it takes a run of tokens, one by one, and adds them up in registers; its sums are one row
of `parts`, and `add_parts_kernel` adds the rows in their order: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG_DECAY_SCALE = tl.constexpr(-0.6065306597126334)
SMALLEST_NORM = tl.constexpr(1e-12)

# Arguments whose divisors compile nothing anew: one kernel serves every number of tokens.
SIZES = ("T", "n_tokens", "length", "n_parts")

# Values of a tile, its channels where it is not made of heads, warps: 16 values a thread, one load of a warp a row.
TILE, TILE_CHANNELS, TILE_WARPS = 2048, 256, 4
# The same of one token in a run, whose sums stay in registers: 4 values a thread.
RUN_CHANNELS, RUN_WARPS = 256, 2
# Programs that keep a GPU busy; tokens of a run, unless that makes too many parts.
PROGRAMS, SHORTEST_RUN, LONGEST_RUN, MOST_PARTS = 2048, 16, 128, 1024
PARTS_TILE, PARTS_CHANNELS = 32, 64


@triton.jit
def _address(rows, at):
    return rows[0] + at[0].to(tl.int64) * rows[1] + at[1].to(tl.int64) * rows[2] + at[2]


@triton.jit
def _load(rows, at):
    return tl.load(_address(rows, at), mask=at[3], other=0).to(tl.float32)


@triton.jit
def _store(rows, at, value):
    tl.store(_address(rows, at), value, mask=at[3])


@triton.jit
def _vector(x, at):
    return tl.load(x + at[2], mask=at[3], other=0).to(tl.float32)


@triton.jit
def _only(at, condition):
    return at[0], at[1], at[2], tl.where(condition, at[3], False)


@triton.jit
def _tile(T, n_tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """`at` of a program's tile: tokens (ROWS, 1), channels (1, CHANNELS)."""
    n_blocks = tl.cdiv(C, CHANNELS)
    n = tl.program_id(0) // n_blocks * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return n // T, n % T, channel, (n < n_tokens) & (channel < C)


@triton.jit
def _head_tile(T, n_tokens, H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """As `_tile`, a row being one head of a token: channels (ROWS, CHANNELS)."""
    row, i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    n = row // H
    return n // T, n % T, row % H * N + i, (n < n_tokens) & (i < N)


@triton.jit
def _run(n_tokens, length, n_blocks):
    """Of a program's run of tokens: its number, its first token and the one after its last, and the channels' block."""
    run = tl.program_id(0) // n_blocks
    return run, run * length, tl.minimum((run + 1) * length, n_tokens), tl.program_id(0) % n_blocks


@triton.jit
def _heads(block, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels (HEADS, CHANNELS) of a block of heads, and which of them there are."""
    head, i = block * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, CHANNELS)[None, :]
    return head * N + i, (head < H) & (i < N)


@triton.jit
def _store_parts(parts, run, C, channel, inside, sums, count: tl.constexpr):
    for i in tl.static_range(count):
        tl.store(parts + (run * count + i) * C + channel, sums[i], mask=inside)


@triton.jit(do_not_specialize=SIZES)
def add_parts_kernel(parts, sums, n_parts, C, count: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, n_parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        inside = (part < n_parts) & (channel < C)
        total += tl.load(parts + (part * count + tl.program_id(1)) * C + channel, mask=inside, other=0)
    total = tl.sum(total, 0, keep_dims=True)
    for i in tl.static_range(count):
        if tl.program_id(1) == i:
            tl.store(sums[i] + channel, total, mask=channel < C)


@triton.jit
def _previous(x, before, each: tl.constexpr, at):
    if each:
        return _load(before, at)
    previous = _load(x, _only((at[0], at[1] - 1, at[2], at[3]), at[1] > 0))
    if before is not None:
        previous += _load(before, _only(at, at[1] == 0))
    return previous


@triton.jit(do_not_specialize=SIZES)
def shift_mix_kernel(
    x, before, mixes, mixed, T, n_tokens, C, each: tl.constexpr, count: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    at = _tile(T, n_tokens, C, ROWS, CHANNELS)
    own = _load(x, at)
    delta = _previous(x, before, each, at) - own
    for i in tl.static_range(count):
        mix = tl.load(mixes[i] + at[2], mask=at[2] < C, other=0).to(tl.float32)
        _store(mixed[i], at, own + delta * mix)


@triton.jit(do_not_specialize=SIZES)
def shift_mix_backward_kernel(
    x, before, mixes, g_mixed, g_x, g_before, parts, T, n_tokens, length, C, each: tl.constexpr, count: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    run, begin, end, block = _run(n_tokens, length, tl.cdiv(C, CHANNELS))
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    inside, zeros = channel < C, tl.zeros((CHANNELS,), tl.float32)
    weights, sums, from_next = (), (), zeros
    for i in tl.static_range(count):
        weights += (tl.load(mixes[i] + channel, mask=inside, other=0).to(tl.float32),)
        sums += (zeros,)
    if not each:
        following = _only((end // T, end % T, channel, inside), (end < n_tokens) & (end % T > 0))
        for i in tl.static_range(count):
            from_next += _load(g_mixed[i], following) * weights[i]
    # Backwards, so that each token gets from the next one what that took from it.
    for n in range(end - 1, begin - 1, -1):
        at = (n // T, n % T, channel, inside)
        delta = _previous(x, before, each, at) - _load(x, at)
        own, to_previous, sums_so_far = from_next, zeros, sums
        sums = ()
        for i in tl.static_range(count):
            g = _load(g_mixed[i], at)
            own += g
            to_previous += g * weights[i]
            sums += (sums_so_far[i] + g * delta,)
        _store(g_x, at, own - to_previous)
        if each:
            _store(g_before, at, to_previous)
        else:
            if before is not None:
                _store(g_before, _only(at, at[1] == 0), to_previous)
            from_next = tl.where(at[1] > 0, to_previous, 0.0)
    _store_parts(parts, run, C, channel, inside, sums, count)


@triton.jit(do_not_specialize=SIZES)
def value_residual_kernel(v, v_first, raw, mixed, T, n_tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    at = _tile(T, n_tokens, C, ROWS, CHANNELS)
    own = _load(v, at)
    _store(mixed, at, own + (_load(v_first, at) - own) * tl.sigmoid(_load(raw, at)))


@triton.jit(do_not_specialize=SIZES)
def value_residual_backward_kernel(
    v, v_first, raw, g_mixed, g_v, g_v_first, g_raw, T, n_tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    at = _tile(T, n_tokens, C, ROWS, CHANNELS)
    difference, share, g = _load(v_first, at) - _load(v, at), tl.sigmoid(_load(raw, at)), _load(g_mixed, at)
    _store(g_v, at, g * (1 - share))
    _store(g_v_first, at, g * share)
    _store(g_raw, at, g * difference * share * (1 - share))


@triton.jit
def _positive(x):
    # NaN stays what it is.
    return tl.where(x < 0, 0.0, x)


@triton.jit(do_not_specialize=SIZES)
def relu_squared_kernel(x, y, T, n_tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    at = _tile(T, n_tokens, C, ROWS, CHANNELS)
    positive = _positive(_load(x, at))
    _store(y, at, positive * positive)


@triton.jit(do_not_specialize=SIZES)
def relu_squared_backward_kernel(x, g_y, g_x, T, n_tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    at = _tile(T, n_tokens, C, ROWS, CHANNELS)
    _store(g_x, at, 2 * _positive(_load(x, at)) * _load(g_y, at))


@triton.jit
def _direction(z):
    """z divided by the norm of each row, and that norm."""
    norm = tl.sqrt(tl.sum(z * z, 1, keep_dims=True))
    norm = tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm)
    return z / norm, norm


@triton.jit(do_not_specialize=SIZES)
def key_stage_kernel(
    raw_w, raw_k, raw_a, k_k, k_a, log_w, k, a, b, T, n_tokens, H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    at = _head_tile(T, n_tokens, H, N, ROWS, CHANNELS)
    key, rate = _load(raw_k, at), tl.sigmoid(_load(raw_a, at))
    kk, _ = _direction(key * _vector(k_k, at))
    _store(log_w, at, tl.sigmoid(_load(raw_w, at)) * LOG_DECAY_SCALE)
    _store(k, at, key * (1 + (rate - 1) * _vector(k_a, at)))
    _store(a, at, -kk)
    _store(b, at, kk * rate)


@triton.jit(do_not_specialize=SIZES)
def key_stage_backward_kernel(
    raw_w, raw_k, raw_a, k_k, k_a, g_log_w, g_k, g_a, g_b, g_raw_w, g_raw_k, g_raw_a, parts, T, n_tokens, length,
    H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    run, begin, end, block = _run(n_tokens, length, tl.cdiv(H, HEADS))
    channel, inside = _heads(block, H, N, HEADS, CHANNELS)
    of_direction, of_rate = _vector(k_k, (0, 0, channel, inside)), _vector(k_a, (0, 0, channel, inside))
    zeros = tl.zeros((HEADS, CHANNELS), tl.float32)
    sum_k_k, sum_k_a = zeros, zeros
    for n in range(begin, end):
        at = (n // T, n % T, channel, inside)
        keep, key, rate = tl.sigmoid(_load(raw_w, at)), _load(raw_k, at), tl.sigmoid(_load(raw_a, at))
        gk, gb = _load(g_k, at), _load(g_b, at)
        kk, norm = _direction(key * of_direction)
        gkk = gb * rate - _load(g_a, at)
        # A norm at its lower bound does not depend on the key.
        along = tl.where(norm > SMALLEST_NORM, tl.sum(kk * gkk, 1, keep_dims=True), 0.0)
        gz = (gkk - kk * along) / norm
        _store(g_raw_w, at, _load(g_log_w, at) * LOG_DECAY_SCALE * keep * (1 - keep))
        _store(g_raw_k, at, gz * of_direction + gk * (1 + (rate - 1) * of_rate))
        _store(g_raw_a, at, (gk * key * of_rate + gb * kk) * rate * (1 - rate))
        sum_k_k += gz * key
        sum_k_a += gk * key * (rate - 1)
    _store_parts(parts, run, H * N, channel, inside, (sum_k_k, sum_k_a), 2)


@triton.jit
def _normalise(o, inside, N: tl.constexpr, eps):
    """o with mean 0 and variance 1 in each row of N channels, and the factor of that."""
    centred = tl.where(inside, o - tl.sum(o, 1, keep_dims=True) / N, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / N + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=SIZES)
def out_stage_kernel(
    o, r, k, v, g, r_k, weight, bias, y, eps, T, n_tokens, H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    at = _head_tile(T, n_tokens, H, N, ROWS, CHANNELS)
    normed, _ = _normalise(_load(o, at), at[3], N, eps)
    bonus = tl.sum(_load(r, at) * _load(k, at) * _vector(r_k, at), 1, keep_dims=True)
    y_before_gate = normed * _vector(weight, at) + _vector(bias, at) + bonus * _load(v, at)
    _store(y, at, y_before_gate * _load(g, at))


@triton.jit(do_not_specialize=SIZES)
def out_stage_backward_kernel(
    o, r, k, v, g, r_k, weight, bias, g_y, g_o, g_r, g_k, g_v, g_g, eps, parts, T, n_tokens, length, H: tl.constexpr,
    N: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    run, begin, end, block = _run(n_tokens, length, tl.cdiv(H, HEADS))
    channel, inside = _heads(block, H, N, HEADS, CHANNELS)
    of_bonus = _vector(r_k, (0, 0, channel, inside))
    factor, shift = _vector(weight, (0, 0, channel, inside)), _vector(bias, (0, 0, channel, inside))
    zeros = tl.zeros((HEADS, CHANNELS), tl.float32)
    sum_r_k, sum_weight, sum_bias = zeros, zeros, zeros
    for n in range(begin, end):
        at = (n // T, n % T, channel, inside)
        normed, scale = _normalise(_load(o, at), inside, N, eps)
        rr, kk, value, gate, gy = _load(r, at), _load(k, at), _load(v, at), _load(g, at), _load(g_y, at)
        gz = gy * gate
        bonus, g_bonus = tl.sum(rr * kk * of_bonus, 1, keep_dims=True), tl.sum(gz * value, 1, keep_dims=True)
        g_normed = gz * factor
        mean, along = tl.sum(g_normed, 1, keep_dims=True) / N, tl.sum(g_normed * normed, 1, keep_dims=True) / N
        _store(g_o, at, (g_normed - mean - normed * along) * scale)
        _store(g_r, at, g_bonus * kk * of_bonus)
        _store(g_k, at, g_bonus * rr * of_bonus)
        _store(g_v, at, gz * bonus)
        _store(g_g, at, gy * (normed * factor + shift + bonus * value))
        sum_r_k += g_bonus * rr * kk
        sum_weight += gz * normed
        sum_bias += gz
    _store_parts(parts, run, H * N, channel, inside, (sum_r_k, sum_weight, sum_bias), 3)


def _rows(x: Tensor | None) -> tuple[Tensor, int, int] | None:
    """(B, T, A), (B, T, H, N), or (B, A), one token a row; None for None."""
    if x is None:
        return None
    strides = x.stride()
    if strides[-1] != 1 or (len(strides) == 4 and strides[2] != x.shape[3]):
        x = x.contiguous()
        strides = x.stride()
    return x, strides[0], strides[1] if len(strides) > 2 else 0


def _all_rows(*tensors: Tensor | None) -> tuple[tuple[Tensor, int, int] | None, ...]:
    return tuple(_rows(x) for x in tensors)


def _vectors(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _on_tiles(kernel, x: Tensor, *arguments, **constants) -> None:
    """Runs a kernel on the tokens (B, T, C) of x."""
    B, T, C = x.shape
    channels = min(TILE_CHANNELS, triton.next_power_of_2(C))
    rows = TILE // channels
    programs = triton.cdiv(B * T, rows) * triton.cdiv(C, channels)
    kernel[programs,](*arguments, T, B * T, C, ROWS=rows, CHANNELS=channels, num_warps=TILE_WARPS, **constants)


def _on_head_tiles(kernel, x: Tensor, *arguments) -> None:
    """Runs a kernel on the heads (B, T, H, N) of x."""
    B, T, H, N = x.shape
    channels = triton.next_power_of_2(N)
    rows = max(1, TILE // channels)
    programs = triton.cdiv(B * T * H, rows)
    kernel[programs,](*arguments, T, B * T, H=H, N=N, ROWS=rows, CHANNELS=channels, num_warps=TILE_WARPS)


def _on_runs(kernel, x: Tensor, n_blocks: int, sums: list[Tensor], *arguments, **constants) -> None:
    """Runs a kernel on runs of the tokens of x, whose channels are n_blocks blocks, and adds up its `sums`."""
    n_tokens, C = x.shape[:2].numel(), x.shape[2:].numel()
    length = min(LONGEST_RUN, max(SHORTEST_RUN, triton.cdiv(n_tokens * n_blocks, PROGRAMS)))
    length = max(length, triton.cdiv(n_tokens, MOST_PARTS))
    n_parts, count = triton.cdiv(n_tokens, length), len(sums)
    parts = torch.empty((n_parts, count, C), dtype=torch.float32, device=x.device)
    arguments = *arguments, parts, x.shape[1], n_tokens, length
    kernel[n_parts * n_blocks,](*arguments, num_warps=RUN_WARPS, **constants)
    grid = triton.cdiv(C, PARTS_CHANNELS), count
    add_parts_kernel[grid](parts, tuple(sums), n_parts, C, count, PARTS_TILE, PARTS_CHANNELS, num_warps=4)


def _on_head_runs(kernel, x: Tensor, sums: list[Tensor], *arguments) -> None:
    """Runs a kernel on runs of the heads (B, T, H, N) of x, and adds up its `sums`."""
    H, N = x.shape[2:]
    channels = triton.next_power_of_2(N)
    heads = max(1, min(RUN_CHANNELS // channels, triton.next_power_of_2(H)))
    _on_runs(kernel, x, triton.cdiv(H, heads), sums, *arguments, H=H, N=N, HEADS=heads, CHANNELS=channels)


def rwkv7_shift_mix(inputs, outputs) -> None:
    x, before, mixes, _ = inputs
    each = before is not None and before.dim() == 3
    arguments = _rows(x), _rows(before), _vectors(*mixes), _all_rows(*outputs)
    _on_tiles(shift_mix_kernel, x, *arguments, each=each, count=len(mixes))


def rwkv7_shift_mix_backward(inputs, g_outputs, g_inputs) -> None:
    x, before, mixes, _ = inputs
    g_x, *sums = g_inputs
    g_before = None if before is None else sums.pop(0)
    # It is written with the gradient of a row's first token.
    if g_before is not None and x.shape[1] == 0:
        g_before.zero_()
    C, channels = x.shape[2], min(RUN_CHANNELS, triton.next_power_of_2(x.shape[2]))
    arguments = *_all_rows(x, before), _vectors(*mixes), _all_rows(*g_outputs), *_all_rows(g_x, g_before)
    constants = {"each": before is not None and before.dim() == 3, "count": len(mixes), "CHANNELS": channels}
    _on_runs(shift_mix_backward_kernel, x, triton.cdiv(C, channels), sums, *arguments, C=C, **constants)


def rwkv7_key_stage(inputs, outputs) -> None:
    arguments = *_all_rows(*inputs[:3]), *_vectors(*inputs[3:5]), *_all_rows(*outputs)
    _on_head_tiles(key_stage_kernel, outputs[0], *arguments)


def rwkv7_key_stage_backward(inputs, g_outputs, g_inputs) -> None:
    arguments = *_all_rows(*inputs[:3]), *_vectors(*inputs[3:5]), *_all_rows(*g_outputs, *g_inputs[:3])
    _on_head_runs(key_stage_backward_kernel, g_outputs[0], g_inputs[3:], *arguments)


def rwkv7_value_residual(inputs, outputs) -> None:
    _on_tiles(value_residual_kernel, inputs[0], *_all_rows(*inputs, *outputs))


def rwkv7_value_residual_backward(inputs, g_outputs, g_inputs) -> None:
    _on_tiles(value_residual_backward_kernel, inputs[0], *_all_rows(*inputs, *g_outputs, *g_inputs))


def rwkv7_out_stage(inputs, outputs) -> None:
    arguments = *_all_rows(*inputs[:5]), *_vectors(*inputs[5:8]), *_all_rows(*outputs), inputs[8]
    _on_head_tiles(out_stage_kernel, inputs[0], *arguments)


def rwkv7_out_stage_backward(inputs, g_outputs, g_inputs) -> None:
    arguments = *_all_rows(*inputs[:5]), *_vectors(*inputs[5:8]), *_all_rows(*g_outputs, *g_inputs[:5]), inputs[8]
    _on_head_runs(out_stage_backward_kernel, inputs[0], g_inputs[5:], *arguments)


def rwkv7_relu_squared(inputs, outputs) -> None:
    _on_tiles(relu_squared_kernel, inputs[0], *_all_rows(*inputs, *outputs))


def rwkv7_relu_squared_backward(inputs, g_outputs, g_inputs) -> None:
    _on_tiles(relu_squared_backward_kernel, inputs[0], *_all_rows(*inputs, *g_outputs, *g_inputs))
