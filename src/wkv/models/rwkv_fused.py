"""What stands between the matrix products of a block of any generation, defined in plain PyTorch.

Glossary: B batch, T time, C residual width.

Each piece is a pair: `plain_*` is the definition, and what a machine without the compiled kernels runs; the other picks
the compiled operator where there is one. That computes in float32 and in one pass, and for the backward pass computes
anew instead of keeping what lies between.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .rwkv_common import autocast_dtype
from .rwkv_sequences import last_token, token_shift
from .wkv_operators import is_compiled

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels import rwkv7_fused as compiled
except ImportError:
    compiled = None


class HeadGroupNorm(nn.GroupNorm):
    """Group norm over the channels of each head, in float32 whatever the model's dtype."""

    def forward(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)


def shift_mix(x, carried, plan, mixes):
    """Token shift and its mixes: the tensors x + (previous - x) mix, and the last token of every row.

    x (B, T, C); carried (B, C), the last token before this call, or None for zeros; each mix has C values. Returns a
    list of (B, T, C), under autocast in its dtype, which the products that follow want, and (B, C).
    """
    if not is_compiled(x, "rwkv7_fused"):
        return plain_shift_mix(x, carried, plan, mixes)
    if plan.source is None:
        before, last = carried, last_token(x, carried, plan)
    else:
        before, last = token_shift(x, carried, plan)
    # The cache is overwritten in place, autograd still needs what the forward saw.
    if before is carried is not None and torch.is_grad_enabled():
        before = before.clone()
    return compiled.shift_mix(x, before, mixes, autocast_dtype(x) or x.dtype), last


def plain_shift_mix(x, carried, plan, mixes):
    """Defines `shift_mix`."""
    previous, last = token_shift(x, carried, plan)
    delta = previous - x
    return [torch.addcmul(x, delta, mix) for mix in mixes], last


def relu_squared(x):
    """max(x, 0)^2 for x (B, T, C)."""
    return compiled.relu_squared(x) if is_compiled(x, "rwkv7_fused") else plain_relu_squared(x)


def plain_relu_squared(x):
    """Defines `relu_squared`."""
    return F.relu(x).square()
