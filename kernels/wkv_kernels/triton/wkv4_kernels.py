"""The kernels of wkv4 in Triton: chunks of tokens, all of them at a time, and a short walk from chunk to chunk.

Letters: T tokens, C channels, n tokens of a chunk, R chunks and BC channels of a program; a, b, p the state of a
channel, A = a e^p and B = b e^p; m = a / b, the mean of the values so far; g* gradients, gy that of the output,
z = ga m + gb. p is kept in two parts, `high` and `low`: a constant decay would be rounded alike in every step. Updates
and outputs weigh the past and the token by e^(p - q) and e^(s - q), q the larger of p and the token's exponent s.
"""

import triton
import triton.language as tl

from .common import chunk_tokens, chunks_of

# The p of an empty state: its weight is zero beside any key.
EMPTY = tl.constexpr(-1e38)
# Erases every state, and can be added and subtracted.
LOWEST = tl.constexpr(-1e30)
# The key of a token that is not there: the state stays as it is.
NO_KEY = tl.constexpr(float("-inf"))

# Planes of what is kept of a chunk: a state in two parts of p and the sum of log_w in two; see `pull_kernel`.
STATE_PLANES = tl.constexpr(6)
PULL_PLANES = tl.constexpr(4)


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
def _mean(a, b):
    return tl.where(b == 0, 0.0, a / b)


@triton.jit
def _chunks(bounds, count, T, C, n: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """R chunks and their first tokens (R, 1), BC channels (1, BC), what exists and how many tokens of it (R, BC)."""
    chunk = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    begin, end = chunk_tokens(bounds, tl.minimum(chunk, count - 1), T, n)
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (chunk < count) & (c < C)
    return chunk.to(tl.int64), begin, c, inside, tl.where(inside, tl.minimum(end - begin, n), 0).to(tl.int32)


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_tokens(x, at, length, C, n: tl.constexpr, missing: tl.constexpr):
    """Those of n tokens, one after the other, in float32; `missing` beyond the end."""
    first, rows = x + at, ()
    for i in tl.static_range(n):
        rows += (tl.load(first + i * C, mask=i < length, other=missing).to(tl.float32),)
    return rows


@triton.jit
def _load_decays(log_w, row_stride, token_stride, T, begin, c, length, n: tl.constexpr):
    """log_w of n tokens, zeros beyond the end. `token_stride` is None where all tokens share it."""
    row = begin // tl.maximum(T, 1)
    at = log_w + row * row_stride + c
    if token_stride is not None:
        at += (begin - row * T) * token_stride
    x = tl.load(at, mask=length > 0, other=0.0).to(tl.float32)
    rows = ()
    for i in tl.static_range(n):
        if token_stride is not None and i > 0:
            x = tl.load(at + i * token_stride, mask=i < length, other=0.0).to(tl.float32)
        # Written so that NaN stays.
        rows += (tl.where(i < length, tl.where(x < LOWEST, LOWEST, x), 0.0),)
    return rows


@triton.jit
def _load_initial(state, at, inside, zeros):
    """a, b and p; an empty state where there is none."""
    a, b, p = zeros, zeros, zeros + EMPTY
    if state is not None:
        a = _load(state, at, inside)
        b = _load(state, at + 1, inside)
        p = tl.where(b == 0, EMPTY, _load(state, at + 2, inside))
    return a, b, p


@triton.jit
def _load_before(states, initial, chunk, c, C, inside, zeros):
    """a, b and both parts of p before a chunk; of the initial states where each sequence is one chunk."""
    if states is None:
        a, b, high = _load_initial(initial, (chunk * C + c) * 3, inside, zeros)
        low = zeros
    else:
        at = chunk * STATE_PLANES * C + c
        a, b = _load(states, at, inside), _load(states, at + C, inside)
        high, low = _load(states, at + 2 * C, inside), _load(states, at + 3 * C, inside)
    return a, b, high, low


@triton.jit
def _store_final(final, at, a, b, high, low, inside):
    """p goes out as one number; a and b take what it cannot hold."""
    p = high + low
    rest = tl.exp((high - p) + low)
    tl.store(final + at, a * rest, mask=inside)
    tl.store(final + at + 1, b * rest, mask=inside)
    tl.store(final + at + 2, p, mask=inside)


@triton.jit(do_not_specialize=["T", "count"])
def add_up_kernel(
    log_w, k, v, row_stride, token_stride, states, bounds, count, T, C,
    n: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What chunks make of an empty state, and the sums of their log_w."""
    chunk, begin, c, inside, length = _chunks(bounds, count, T, C, n, R, BC)
    rows = begin * C + c
    keys = _load_tokens(k, rows, length, C, n, NO_KEY)
    values = _load_tokens(v, rows, length, C, n, 0.0)
    decays = _load_decays(log_w, row_stride, token_stride, T, begin, c, length, n)
    zeros = tl.zeros([R, BC], tl.float32)
    a, b, high, low, sum_high, sum_low = zeros, zeros, zeros + EMPTY, zeros, zeros, zeros
    for i in tl.static_range(n):
        past, token, high, low = _update_weights(high, low, decays[i], keys[i])
        a = past * a + token * values[i]
        b = past * b + token
        sum_high, sum_low = _add(sum_high, sum_low, decays[i])
    at = states + chunk * STATE_PLANES * C + c
    tl.store(at, a, mask=inside)
    tl.store(at + C, b, mask=inside)
    tl.store(at + 2 * C, high, mask=inside)
    tl.store(at + 3 * C, low, mask=inside)
    tl.store(at + 4 * C, sum_high, mask=inside)
    tl.store(at + 5 * C, sum_low, mask=inside)


@triton.jit(do_not_specialize=["T"])
def scan_kernel(states, initial, final, first, T, C, n: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr):
    """Puts the states before chunks in the place of what the chunks make of an empty one."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    begin, end = chunks_of(first, sequence, T, n)
    own = (sequence * C + c) * 3
    a, b, high = _load_initial(initial, own, inside, tl.zeros([BC], tl.float32))
    low = tl.zeros([BC], tl.float32)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        at = chunk * STATE_PLANES * C + c
        added_a, added_b = _load(states, at, inside), _load(states, at + C, inside)
        key, key_rest = _load(states, at + 2 * C, inside), _load(states, at + 3 * C, inside)
        decay, decay_rest = _load(states, at + 4 * C, inside), _load(states, at + 5 * C, inside)
        tl.store(states + at, a, mask=inside)
        tl.store(states + at + C, b, mask=inside)
        tl.store(states + at + 2 * C, high, mask=inside)
        tl.store(states + at + 3 * C, low, mask=inside)
        high, low = _add(high, low + decay_rest, decay)
        difference = (high - key) + (low - key_rest)
        past, token = _weigh(difference)
        high, low = tl.where(difference >= 0, high, key), tl.where(difference >= 0, low, key_rest)
        a = past * a + token * added_a
        b = past * b + token * added_b
    _store_final(final, own, a, b, high, low, inside)


@triton.jit(do_not_specialize=["T", "count"])
def output_kernel(
    log_w, u, k, v, row_stride, token_stride, states, initial, o, final, bounds, count, T, C,
    n: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The outputs of chunks, and the final states where each sequence is one chunk."""
    chunk, begin, c, inside, length = _chunks(bounds, count, T, C, n, R, BC)
    rows = begin * C + c
    keys = _load_tokens(k, rows, length, C, n, NO_KEY)
    values = _load_tokens(v, rows, length, C, n, 0.0)
    decays = _load_decays(log_w, row_stride, token_stride, T, begin, c, length, n)
    a, b, high, low = _load_before(states, initial, chunk, c, C, inside, tl.zeros([R, BC], tl.float32))
    bonus = _load(u, c, c < C)
    for i in tl.static_range(n):
        past, token = _output_weights(high, low, bonus, keys[i])
        y = (past * a + token * values[i]) / (past * b + token)
        tl.store(o + rows + i * C, y.to(o.dtype.element_ty), mask=i < length)
        past, token, high, low = _update_weights(high, low, decays[i], keys[i])
        a = past * a + token * values[i]
        b = past * b + token
    if final is not None:
        _store_final(final, (chunk * C + c) * 3, a, b, high, low, inside)


@triton.jit(do_not_specialize=["T", "count"])
def pull_kernel(
    log_w, u, k, v, gy, row_stride, token_stride, states, pulls, bounds, count, T, C,
    n: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """How ga and z before a chunk come from those after it: the share that is left of them, how far the mean moved,
    and what the outputs of the chunk add to each."""
    chunk, begin, c, inside, length = _chunks(bounds, count, T, C, n, R, BC)
    rows = begin * C + c
    keys = _load_tokens(k, rows, length, C, n, NO_KEY)
    values = _load_tokens(v, rows, length, C, n, 0.0)
    grads = _load_tokens(gy, rows, length, C, n, 0.0)
    decays = _load_decays(log_w, row_stride, token_stride, T, begin, c, length, n)
    zeros = tl.zeros([R, BC], tl.float32)
    a, b, high, low = _load_before(states, None, chunk, c, C, inside, zeros)
    bonus = _load(u, c, c < C)
    m, b = _mean(a, b), tl.where(length > 0, b, 1.0)
    left, moved, to_a, to_z = zeros + 1.0, zeros, zeros, zeros
    for i in tl.static_range(n):
        difference = values[i] - m
        past, token = _output_weights(high, low, bonus, keys[i])
        share = 1.0 / (past * b + token)
        pull = left * (past * (grads[i] * share))
        to_a += pull
        to_z -= pull * (token * share * difference + moved)
        past, token, high, low = _update_weights(high, low, decays[i], keys[i])
        b = past * b + token
        step = difference * (token / b)
        m += step
        moved += step
        left *= past
    at = pulls + chunk * PULL_PLANES * C + c
    tl.store(at, left, mask=inside)
    tl.store(at + C, moved, mask=inside)
    tl.store(at + 2 * C, to_a, mask=inside)
    tl.store(at + 3 * C, to_z, mask=inside)


@triton.jit
def _begin_backward(grad_final, at, m, inside, zeros):
    """ga and z after the last token. z takes the place of gb: it and ga m nearly cancel."""
    ga, gb = zeros, zeros
    if grad_final is not None:
        ga, gb = _load(grad_final, at, inside), _load(grad_final, at + 1, inside)
    return ga, ga * m + gb


@triton.jit
def _store_grad_state(grad_state, grad_final, at, m, b, ga, z, empty, inside):
    """Of the initial state. Without a token the final state is the initial one, but for its p."""
    gb = z - ga * m
    if grad_final is not None:
        gb = tl.where(empty, _load(grad_final, at + 1, inside), gb)
    tl.store(grad_state + at, ga, mask=inside)
    tl.store(grad_state + at + 1, gb, mask=inside)
    tl.store(grad_state + at + 2, tl.where(empty, 0.0, b * z), mask=inside)


@triton.jit(do_not_specialize=["T"])
def scan_back_kernel(
    pulls, initial, final, grad_final, grad_state, first, T, C,
    n: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Puts ga and z after chunks in the place of the first two planes of `pulls`; the gradient of the initial state."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    begin, end = chunks_of(first, sequence, T, n)
    own = (sequence * C + c) * 3
    zeros = tl.zeros([BC], tl.float32)
    a, b, _ = _load_initial(final, own, inside, zeros)
    ga, z = _begin_backward(grad_final, own, _mean(a, b), inside, zeros)
    for step in tl.range(0, end - begin, num_stages=STAGES):
        at = (end - 1 - step) * PULL_PLANES * C + c
        left, moved = _load(pulls, at, inside), _load(pulls, at + C, inside)
        to_a, to_z = _load(pulls, at + 2 * C, inside), _load(pulls, at + 3 * C, inside)
        tl.store(pulls + at, ga, mask=inside)
        tl.store(pulls + at + C, z, mask=inside)
        z = left * (z - ga * moved) + to_z
        ga = left * ga + to_a
    a, b, _ = _load_initial(initial, own, inside, zeros)
    _store_grad_state(grad_state, grad_final, own, _mean(a, b), b, ga, z, begin == end, inside)


@triton.jit(do_not_specialize=["T", "count"])
def gradient_kernel(
    log_w, u, k, v, gy, row_stride, token_stride, states, initial, pulls, grad_final, gw, gu, gk, gv, grad_state,
    bounds, count, T, C, n: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients of chunks, forth through their states and back; grad_state where each sequence is one chunk.

    gu (count, C), and gw where tokens share log_w, get the sums of each chunk.
    """
    chunk, begin, c, inside, length = _chunks(bounds, count, T, C, n, R, BC)
    rows = begin * C + c
    keys = _load_tokens(k, rows, length, C, n, NO_KEY)
    values = _load_tokens(v, rows, length, C, n, 0.0)
    decays = _load_decays(log_w, row_stride, token_stride, T, begin, c, length, n)
    grads = _load_tokens(gy, rows, length, C, n, 0.0)
    zeros = tl.zeros([R, BC], tl.float32)
    a0, b0, high, low = _load_before(states, initial, chunk, c, C, inside, zeros)
    m0 = _mean(a0, b0)
    # Of a chunk without tokens, whose state may be empty, nothing must be divided by zero.
    m, b = m0, tl.where(length > 0, b0, 1.0)
    bonus = _load(u, c, c < C)
    # p - k, v - m and b before every token.
    kept = ()
    for i in tl.static_range(n):
        difference = values[i] - m
        kept += ((high - keys[i]) + low, difference, b)
        past, token, high, low = _update_weights(high, low, decays[i], keys[i])
        b = past * b + token
        m += difference * (token / b)
    own = (chunk * C + c) * 3
    if pulls is None:
        ga, z = _begin_backward(grad_final, own, m, inside, zeros)
    else:
        at = chunk * PULL_PLANES * C + c
        ga, z = _load(pulls, at, inside), _load(pulls, at + C, inside)
    sum_w, sum_u = zeros, zeros
    for i in tl.static_range(n - 1, -1, -1):
        difference, b = kept[3 * i + 1], kept[3 * i + 2]
        # What the output passes on.
        past, token = _weigh(kept[3 * i] - bonus)
        share = 1.0 / (past * b + token)
        g = grads[i] * share
        through_mean = past * token * g * difference * share
        grad_key = b * through_mean
        sum_u += grad_key
        grad_value = token * g
        to_a = past * g
        past, token = _weigh(kept[3 * i] + decays[i])
        past_b = past * b
        scaled = difference / (past_b + token)
        z_before = z - ga * (scaled * token)
        grad_key += token * (ga * (scaled * past_b) + z)
        grad_value += token * ga
        grad_decay = past_b * z_before
        tl.store(gk + rows + i * C, grad_key.to(gk.dtype.element_ty), mask=i < length)
        tl.store(gv + rows + i * C, grad_value.to(gv.dtype.element_ty), mask=i < length)
        if token_stride is None:
            sum_w += tl.where(i < length, grad_decay, 0.0)
        else:
            tl.store(gw + rows + i * C, grad_decay.to(gw.dtype.element_ty), mask=i < length)
        ga = past * ga + to_a
        z = past * z_before - through_mean
    tl.store(gu + chunk * C + c, sum_u, mask=inside)
    if token_stride is None:
        tl.store(gw + chunk * C + c, sum_w, mask=inside)
    if grad_state is not None:
        _store_grad_state(grad_state, grad_final, own, m0, b0, ga, z, length == 0, inside)
