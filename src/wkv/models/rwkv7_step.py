"""Decoding on a CPU: one token through all layers of a RWKV-7 model in one call of the compiled kernels.

Glossary: B batch, C residual width, A = H K channels in H heads of K, F hidden units of the channel-mix, S the WKV
state.

Reading the weights from memory is what a token costs, so the step reads each once, in its own dtype, for up to 16 rows
of the batch. It is taken only where it computes what the modules would: inference without gradients, plain modules,
no hooks, no adapters. Activations and sums are float32 whatever the model's dtype, which in half precision is closer to
the exact result than the modules are.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), section 4.
"""

import operator
import weakref
from itertools import chain

import torch
from torch import nn

from .rwkv7_fused import Rwkv7GroupNorm
from .rwkv7_memory_order import by_hidden_unit
from .rwkv_cache import RwkvCacheLayer
from .rwkv_common import is_plain_linear

# Where they are missing, wkv7.py says so.
try:
    from wkv_kernels import few_rows_linear as compiled_linear
    from wkv_kernels import rwkv7_step as compiled
except ImportError:
    compiled = None

# With more rows, torch's matrix products are as good: they compute more for each weight they read. A lone product in
# bfloat16 gets there sooner, where the processor has instructions for small matrices; the step also saves the modules.
MAX_ROWS = 16
MAX_ROWS_OF_HEAD = {torch.float32: 16, torch.bfloat16: 9, torch.float16: 16}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LORAS = {"w": nn.Tanh, "a": nn.Identity, "v": nn.Identity, "g": nn.Sigmoid}


def linear_of_few_rows(linear: nn.Module, x):
    """`linear(x)`, with each weight read once where x (..., C) has few rows and nothing but the product is wanted."""
    if not _is_plain_inference(x) or x.numel() > MAX_ROWS_OF_HEAD[x.dtype] * x.shape[-1]:
        return linear(x)
    if not is_plain_linear(linear) or linear.weight.dtype != x.dtype:
        return linear(x)
    if not linear.weight.is_cpu or not linear.weight.is_contiguous():
        return linear(x)
    return compiled_linear.few_rows_linear(x.reshape(-1, x.shape[-1]), linear.weight).view(*x.shape[:-1], -1)


def _is_plain_inference(x) -> bool:
    """Nothing watches or transforms the operations on x, and no gradient is wanted."""
    return (
        compiled is not None
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and x.is_cpu
        and x.dtype in DTYPES
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not nn.modules.module._has_any_global_hook()
    )


class FusedStep:
    """The step for models made of the given classes: block, time-mix, channel-mix and low-rank projection.

    Every call looks again at all modules, hooks and parameters of the model; what it keeps from one call to the next
    only makes that quick.
    """

    def __init__(self, block: type, time_mix: type, channel_mix: type, low_rank: type):
        self.classes = (block, time_mix, channel_mix, low_rank)
        known = (*self.classes, Rwkv7GroupNorm, nn.Linear, nn.LayerNorm, nn.Sequential, *LORAS.values())
        self.forwards = [(cls, cls.forward) for cls in known]
        self.plans = weakref.WeakKeyDictionary()

    def __call__(self, model, x, past_key_values, plan):
        """The normalised last hidden state (B, 1, C) for the embeddings x (B, 1, C), and `past_key_values` updated.

        Returns None, with nothing changed, where the modules must do it.
        """
        B, T, _ = x.shape
        if T != 1 or B > MAX_ROWS or past_key_values is None or model.training or not _is_plain_inference(x):
            return None
        if any(part is not None for part in plan) or any(cls.forward is not f for cls, f in self.forwards):
            return None
        known = self.plans.get(model)
        if known is None or not known.still_holds(model):
            known = self.plans[model] = self.examine(model)
        if known is None or known.dtype != x.dtype or x.shape[2] != known.sizes.C:
            return None
        states = _take_states(past_key_values, B, known.sizes, x.dtype)
        if states is None:
            return None
        # Should another thread give the matrices their other order now, this one still reads the old.
        in_use = [value.weight.data for value in known.values]
        out = compiled.rwkv7_step(known.weights, x.reshape(B, -1).contiguous(), states)
        del in_use
        return out.unsqueeze(1)

    def examine(self, model):
        """A `_Plan` if every part of the model is what the step computes, else None."""
        blocks = list(model.layers) if type(model.layers) is nn.ModuleList else []
        sizes = _read_sizes(blocks) if type(model.norm) is nn.LayerNorm else None
        if sizes is None or _shapes(model.norm) != {"weight": (sizes.C,), "bias": (sizes.C,)}:
            return None
        for i, block in enumerate(blocks):
            if {name: type(m) for name, m in block.named_modules()} != self.expected_modules(i):
                return None
            if _shapes(block) != _expected_shapes(i, sizes):
                return None
        modules = [*chain.from_iterable(block.modules() for block in blocks), model.norm, model.layers]
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules):
            return None
        dtype = model.norm.weight.dtype
        transposable = {id(block.ffn.value.weight) for block in blocks}
        for p in chain.from_iterable(m._parameters.values() for m in modules):
            if p is None:
                continue
            if type(p) is not nn.Parameter or not p.is_cpu or p.dtype != dtype:
                return None
            if not (p.is_contiguous() or (id(p) in transposable and p.mT.is_contiguous())):
                return None
        return _Plan(model, blocks, modules, sizes) if _have_eps(_norms(modules), sizes) else None

    def expected_modules(self, i: int) -> dict[str, type]:
        """Name and class of every module in block i."""
        block, time_mix, channel_mix, low_rank = self.classes
        modules = {"": block, "attn_norm": nn.LayerNorm, "attn": time_mix, "ffn_norm": nn.LayerNorm, "ffn": channel_mix}
        modules |= {"attn.g_norm": Rwkv7GroupNorm, "ffn.key": nn.Linear, "ffn.value": nn.Linear}
        modules |= {f"attn.{name}_proj": nn.Linear for name in "rkvo"}
        if i == 0:
            modules["pre_norm"] = nn.LayerNorm
        for name, activation in LORAS.items():
            if name != "v" or i > 0:
                path = f"attn.{name}_lora"
                modules |= {path: low_rank, f"{path}.lora": nn.Sequential, f"{path}.lora.0": nn.Linear}
                modules |= {f"{path}.lora.1": activation, f"{path}.lora.2": nn.Linear}
        return modules


def _read_sizes(blocks):
    """The sizes that the first block's tensors tell, None if they are no tensors."""
    try:
        attn, ffn = blocks[0].attn, blocks[0].ffn
        H, K = attn.r_k.shape
        ranks = {name: getattr(attn, f"{name}_lora").lora[0].weight.shape[0] for name in "wag"}
        # Layer 0 has no value residual.
        ranks["v"] = blocks[1].attn.v_lora.lora[0].weight.shape[0] if len(blocks) > 1 else 0
        F, C = ffn.key.weight.shape
        eps, group_eps = blocks[0].attn_norm.eps, attn.g_norm.eps
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    return compiled.Sizes(C, H, K, F, len(blocks), *(ranks[name] for name in "wavg"), eps, group_eps)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _expected_shapes(i: int, s) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in block i."""
    C, A, F = s.C, s.H * s.K, s.F
    shapes = {f"{norm}.{name}": (C,) for norm in ("attn_norm", "ffn_norm") for name in ("weight", "bias")}
    if i == 0:
        shapes |= {"pre_norm.weight": (C,), "pre_norm.bias": (C,)}
    shapes |= {f"attn.x_{name}": (1, 1, C) for name in "rwkvag"}
    shapes |= {"attn.k_k": (A,), "attn.k_a": (A,), "attn.r_k": (s.H, s.K)}
    shapes |= {"attn.g_norm.weight": (A,), "attn.g_norm.bias": (A,)}
    shapes |= {f"attn.{name}_proj.weight": (A, C) for name in "rkv"} | {"attn.o_proj.weight": (C, A)}
    for name, rank in zip("wavg", (s.w_rank, s.a_rank, s.v_rank, s.g_rank), strict=True):
        if name != "v" or i > 0:
            path = f"attn.{name}_lora.lora"
            shapes |= {f"{path}.0.weight": (rank, C), f"{path}.2.weight": (A, rank)}
            if name != "g":
                shapes[f"{path}.2.bias"] = (A,)
    return shapes | {"ffn.x_k": (C,), "ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}


def _norms(modules) -> list[nn.Module]:
    return [m for m in modules if type(m) in (nn.LayerNorm, Rwkv7GroupNorm)]


def _have_eps(norms, sizes) -> bool:
    """All norms of a kind have the epsilon of the first block's."""
    return all(m.eps == (sizes.norm_eps if type(m) is nn.LayerNorm else sizes.group_norm_eps) for m in norms)


class _Plan:
    """A model that the step can run, and how to see quickly that it is still the same."""

    def __init__(self, model, blocks, modules, sizes):
        self.sizes, self.dtype = sizes, model.norm.weight.dtype
        self.values = [block.ffn.value for block in blocks]
        by_hidden_unit(self.values)
        self.waiting = any(value.weight.grad is not None for value in self.values)

        self.norms = _norms(modules)
        self.modules, self.types = modules, list(map(type, modules))
        self.attributes = [m.__dict__ for m in modules]
        self.n_attributes = list(map(len, self.attributes))
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.children = [m._modules for m in modules if m._modules]
        self.held = [m._parameters for m in modules if m._parameters]
        self.copies = [dict(d) for d in chain(self.children, self.held)]
        self.parameters = [p for d in self.held for p in d.values() if p is not None]
        self.matrices = [p for p in self.parameters if p.ndim == 2]
        self.seen = self._look()

        tensors = [dict(block.named_parameters()) for block in blocks]
        norms = [blocks[0].pre_norm.weight, blocks[0].pre_norm.bias, model.norm.weight, model.norm.bias]
        layers = ([t.get(name) for name in compiled.LAYER_TENSORS] for t in tensors)
        self.weights = compiled.Weights(sizes, layers, norms)

    def _look(self):
        """Address and dtype of every parameter, and the order of every matrix."""
        return (
            list(map(torch.Tensor.data_ptr, self.parameters)),
            list(map(operator.attrgetter("dtype"), self.parameters)),
            list(map(torch.Tensor.is_contiguous, self.matrices)),
        )

    def still_holds(self, model) -> bool:
        """Modules, hooks, parameters and their memory are what they were."""
        if any(self.hooks) or self.modules[-1] is not model.layers or self.modules[-2] is not model.norm:
            return False
        try:
            # Identical values count as equal unseen; whether two other tensors are equal has no truth value.
            same = self.copies == [*self.children, *self.held]
        except (RuntimeError, TypeError):
            return False
        if not same or list(map(type, self.modules)) != self.types or not _have_eps(self.norms, self.sizes):
            return False
        if list(map(len, self.attributes)) != self.n_attributes or self._look() != self.seen:
            return False
        return not (self.waiting and all(value.weight.grad is None for value in self.values))


def _take_states(past_key_values, B: int, sizes, dtype) -> list[torch.Tensor] | None:
    """The three state tensors of every layer, made or cleared where there is no earlier token; None if any is unfit."""
    shapes = (B, sizes.C, 1), (B, sizes.C, 1), (B, sizes.H, sizes.K, sizes.K)
    layers = past_key_values.layers
    if past_key_values.offloading or len(layers) != sizes.L:
        return None
    fresh = []
    for layer in layers:
        if type(layer) is not RwkvCacheLayer or layer.record_past:
            return None
        held = layer.conv_states[0], layer.conv_states[1], layer.recurrent_states[0]
        for state, shape, wanted in zip(held, shapes, (dtype, dtype, torch.float32), strict=True):
            if state is not None and not (
                state.shape == shape and state.dtype == wanted and state.is_cpu and state.is_contiguous()
            ):
                return None
        if any(state is None for state in held) or not (layer.has_previous_state[0] and layer.has_previous_state[1]):
            fresh.append(layer)
    for layer in fresh:
        # The WKV state goes by the first shift's flag, which must be read before it is set.
        if layer.recurrent_states[0] is None or not layer.has_previous_state[0]:
            layer.update_recurrent_state(torch.zeros(shapes[2], dtype=torch.float32))
        for i in range(2):
            if layer.conv_states[i] is None or not layer.has_previous_state[i]:
                layer.update_conv_state(torch.zeros(shapes[i], dtype=dtype), i)
    return [
        state for layer in layers for state in (layer.conv_states[0], layer.conv_states[1], layer.recurrent_states[0])
    ]
