"""What the definitions of the WKV operators share: precision, packed sequences, the choice of the compiled kernels."""

import functools
import itertools
import logging

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

try:
    import wkv_kernels
except ImportError as error:
    wkv_kernels = None
    logger.warning(
        "RWKV runs without compiled kernels (%s): plain PyTorch is used, same results but slower; "
        "`pip install wkv` brings them.",
        error,
    )


def is_compiled(x, op: str) -> bool:
    """Whether operator `op` of wkv_kernels takes x (..., K): its device and heads of K channels, and not float64."""
    return wkv_kernels is not None and x.dtype != torch.float64 and wkv_kernels.serves(op, x.device, x.shape[-1])


def in_full_precision(op):
    """For an operator in plain PyTorch: autocast would run its matrix products in half precision."""

    @functools.wraps(op)
    def wrapper(first, *args, **kwargs):
        # The meta device knows no autocast.
        if first.is_meta:
            return op(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args, **kwargs)

    return wrapper


def each_sequence(op, rows, v, state, cu_seqlens):
    """Run `op(*rows, state=...)` on every sequence of a packed row by itself; `rows` (1, T, ...) have v among them."""
    outputs, states = [v[:, :0]], []
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        o, S = op(*(x[:, start:end] for x in rows), state=None if state is None else state[i : i + 1])
        outputs.append(o)
        states.append(S)
    return torch.cat(outputs, 1), torch.cat(states, 0)


def to_float(x):
    """In float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def log_decay(raw):
    """-exp(raw), the logarithm of the decay of RWKV-4, 5 and 6.

    Beyond 64 nothing of a state is left anyway, and infinities would make gradients NaN.
    """
    return -raw.clamp(max=64).exp()


def outer(x, y):
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def initial_state(k, v, state):
    """The state (B, H, K, V) to begin with, in the precision of the float tensors k and v; zeros when None is given."""
    if state is not None:
        return state.to(k.dtype)
    B, _, H, K = k.shape
    return k.new_zeros(B, H, K, v.shape[-1])


def chunks(x, n):
    """(B, T, H, K) to (B, H, chunks, n, K); the zeros appended to the last chunk leave a state as it is."""
    B, T, H, K = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -T % n))
    return x.view(B, -1, n, H, K).permute(0, 3, 1, 2, 4)
