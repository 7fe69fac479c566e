"""What stands between the matrix products of a RWKV-7 block, defined in plain PyTorch.

Glossary: B batch, T time, C residual width, H heads of N channels, A = H N; `raw_w` and `raw_a` what decay and
in-context learning rate are made from, `kk` the normalised key, o the output of the WKV operator, g gate.

Each piece is a pair: `plain_*` is the definition, and what a machine without the compiled kernels runs; the other picks
the compiled operator where there is one. That computes in float32 and in one pass, and for the backward pass computes
anew instead of keeping what lies between.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), section 4.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .rwkv_common import autocast_dtype
from .rwkv_sequences import token_shift

# Where they are missing, wkv7.py says so.
try:
    from wkv_kernels import rwkv7_fused as compiled
except ImportError:
    compiled = None

# The decay is exp(-exp(-1/2) * sigmoid(w)), so between 0.545 and 1.
LOG_DECAY_SCALE = -0.6065306597126334


class Rwkv7GroupNorm(nn.GroupNorm):
    """Group norm over the channels of each head, in float32 whatever the model's dtype."""

    def forward(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)


def shift_mix(x, carried, plan, mixes):
    """Token shift and its mixes: the tensors x + (previous - x) mix, and the last token of every row.

    x (B, T, C); carried (B, C), the last token before this call, or None for zeros; each mix has C values. Returns a
    list of (B, T, C), under autocast in its dtype, which the products that follow want, and (B, C).
    """
    if not _is_compiled(x):
        return plain_shift_mix(x, carried, plan, mixes)
    before, last = (carried, x[:, -1]) if plan.source is None else token_shift(x, carried, plan)
    # The cache is overwritten in place, autograd still needs what the forward saw.
    if before is carried is not None and torch.is_grad_enabled():
        before = before.clone()
    return compiled.shift_mix(x, before, mixes, autocast_dtype(x) or x.dtype), last


def plain_shift_mix(x, carried, plan, mixes):
    """Defines `shift_mix`."""
    previous, last = token_shift(x, carried, plan)
    delta = previous - x
    return [torch.addcmul(x, delta, mix) for mix in mixes], last


def key_stage(raw_w, raw_k, raw_a, k_k, k_a, heads: int):
    """What the WKV operator reads: log_w in float32, k, a = -kk and b = kk * learning rate, each (B, T, H, N).

    raw_w, raw_k, raw_a (B, T, A); k_k and k_a have A values.
    """
    run = compiled.key_stage if _is_compiled(raw_k) else plain_key_stage
    return run(raw_w, raw_k, raw_a, k_k, k_a, heads)


def plain_key_stage(raw_w, raw_k, raw_a, k_k, k_a, heads: int):
    """Defines `key_stage`."""
    rate = raw_a.sigmoid()
    k = torch.addcmul(raw_k, raw_k * (rate - 1), k_a)
    log_w, k, kk, rate = (
        x.unflatten(-1, (heads, -1)) for x in (LOG_DECAY_SCALE * raw_w.float().sigmoid(), k, raw_k * k_k, rate)
    )
    kk = F.normalize(kk.float(), dim=-1).to(raw_k.dtype)
    return log_w, k, -kk, kk * rate


def value_residual(v, v_first, raw):
    """v + (v_first - v) sigmoid(raw), all (B, T, A)."""
    run = compiled.value_residual if _is_compiled(v) else plain_value_residual
    return run(v, v_first, raw)


def plain_value_residual(v, v_first, raw):
    """Defines `value_residual`."""
    return torch.lerp(v, v_first, raw.sigmoid())


def out_stage(norm: nn.Module, o, r, k, v, g, r_k):
    """(norm(o) + bonus) g, the bonus being v times the sum of r k r_k over a head.

    o, r, k, v (B, T, H, N), g (B, T, A), r_k (H, N). Returns (B, T, A).
    """
    if _is_compiled(o) and _does_nothing_else(norm):
        return compiled.out_stage(o, r, k, v, g, r_k, norm.weight, norm.bias, norm.eps)
    return plain_out_stage(norm, o, r, k, v, g, r_k)


def plain_out_stage(norm: nn.Module, o, r, k, v, g, r_k):
    """Defines `out_stage`."""
    B, T = g.shape[:2]
    o = norm(o.reshape(B * T, -1)).view(B, T, -1).to(g.dtype)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + bonus.flatten(2)) * g


def relu_squared(x):
    """max(x, 0)^2 for x (B, T, C)."""
    return compiled.relu_squared(x) if _is_compiled(x) else plain_relu_squared(x)


def plain_relu_squared(x):
    """Defines `relu_squared`."""
    return F.relu(x).square()


def _is_compiled(x) -> bool:
    return compiled is not None and x.device.type in ("cpu", "meta")


def _does_nothing_else(norm: nn.Module) -> bool:
    """Neither an adapter's wrapper nor hooks nor a replaced `forward`: calling the module is its formula."""
    hooks = norm._forward_pre_hooks or norm._forward_hooks or norm._backward_pre_hooks or norm._backward_hooks
    return type(norm) is Rwkv7GroupNorm and not hooks and "forward" not in norm.__dict__
