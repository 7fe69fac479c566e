"""RWKV-6 ("Finch"): model, causal language model and sequence classifier.

Glossary, as in the paper: B batch, T time, C residual width, H heads of K channels (A = H K), R rank of the token
shift's dependence on the token; `r` receptance, `w` decay, `k` key, `v` value, `g` gate, `u` bonus of the current token
(`time_faaaa`), S the WKV state (B, H, K, K) in float32.

Names and configuration are those of the `rwkv6` repositories on the Hub.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (2024) and the official inference code.
In half precision the projections run in the model's dtype; decay, state, and what the operator reads from the state are
float32. rwkv_step.py, which decodes on CPUs, keeps all activations in float32.
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_rwkv6 import Rwkv6Config
from .rwkv_blocks import (
    BlocksForCausalLM,
    BlocksForSequenceClassification,
    BlocksModel,
    BlocksPreTrainedModel,
    GatedChannelMix,
    Position,
    scaled,
)
from .rwkv_cache import InitialState, read_state, write_state
from .rwkv_fused import HeadGroupNorm
from .rwkv_linear import linear_of_few_rows
from .rwkv_sequences import run_operator, token_shift
from .wkv6 import wkv6
from .wkv_operators import log_decay


class Rwkv6TimeMix(nn.Module):
    """The recurrent half of a block: token shift by the token, projections, the WKV operator, group norm, gate."""

    def __init__(self, config: Rwkv6Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_size = config.head_size
        self.state_shape = config.local_state_shape
        self.initial_state = InitialState()
        self.position = Position(config, layer_idx)
        C, A, H = config.hidden_size, config.attention_hidden_size, config.num_heads
        R, R_decay = config.time_mix_extra_dim, config.time_decay_extra_dim
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * R))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, R, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, R_decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(R_decay, A))
        # A name for tensor parallelism: from here on each process has its heads only.
        self.decay_rank = nn.Identity()
        self.time_faaaa = nn.Parameter(torch.empty(H, config.head_size))
        self.receptance = nn.Linear(C, A, bias=False)
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.gate = nn.Linear(C, A, bias=False)
        self.output = nn.Linear(A, C, bias=False)
        self.ln_x = HeadGroupNorm(H, A, eps=config.group_norm_eps)

    def forward(self, x, past_key_values, plan, scale):
        """x (B, T, C). Returns `scale` times the update of the residual."""
        carried, S = read_state(past_key_values, self.layer_idx, 0)
        (x_w, x_k, x_v, x_r, x_g), last = self.mixed(x, carried, plan)
        r, k, v = (
            linear_of_few_rows(linear, x).unflatten(-1, (-1, self.head_size))  # (B, T, H, K)
            for linear, x in ((self.receptance, x_r), (self.key, x_k), (self.value, x_v))
        )
        raw_w = self.time_decay.float() + self.decay_of(x_w).float()
        log_w = log_decay(raw_w).view_as(k)
        # Padding is an identity step.
        if plan.mask is not None:
            padding = ~plan.mask[..., None, None]
            log_w, k = log_w.masked_fill(padding, 0), k.masked_fill(padding, 0)
        u = self.time_faaaa.float()
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
        o = o * nn.functional.silu(linear_of_few_rows(self.gate, x_g))
        return linear_of_few_rows(self.output, scaled(o, scale))

    def decay_of(self, x_w):
        """What the token adds to the raw decay, (B, T, A)."""
        return self.decay_rank(torch.tanh(x_w @ self.time_decay_w1)) @ self.time_decay_w2

    def mixed(self, x, carried, plan):
        """The token mixed with the one before it, in shares that depend on the token: for w, k, v, r and g (B, T, C).

        Also the last token of every row, (B, C).
        """
        previous, last = token_shift(x, carried, plan)
        delta = previous - x
        q = torch.tanh(torch.addcmul(x, delta, self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        shares = torch.einsum("btjr,jrc->jbtc", q, self.time_maa_w2)
        bases = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return [torch.addcmul(x, delta, base + share) for base, share in zip(bases, shares, strict=True)], last

    def init_weights(self) -> None:
        p, A = self.position, self.time_decay.numel()
        for maa in (self.time_maa_x, self.time_maa_w, self.time_maa_k):
            init.copy_(maa, 1 - p.channel**p.remaining)
        init.copy_(self.time_maa_v, 1 - (p.channel**p.remaining + 0.3 * p.depth))
        for maa in (self.time_maa_r, self.time_maa_g):
            init.copy_(maa, 1 - p.channel ** (0.5 * p.remaining))
        for down in (self.time_maa_w1, self.time_decay_w1):
            init.zeros_(down)
        for up in (self.time_maa_w2, self.time_decay_w2):
            init.uniform_(up, -0.01, 0.01)
        init.copy_(self.time_decay, p.decay(A, -6, 5).view_as(self.time_decay))
        init.copy_(self.time_faaaa, (p.depth * (1 - p.along(A)) + 0.1 * p.zigzag(A)).view_as(self.time_faaaa))
        init.orthogonal_(self.receptance.weight)
        init.orthogonal_(self.key.weight, gain=0.1)
        init.orthogonal_(self.value.weight)
        init.orthogonal_(self.gate.weight, gain=0.1)
        init.zeros_(self.output.weight)
        init.constant_(self.ln_x.weight, p.norm_scale)


class Rwkv6ChannelMix(GatedChannelMix):
    """The position-wise half of a block, whose parameters are the shares of the previous token."""

    def __init__(self, config: Rwkv6Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def mixes(self):
        return [self.time_maa_k, self.time_maa_r]

    def init_weights(self) -> None:
        super().init_weights()
        for maa in (self.time_maa_k, self.time_maa_r):
            init.copy_(maa, 1 - self.position.channel ** (self.position.remaining**3))


class Rwkv6PreTrainedModel(BlocksPreTrainedModel):
    config: Rwkv6Config
    _sizes_from_tensors = (
        *BlocksPreTrainedModel._sizes_from_tensors,
        (r"(\.time_faaaa|attn\.bonus)$", (None, "head_size")),
        (r"\.time_maa_w2$", (None, "time_mix_extra_dim")),
        (r"(\.time_decay_w2|w_proj\.linear\.lora\.0\.weight)$", ("time_decay_extra_dim",)),
        (r"attn\.[rkvg]_proj\.linear\.weight$", ("attention_hidden_size", "hidden_size")),
        (r"ffn\.key\.linear\.weight$", ("intermediate_size",)),
    )
    time_mix = Rwkv6TimeMix
    channel_mix = Rwkv6ChannelMix


class Rwkv6Model(Rwkv6PreTrainedModel, BlocksModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache."""


class Rwkv6ForCausalLM(Rwkv6PreTrainedModel, BlocksForCausalLM):
    """RWKV-6 with its language-model head."""

    base_class = Rwkv6Model


class Rwkv6ForSequenceClassification(Rwkv6PreTrainedModel, BlocksForSequenceClassification):
    """RWKV-6 with a linear head on the last token that is not padding: classifiers and reward models."""

    base_class = Rwkv6Model
