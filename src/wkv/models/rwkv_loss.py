"""The loss of a language model's head without its logits: some tokens at a time, gradients along the way.

Glossary: N tokens, C hidden width, V vocabulary; h hidden states (N, C), W the head (V, C), p softmax of the logits.

    logits = h W^T    loss = sum of (log sum exp(logits) - logits[target]) / n    g = (p - one-hot(target)) / n
    dloss/dh = g W    dloss/dW = g^T h

Three matrix products, as in an ordinary step; but logits and g share one buffer of at most CHUNK_BYTES. Gradients are
made in the forward pass, while the logits are there, and wait for the backward pass. Who reads the logits nevertheless
gets them: `DeferredLogits` are computed then.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree
from transformers.utils import is_torchdynamo_compiling

from .rwkv_common import autocast_dtype, is_plain_linear

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels.cross_entropy import cross_entropy as compiled_cross_entropy
except ImportError:
    compiled_cross_entropy = None

CHUNK_BYTES = 2**26
# Rows of W whose gradient is made at a time, where it then adds to float32 sums: it stays in the caches meanwhile.
BLOCK_ROWS = 4096
DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_without_logits = ContextVar("without_logits", default=False)


def may_defer(model, hidden) -> bool:
    """Whether a training forward wants nothing of the model's head but the product of hidden states and weight."""
    head, autocast = model.get_output_embeddings(), autocast_dtype(hidden)
    return (
        model.training
        and (_wants_gradients(hidden, head) or _without_logits.get())
        and not is_torchdynamo_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(hidden) is torch.Tensor
        and not hidden.is_meta
        and is_plain_linear(head)
        and head.weight.shape[0] == model.config.vocab_size
        and head.weight.device == hidden.device
        and {hidden.dtype, head.weight.dtype} <= DTYPES
        and (hidden.dtype == head.weight.dtype or autocast is not None)
    )


def _wants_gradients(hidden, head) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)


def plain_cross_entropy(logits, targets, pull=0.0):
    """Defines `wkv_kernels.cross_entropy`: losses in float32, (n,), while logits (n, V) turn into their gradient."""
    exact = logits.float()
    log_p = exact.log_softmax(-1)
    losses = -log_p.gather(1, targets.unsqueeze(1))
    gradient = log_p.exp_().scatter_add_(1, targets.unsqueeze(1), torch.full_like(losses, -1))
    if pull:
        largest, index = exact.max(-1, keepdim=True)
        gradient.scatter_add_(1, index, pull * largest)
    logits.copy_(gradient)
    return losses.squeeze(1)


@contextmanager
def without_logits():
    """Within it no logits are made for a loss in training, even where no gradients are wanted."""
    token = _without_logits.set(True)
    try:
        yield
    finally:
        _without_logits.reset(token)


class _HeadLoss(torch.autograd.Function):
    """The sum over tokens, divided by n, of the losses of hidden (N, C) and weight (V, C) for targets (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, n, pull, dtype):
        n = torch.as_tensor(n, device=hidden.device)
        share = float(1 / n.double())
        # The products divide by n; not so in float16, where gradients would vanish before a loss scale reaches them.
        within, ctx.after = (1.0, share) if dtype == torch.float16 else (share, 1.0)
        h, W = hidden.to(dtype), weight.to(dtype)
        rows = max(1, CHUNK_BYTES // (len(W) * W.element_size()))
        chunks = [slice(i, i + rows) for i in range(0, len(h), rows)]
        run = compiled_cross_entropy if compiled_cross_entropy and h.is_cpu else plain_cross_entropy
        losses = h.new_empty(len(h), dtype=torch.float32)
        buffer = h.new_empty(min(rows, len(h)), len(W))
        grad_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_W = _WeightGradient(W, len(chunks)) if ctx.needs_input_grad[1] else None
        for chunk in chunks:
            logits = torch.mm(h[chunk], W.T, out=buffer[: len(h[chunk])])  # (rows, V)
            losses[chunk] = run(logits, targets[chunk], pull)
            if grad_h is not None:
                torch.addmm(grad_h[chunk], logits, W, beta=0, alpha=within, out=grad_h[chunk])
            if grad_W is not None:
                grad_W.add(logits, h[chunk], within)
        grads = [grad_h, grad_W and grad_W.total]
        ctx.dtypes = hidden.dtype, weight.dtype
        if ctx.after == 1:
            grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        ctx.save_for_backward(*grads)
        return losses.sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads, scale = ctx.saved_tensors, grad_loss * ctx.after
        # As a rule it is one already, and the head's gradient large.
        if scale != 1:
            grads = [g if g is None else (g * scale).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None


class _WeightGradient:
    """The sum of g^T h over chunks, in float32 where there are several."""

    def __init__(self, W, n_chunks: int):
        dtype = W.dtype if n_chunks == 1 else torch.float32
        self.total = torch.empty_like(W, dtype=dtype) if n_chunks else torch.zeros_like(W)
        self.block = None if dtype == W.dtype else W.new_empty(BLOCK_ROWS, W.shape[1])
        self.empty = True

    def add(self, g, h, factor: float) -> None:
        if self.block is None:
            torch.addmm(self.total, g.T, h, beta=0 if self.empty else 1, alpha=factor, out=self.total)
        else:
            for i in range(0, len(self.total), BLOCK_ROWS):
                total = self.total[i : i + BLOCK_ROWS]
                block = self.block[: len(total)]
                torch.addmm(block, g[:, i : i + BLOCK_ROWS].T, h, beta=0, alpha=factor, out=block)
                _ = total.copy_(block) if self.empty else total.add_(block)
        self.empty = False


def deferred_logits(hidden, weight):
    """The logits hidden weight^T (..., V), computed when something reads them; gradients flow as always."""
    return _Defer.apply(hidden, weight, autocast_dtype(hidden) or hidden.dtype)


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, dtype):
        ctx.save_for_backward(hidden, weight)
        return DeferredLogits(hidden, weight, dtype, dtype)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad @ weight.to(grad.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ hidden.flatten(0, -2).to(grad.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


class DeferredLogits(torch.Tensor):
    """Logits whose values are made when an operation first needs them. Autograd sees an ordinary tensor.

    A mere change of dtype is deferred too: accelerate's mixed precision makes one after every forward pass.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, hidden, weight, product_dtype, dtype):
        shape = (*hidden.shape[:-1], len(weight))
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self.hidden, self.weight, self.product_dtype = hidden, weight, product_dtype
        self.versions = hidden._version, weight._version
        self.values = None
        return self

    def loss(self, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, pull=0.0, **kwargs):
        """transformers' ForCausalLMLoss of these logits, without making them.

        labels (B, T) are shifted here, `shift_labels` are given shifted. Tokens whose label is `ignore_index` cost
        nothing. `pull` leaves the loss as it is and adds pull / n times the largest logit of each counted token to its
        gradient. Raises ValueError when labels and logits do not pair, IndexError for a label that is no token.
        """
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(self.device, torch.int64)  # (N,)
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])  # (N, C)
        if len(targets) != len(hidden):
            raise ValueError(f"{len(hidden)} tokens have logits, but {len(targets)} labels are given")
        counted = (targets != ignore_index).nonzero().squeeze(1)
        if len(counted) < len(targets):
            hidden, targets = hidden[counted], targets[counted]
        n = len(targets) if num_items_in_batch is None else num_items_in_batch
        # An operation's own forward cannot tell that no gradient is wanted.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _HeadLoss.apply(hidden, weight, targets, n, pull, self.product_dtype)

    def compute(self):
        """The values, without history."""
        if self.values is None:
            if (self.hidden._version, self.weight._version) != self.versions:
                raise RuntimeError(
                    "in training, logits are computed when they are first read, and the head's weights have changed "
                    "since the forward pass: read the logits before the optimizer's step"
                )
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                h, W = self.hidden.to(self.product_dtype), self.weight.to(self.product_dtype)
                self.values = nn.functional.linear(h, W).to(self.dtype)
        return self.values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.keys() == {"dtype"}:
            x = args[0]
            # Of two conversions the first rounds.
            if x.values is None and x.dtype == x.product_dtype:
                return cls(x.hidden, x.weight, x.product_dtype, kwargs["dtype"])
        args, kwargs = pytree.tree_map_only(cls, cls.compute, (args, kwargs))
        return func(*args, **kwargs)

    def tolist(self):
        return self.compute().tolist()

    def __repr__(self, **kwargs):
        return repr(self.compute())

    def __reduce_ex__(self, protocol):
        return self.compute().detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)
