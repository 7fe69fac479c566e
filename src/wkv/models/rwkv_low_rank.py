"""LoRA layers of PEFT as what they compute: a product, and low-rank terms beside it.

PEFT is not needed and not imported: its layers are known by their class's name.
"""

import copy
import operator
from typing import NamedTuple

import torch
from torch import nn

from .rwkv_common import is_plain_linear

# The class, and what decides which terms it adds; in a version of PEFT that lacks one the modules run.
LORA = "peft.tuners.lora.layer", "Linear"
STATE = "_disable_adapters", "_active_adapter", "merged_adapters", "scaling", "lora_variant", "cast_input_dtype_enabled"

DTYPES = torch.float32, torch.bfloat16, torch.float16

_read_state = operator.attrgetter(*STATE)


class LowRank(NamedTuple):
    """What an adapter adds to a product with x: scale * up (down x); down (rank, in), up (out, rank), contiguous."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def is_lora(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer around another one, its `base_layer`."""
    cls = type(module)
    return (cls.__module__, cls.__qualname__) == LORA and all(hasattr(module, name) for name in STATE)


def is_changed(module: nn.Module) -> bool:
    """Whether something was added to what its class does when it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def low_rank_terms(lora: nn.Module) -> list[LowRank] | None:
    """What the active adapters add to the base layer's product; None where they do more than that, or may."""
    disabled, active, merged, scaling, variants, casts = _read_state(lora)
    forward = type(lora).forward
    if (forward.__module__, forward.__qualname__) != (LORA[0], f"{LORA[1]}.forward") or not casts or is_changed(lora):
        return None
    if disabled or merged:
        # A disabled layer takes a merged adapter out of the weights when it is called.
        return None if disabled and merged else []
    terms = []
    for name in [active] if isinstance(active, str) else active:
        if name not in lora.lora_A:
            continue
        down, up, dropout, scale = lora.lora_A[name], lora.lora_B[name], lora.lora_dropout[name], scaling[name]
        if name in variants or not (is_plain_linear(down) and is_plain_linear(up)) or type(scale) not in (int, float):
            return None
        inert = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
        if not inert or is_changed(dropout):
            return None
        shapes = (down.out_features, lora.in_features), (lora.out_features, down.out_features)
        if not all(map(_is_readable, (down.weight, up.weight), shapes)):
            return None
        terms.append(LowRank(down.weight, up.weight, scale))
    return terms


def _is_readable(weight: torch.Tensor, shape: tuple[int, int]) -> bool:
    return weight.shape == shape and weight.dtype in DTYPES and weight.is_cpu and weight.is_contiguous()


class LoraStates:
    """What decides about the terms of LoRA layers as it is now, to be compared with what it is later."""

    def __init__(self, loras: list[nn.Module]):
        self.loras = loras
        self.dropouts = [m for lora in loras for m in lora.lora_dropout.values()]
        self.seen = [tuple(map(copy.copy, state)) for state in self._states()], self._training(), self._forwards()

    def hold(self) -> bool:
        return self.seen == (self._states(), self._training(), self._forwards())

    def _states(self) -> list[tuple]:
        return list(map(_read_state, self.loras))

    def _training(self) -> list[bool]:
        return [m.training for m in self.dropouts]

    def _forwards(self) -> list:
        return [type(lora).forward for lora in self.loras[:1]]
