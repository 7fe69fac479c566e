"""RWKV-5 ("Eagle"), versions 5.0, 5.1 and 5.2: model, causal language model and sequence classifier.

Glossary, as in the paper: B batch, T time, C residual width, H heads of K channels (A = H K); `r` receptance, `w`
decay, `k` key, `v` value, `g` gate, `u` bonus of the current token, S the WKV state (B, H, K, K) in float32.

Names and configuration are those of the `rwkv5` repositories on the Hub.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (2024) and the official inference code.
In half precision the projections run in the model's dtype; decay, state, and what the operator reads from the state are
float32. rwkv_step.py, which decodes on CPUs, keeps all activations in float32.
"""

import math
import re

import torch
from torch import nn
from transformers import initialization as init

from .configuration_rwkv5 import Rwkv5Config
from .rwkv_blocks import (
    BlocksForCausalLM,
    BlocksForSequenceClassification,
    BlocksModel,
    BlocksPreTrainedModel,
    MixChannelMix,
    Position,
    scaled,
)
from .rwkv_cache import InitialState, read_state, write_state
from .rwkv_fused import HeadGroupNorm, shift_mix
from .rwkv_linear import linear_of_few_rows
from .rwkv_sequences import run_operator
from .wkv6 import wkv6
from .wkv_operators import log_decay


class Rwkv5TimeMix(nn.Module):
    """The recurrent half of a block: token shift, projections, the WKV operator, group norm, gate."""

    def __init__(self, config: Rwkv5Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_size = config.head_size
        self.state_shape = config.local_state_shape
        self.initial_state = InitialState()
        self.position = Position(config, layer_idx)
        C, A, H = config.hidden_size, config.attention_hidden_size, config.num_heads
        per_head = (H,) if config.decay_per_head else (H, config.head_size)
        self.time_decay = nn.Parameter(torch.empty(per_head))
        self.bonus_name = "time_first" if config.bonus_is_log else "time_faaaa"
        self.register_parameter(self.bonus_name, nn.Parameter(torch.empty(per_head)))
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_value = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.receptance = nn.Linear(C, A, bias=False)
        self.output = nn.Linear(A, C, bias=False)
        if config.use_gate:
            self.time_mix_gate = nn.Parameter(torch.empty(1, 1, C))
            self.gate = nn.Linear(C, A, bias=False)
        self.ln_x = HeadGroupNorm(H, A, eps=config.group_norm_eps)

    def forward(self, x, past_key_values, plan, scale):
        """x (B, T, C). Returns `scale` times the update of the residual."""
        carried, S = read_state(past_key_values, self.layer_idx, 0)
        mixes = [1 - self.time_mix_key, 1 - self.time_mix_value, 1 - self.time_mix_receptance]
        if hasattr(self, "gate"):
            mixes.append(1 - self.time_mix_gate)
        (x_k, x_v, x_r, *x_g), last = shift_mix(x, carried, plan, mixes)
        r, k, v = (
            linear_of_few_rows(linear, x).unflatten(-1, (-1, self.head_size))  # (B, T, H, K)
            for linear, x in ((self.receptance, x_r), (self.key, x_k), (self.value, x_v))
        )
        log_w, u = self.decay_and_bonus()
        # Padding is an identity step.
        if plan.mask is not None:
            padding = ~plan.mask[..., None, None]
            log_w, k = log_w.masked_fill(padding, 0), k.masked_fill(padding, 0)
        # A float32 v makes a float32 output, which the group norm reads.
        o, S = run_operator(
            lambda r, log_w, k, v, S, cu_seqlens: wkv6(r, log_w, u, k, v, S, cu_seqlens),
            (r, log_w, k, v.float()),
            S,
            plan,
            self.state_shape,
            self.initial_state(),
        )
        write_state(past_key_values, self.layer_idx, 0, last, S)
        o = self.ln_x(o.flatten(0, 1).flatten(1)).view(*x.shape[:2], -1).to(v.dtype)
        if x_g:
            o = o * nn.functional.silu(linear_of_few_rows(self.gate, *x_g))
        return linear_of_few_rows(self.output, scaled(o, scale))

    def decay_and_bonus(self):
        """log_w (1, 1, H, K), and u (H, K), in float32."""
        H, K, _ = self.state_shape
        log_w, u = log_decay(self.time_decay.float()), getattr(self, self.bonus_name).float()
        if self.bonus_name == "time_first":
            u = u.exp()
        return log_w.view(1, 1, H, -1).expand(1, 1, H, K), u.view(H, -1).expand(H, K)

    def init_weights(self) -> None:
        p, decay, bonus = self.position, self.time_decay, getattr(self, self.bonus_name)
        n = decay.numel()
        init.copy_(decay, p.decay(n, -6, 5).view_as(decay))
        if self.bonus_name == "time_first":
            init.constant_(bonus, -3.0)
        else:
            along_channels = 0.1 * p.zigzag(n) if decay.ndim == 2 else 0
            init.copy_(bonus, (p.depth * (1 - p.along(n)) + along_channels).view_as(bonus))
        init.copy_(self.time_mix_key, p.channel**p.remaining)
        init.copy_(self.time_mix_value, p.channel**p.remaining + 0.3 * p.depth)
        init.copy_(self.time_mix_receptance, p.channel ** (0.5 * p.remaining))
        if hasattr(self, "gate"):
            init.copy_(self.time_mix_gate, p.channel ** (0.5 * p.remaining))
            init.orthogonal_(self.gate.weight, gain=0.1)
        init.orthogonal_(self.receptance.weight)
        init.orthogonal_(self.key.weight, gain=0.1)
        init.orthogonal_(self.value.weight)
        init.zeros_(self.output.weight)
        init.constant_(self.ln_x.weight, p.norm_scale)


class Rwkv5PreTrainedModel(BlocksPreTrainedModel):
    config: Rwkv5Config
    _sizes_from_tensors = (
        *BlocksPreTrainedModel._sizes_from_tensors,
        (r"\.time_decay$", (None, "head_size")),
    )
    time_mix = Rwkv5TimeMix
    channel_mix = MixChannelMix

    @staticmethod
    def _told_by_names(shapes):
        att = {}
        for name, shape in shapes.items():
            if found := re.search(r"\.att(?:ention)?\.(time_decay|time_faaaa|time_first|gate|ln_x)\b", name):
                att.setdefault(found[1], shape)
        if not {"time_decay", "ln_x"} <= att.keys():
            return {}
        # The affine of ln_x has the attention width; a decay per head has a value for `head_size` of its channels.
        size, rest = divmod(att["ln_x"][0], math.prod(att["time_decay"]))
        per_head = {"head_size": size} if size > 1 and not rest else {}
        return per_head | {
            "use_gate": "gate" in att,
            "decay_per_head": bool(per_head),
            "bonus_is_log": "time_first" in att,
        }


class Rwkv5Model(Rwkv5PreTrainedModel, BlocksModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache."""


class Rwkv5ForCausalLM(Rwkv5PreTrainedModel, BlocksForCausalLM):
    """RWKV-5 with its language-model head."""

    base_class = Rwkv5Model


class Rwkv5ForSequenceClassification(Rwkv5PreTrainedModel, BlocksForSequenceClassification):
    """RWKV-5 with a linear head on the last token that is not padding: classifiers and reward models."""

    base_class = Rwkv5Model
