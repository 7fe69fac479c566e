"""Decoding on a CPU: one token through all layers of a model in one call of the compiled kernels.

Glossary: B batch, C residual width, A = H K channels in H heads of K, F hidden units of the channel-mix, S the WKV
state.

Reading the weights from memory is what a token costs, so the step reads each once, in its own dtype, for up to 16 rows
of the batch. It is taken only where it computes what the modules would: inference without gradients, plain modules,
no hooks, no adapters but LoRA. Activations and sums are float32 whatever the model's dtype, which in half precision is
closer to the exact result than the modules are.

A generation is one row of GENERATIONS; where its tensors are is told by the compiled kernels' wrapper.
"""

import operator
import weakref
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from .rwkv_cache import InitialState, RwkvCacheLayer
from .rwkv_fused import HeadGroupNorm
from .rwkv_linear import is_plain_inference
from .rwkv_low_rank import LoraStates, is_changed
from .rwkv_memory_order import by_hidden_unit
from .rwkv_step_parts import Parts

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels import rwkv_step as compiled
except ImportError:
    compiled = None

# More rows than a lone product takes (rwkv_linear.py): the step also saves the modules.
MAX_ROWS = 16


class Generation(NamedTuple):
    """Names of the norms of embeddings (in block 0) and output (in the model), and the sizes by the configuration."""

    pre_norm: str
    norm: str
    sizes: Callable


def _sizes4(c):
    return compiled.Sizes(
        4, c.hidden_size, c.attention_hidden_size, 1, c.intermediate_size, c.num_hidden_layers, c.layer_norm_epsilon
    )


def _sizes56(generation: int, c, **options):
    sizes = (c.hidden_size, c.num_heads, c.head_size, c.intermediate_size, c.num_hidden_layers)
    return compiled.Sizes(generation, *sizes, c.layer_norm_epsilon, c.group_norm_eps, **options)


def _sizes5(c):
    return _sizes56(5, c, per_head=c.decay_per_head, bonus_is_log=c.bonus_is_log)


def _sizes6(c):
    return _sizes56(6, c, ranks=(c.time_mix_extra_dim, c.time_decay_extra_dim, 0, 0))


def _sizes7(c):
    sizes = (c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size, c.num_hidden_layers)
    ranks = (c.decay_low_rank_dim, c.a_low_rank_dim, c.v_low_rank_dim, c.gate_low_rank_dim)
    return compiled.Sizes(7, *sizes, c.norm_eps, c.group_norm_eps, ranks)


GENERATIONS = {
    "rwkv": Generation("pre_ln", "ln_out", _sizes4),
    "rwkv5": Generation("pre_ln", "ln_out", _sizes5),
    "rwkv6": Generation("pre_ln", "ln_out", _sizes6),
    "rwkv7": Generation("pre_norm", "norm", _sizes7),
}


class FusedStep:
    """The step for models whose blocks `make_block(config, layer_idx)` makes, of the given classes and torch's own.

    Every call looks again at all modules, hooks and parameters of the model; what it keeps from one call to the next
    only makes that quick.
    """

    def __init__(self, make_block: Callable, *classes: type):
        self.make_block = make_block
        activations = nn.Tanh, nn.Identity, nn.Sigmoid
        known = *classes, HeadGroupNorm, InitialState, nn.Linear, nn.LayerNorm, nn.Sequential, *activations
        self.forwards = [(cls, cls.forward) for cls in known]
        self.plans = weakref.WeakKeyDictionary()
        self.expected = weakref.WeakKeyDictionary()

    def __call__(self, model, x, past_key_values, plan):
        """The normalised last hidden state (B, 1, C) for the embeddings x (B, 1, C), and `past_key_values` updated.

        Returns None, with nothing changed, where the modules must do it.
        """
        B, T, _ = x.shape
        if T != 1 or B > MAX_ROWS or past_key_values is None or model.training or not is_plain_inference(x):
            return None
        if any(part is not None for part in plan) or any(cls.forward is not f for cls, f in self.forwards):
            return None
        known = self.plans.get(model)
        if known is None or not known.still_holds(model):
            known = self.plans[model] = self.examine(model)
        if known is None or known.dtype != x.dtype or x.shape[2] != known.sizes.C:
            return None
        states = _take_states(past_key_values, B, known, x.dtype)
        if states is None:
            return None
        # Should another thread give the matrices their other order now, this one still reads the old.
        in_use = [value.weight.data for value in known.values]
        out = compiled.rwkv_step(known.weights, x.reshape(B, -1).contiguous(), states)
        del in_use
        return out.unsqueeze(1)

    def examine(self, model):
        """A `_Plan` if every part of the model is what the step computes, else None."""
        config, blocks = model.config, model.get_blocks()
        generation = GENERATIONS.get(config.model_type)
        if generation is None or type(blocks) is not nn.ModuleList or len(blocks) != config.num_hidden_layers:
            return None
        sizes, norm = generation.sizes(config), getattr(model, generation.norm)
        parts = []
        for block, expected in zip(blocks, self.expected_blocks(model, sizes), strict=True):
            parts.append(Parts(block))
            if parts[-1].layout() != expected or parts[-1].terms is None:
                return None
        modules = [*chain.from_iterable(part.all_modules() for part in parts), norm, blocks]
        if any(map(is_changed, modules)) or not _have_eps(_norms(modules), sizes):
            return None
        first_norm = compiled.LAYER_TENSORS[sizes.generation][0].removesuffix(".weight")
        if Parts(norm).layout() != Parts(parts[0].modules[first_norm]).layout():
            return None
        dtype, value = norm.weight.dtype, compiled.LAYER_TENSORS[sizes.generation][-1]
        for name, p in chain(norm.named_parameters(), *(part.parameters.items() for part in parts)):
            if type(p) is not nn.Parameter or not p.is_cpu or p.dtype != dtype:
                return None
            if not (p.is_contiguous() or (name == value and p.mT.is_contiguous())):
                return None
        return _Plan(model, generation, parts, modules, sizes)

    def expected_blocks(self, model, sizes) -> list:
        """The layout of every block as the configuration has it; all but the first are alike."""
        known = self.expected.get(model)
        if known is None or known[0] != sizes:
            with torch.device("meta"):
                first, *others = (Parts(self.make_block(model.config, i)).layout() for i in range(min(2, sizes.L)))
            known = self.expected[model] = sizes, [first, *others * (sizes.L - 1)]
        return known[1]


def _norms(modules) -> list[nn.Module]:
    return [m for m in modules if isinstance(m, (nn.LayerNorm, HeadGroupNorm))]


def _have_eps(norms, sizes) -> bool:
    """All norms of a kind have the configuration's epsilon."""
    return all(m.eps == (sizes.group_norm_eps if type(m) is HeadGroupNorm else sizes.norm_eps) for m in norms)


class _Plan:
    """A model that the step can run, and how to see quickly that it is still the same."""

    def __init__(self, model, generation: Generation, parts: list[Parts], modules, sizes):
        blocks, self.norm = model.get_blocks(), generation.norm
        last = getattr(model, self.norm)
        self.sizes, self.state_shape, self.dtype = sizes, model.config.state_shape, last.weight.dtype
        self.time_mixes = [part.modules[compiled.TIME_MIX[sizes.generation]] for part in parts]
        value = compiled.LAYER_TENSORS[sizes.generation][-1].removesuffix(".weight")
        self.values = [part.modules[value] for part in parts]
        by_hidden_unit(self.values)
        self.waiting = any(value.weight.grad is not None for value in self.values)

        self.loras = LoraStates([lora for part in parts for lora in part.loras.values()])
        self.norms = _norms(modules)
        self.modules, self.types = modules, list(map(type, modules))
        self.attributes = [m.__dict__ for m in modules]
        self.n_attributes = list(map(len, self.attributes))
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.children = [m._modules for m in modules if m._modules]
        self.held = [m._parameters for m in modules if m._parameters]
        self.copies = [dict(d) for d in chain(self.children, self.held)]
        self.parameters = [p for d in self.held for p in d.values() if p is not None]
        self.matrices = [p for p in self.parameters if p.ndim > 1 and p.shape[0] > 1]
        self.seen = self._look()

        tensors = [part.parameters for part in parts]
        pre_norm = getattr(blocks[0], generation.pre_norm)
        norms = [pre_norm.weight, pre_norm.bias, last.weight, last.bias]
        self.weights = compiled.Weights(sizes, tensors, norms, [part.terms for part in parts])

    def _look(self):
        """Address and dtype of every parameter, and the order of every matrix."""
        return (
            list(map(torch.Tensor.data_ptr, self.parameters)),
            list(map(operator.attrgetter("dtype"), self.parameters)),
            list(map(torch.Tensor.is_contiguous, self.matrices)),
        )

    def still_holds(self, model) -> bool:
        """Modules, hooks, parameters and their memory are what they were."""
        last, blocks = getattr(model, self.norm), model.get_blocks()
        if any(self.hooks) or self.modules[-1] is not blocks or self.modules[-2] is not last:
            return False
        try:
            # Identical values count as equal unseen; whether two other tensors are equal has no truth value.
            same = self.copies == [*self.children, *self.held] and self.loras.hold()
        except (RuntimeError, TypeError):
            return False
        if not same or list(map(type, self.modules)) != self.types or not _have_eps(self.norms, self.sizes):
            return False
        if list(map(len, self.attributes)) != self.n_attributes or self._look() != self.seen:
            return False
        return not (self.waiting and all(value.weight.grad is None for value in self.values))

    def begins_with_zeros(self) -> bool:
        """Nothing stands in for the state that every text begins with."""
        first = [m._modules.get("initial_state") for m in self.time_mixes]
        return all(type(m) is InitialState and not is_changed(m) for m in first)


def _take_states(past_key_values, B: int, plan: _Plan, dtype) -> list[torch.Tensor] | None:
    """The three state tensors of every layer, made or cleared where there is no earlier token; None if any is unfit."""
    shift = (B, plan.sizes.C, 1)
    shapes = shift, shift, (B, *plan.state_shape)
    layers = past_key_values.layers
    if past_key_values.offloading or len(layers) != plan.sizes.L:
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
    if fresh and not plan.begins_with_zeros():
        return None
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
