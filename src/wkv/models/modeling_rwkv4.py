"""RWKV-4 ("Dove"; Raven is the same): model, causal language model and sequence classifier.

Glossary, as in the paper: B batch, T time, C residual width, A attention width; `r` receptance, `w` decay, `k` key,
`v` value, `u` bonus of the current token (`time_first`), S the WKV state (B, A, 3) in float32.

Names and configuration are those of transformers' own `rwkv`, which these classes replace.

Source: "RWKV: Reinventing RNNs for the Transformer Era" (2023) and the official inference code. In half precision the
projections run in the model's dtype; decay, keys, values and state are float32. rwkv_step.py, which decodes on
CPUs, keeps all activations in float32.
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_rwkv4 import RwkvConfig
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
from .rwkv_fused import shift_mix
from .rwkv_linear import linear_of_few_rows
from .rwkv_sequences import run_operator
from .wkv4 import wkv4
from .wkv_operators import log_decay

# The key of padding: no weight beside any other, and no infinity.
PADDING_KEY = -1e30


class RwkvTimeMix(nn.Module):
    """The recurrent half of a block: token shift, three projections, the WKV operator, receptance."""

    def __init__(self, config: RwkvConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.state_shape = config.local_state_shape
        self.initial_state = InitialState()
        self.position = Position(config, layer_idx)
        C, A = config.hidden_size, config.attention_hidden_size
        self.time_decay = nn.Parameter(torch.empty(A))
        self.time_first = nn.Parameter(torch.empty(A))
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_value = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.receptance = nn.Linear(C, A, bias=False)
        self.output = nn.Linear(A, C, bias=False)

    def forward(self, x, past_key_values, plan, scale):
        """x (B, T, C). Returns `scale` times the update of the residual."""
        carried, S = read_state(past_key_values, self.layer_idx, 0)
        mixes = [1 - self.time_mix_key, 1 - self.time_mix_value, 1 - self.time_mix_receptance]
        (x_k, x_v, x_r), last = shift_mix(x, carried, plan, mixes)
        k, v = linear_of_few_rows(self.key, x_k), linear_of_few_rows(self.value, x_v)  # (B, T, A)
        r = linear_of_few_rows(self.receptance, x_r).sigmoid()
        log_w, u = log_decay(self.time_decay.float()).view(1, 1, -1), self.time_first.float()
        # Padding is an identity step. Before the first token it meets its like, whose weights float32 cannot tell
        # apart: with values of zero they do not matter.
        if plan.mask is not None:
            padding = ~plan.mask.unsqueeze(-1)
            log_w, k = log_w.masked_fill(padding, 0), k.float().masked_fill(padding, PADDING_KEY)
            v = v.masked_fill(padding, 0)
        o, S = run_operator(
            lambda log_w, k, v, S, cu_seqlens: wkv4(log_w, u, k, v, S, cu_seqlens),
            (log_w, k, v),
            S,
            plan,
            self.state_shape,
            self.initial_state(),
        )
        write_state(past_key_values, self.layer_idx, 0, last, S)
        return linear_of_few_rows(self.output, scaled(r * o, scale))

    def init_weights(self) -> None:
        p = self.position
        init.copy_(self.time_decay, p.decay(self.time_decay.numel(), -5, 8))
        init.copy_(self.time_first, torch.tensor(0.3).log() + 0.5 * p.zigzag(self.time_first.numel()))
        init.copy_(self.time_mix_key, p.channel**p.remaining)
        init.copy_(self.time_mix_value, p.channel**p.remaining + 0.3 * p.depth)
        init.copy_(self.time_mix_receptance, p.channel ** (0.5 * p.remaining))
        init_orthogonal(self.value)
        for linear in (self.key, self.receptance, self.output):
            init.zeros_(linear.weight)


class RwkvChannelMix(MixChannelMix):
    """The position-wise half of a block."""

    def init_weights(self) -> None:
        super().init_weights()
        init_orthogonal(self.key)


def init_orthogonal(linear: nn.Linear) -> None:
    """Orthogonal, with a gain where there are more outputs than inputs."""
    init.orthogonal_(linear.weight, gain=max(1.0, linear.out_features / linear.in_features) ** 0.5)


class Rwkv4PreTrainedModel(BlocksPreTrainedModel):
    config: RwkvConfig
    time_mix = RwkvTimeMix
    channel_mix = RwkvChannelMix


class RwkvModel(Rwkv4PreTrainedModel, BlocksModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache."""


class RwkvForCausalLM(Rwkv4PreTrainedModel, BlocksForCausalLM):
    """RWKV-4 with its language-model head."""

    base_class = RwkvModel


class RwkvForSequenceClassification(Rwkv4PreTrainedModel, BlocksForSequenceClassification):
    """RWKV-4 with a linear head on the last token that is not padding: classifiers and reward models."""

    base_class = RwkvModel
