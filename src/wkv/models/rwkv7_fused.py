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

from .rwkv_fused import HeadGroupNorm, compiled
from .wkv_operators import is_compiled

# The decay is exp(-exp(-1/2) * sigmoid(w)), so between 0.545 and 1.
LOG_DECAY_SCALE = -0.6065306597126334


def key_stage(raw_w, raw_k, raw_a, k_k, k_a, heads: int):
    """What the WKV operator reads: log_w in float32, k, a = -kk and b = kk * learning rate, each (B, T, H, N).

    raw_w, raw_k, raw_a (B, T, A); k_k and k_a have A values.
    """
    run = compiled.key_stage if is_compiled(raw_k, "rwkv7_fused") else plain_key_stage
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
    run = compiled.value_residual if is_compiled(v, "rwkv7_fused") else plain_value_residual
    return run(v, v_first, raw)


def plain_value_residual(v, v_first, raw):
    """Defines `value_residual`."""
    return torch.lerp(v, v_first, raw.sigmoid())


def out_stage(norm: nn.Module, o, r, k, v, g, r_k):
    """(norm(o) + bonus) g, the bonus being v times the sum of r k r_k over a head.

    o, r, k, v (B, T, H, N), g (B, T, A), r_k (H, N). Returns (B, T, A).
    """
    if is_compiled(o, "rwkv7_fused") and _does_nothing_else(norm):
        return compiled.out_stage(o, r, k, v, g, r_k, norm.weight, norm.bias, norm.eps)
    return plain_out_stage(norm, o, r, k, v, g, r_k)


def plain_out_stage(norm: nn.Module, o, r, k, v, g, r_k):
    """Defines `out_stage`."""
    B, T = g.shape[:2]
    o = norm(o.reshape(B * T, -1)).view(B, T, -1).to(g.dtype)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + bonus.flatten(2)) * g


def _does_nothing_else(norm: nn.Module) -> bool:
    """Neither an adapter's wrapper nor hooks nor a replaced `forward`: calling the module is its formula."""
    hooks = norm._forward_pre_hooks or norm._forward_hooks or norm._backward_pre_hooks or norm._backward_hooks
    return type(norm) is HeadGroupNorm and not hooks and "forward" not in norm.__dict__
