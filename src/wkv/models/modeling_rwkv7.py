"""RWKV-7 ("Goose"): model, causal language model and sequence classifier.

Glossary, as in the paper: B batch, T time, C residual width, H heads of K channels (A = H K), `r` receptance,
`w` decay, `k` key, `v` value, `a` in-context learning rate, `g` gate; `x_r` ... `x_g` token-shift mixes, `k_k` and
`k_a` key modifiers, `r_k` bonus, `v_first` the values of layer 0, S the WKV state (B, H, K, K) in float32.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025) and the official inference code. In half precision
the projections run in the model's dtype, as its Python path does; decay, state, and what the operator reads from the
state are float32, as in its CUDA kernels. rwkv_step.py, which decodes on CPUs, keeps all activations in float32.
"""

import re
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rwkv7 import Rwkv7Config
from .rwkv7_fused import key_stage, out_stage, value_residual
from .rwkv_cache import InitialState, read_state, write_state
from .rwkv_common import RwkvPreTrainedModel
from .rwkv_fused import HeadGroupNorm, relu_squared, shift_mix
from .rwkv_memory_order import ReorderedChannelMix
from .rwkv_models import (
    GenericRwkvForCausalLM,
    GenericRwkvForSequenceClassification,
    GenericRwkvModel,
    init_embedding_and_head,
)
from .rwkv_sequences import run_operator
from .rwkv_step import FusedStep
from .wkv7 import wkv7

# Parameters of `Rwkv7LowRank`, an adapter on them or not.
LOW_RANK_PAIR = re.compile(r"_lora\.lora\.\d\.(base_layer\.)?\w+$")


class Rwkv7LowRank(nn.Module):
    """x -> W2 f(W1 x) (+ bias): how decay, learning rate, value mix and gate depend on the token.

    `initial_bias()` is what the bias begins with, (A,); None for no bias.
    """

    def __init__(self, config, rank: int, activation: nn.Module, initial_bias=None):
        super().__init__()
        down = nn.Linear(config.hidden_size, rank, bias=False)
        up = nn.Linear(rank, config.attention_hidden_size, bias=initial_bias is not None)
        down.initialise, up.initialise = _init_down, partial(_init_up, initial_bias=initial_bias)
        self.lora = nn.Sequential(down, activation, up)

    def forward(self, x):
        return self.lora(x)


class Rwkv7TimeMix(nn.Module):
    """The recurrent half of a block: token shift, the five projections, the WKV operator, group norm, bonus, gate."""

    def __init__(self, config: Rwkv7Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_layers = config.num_hidden_layers
        self.head_dim = config.head_dim
        self.state_shape = config.local_state_shape
        self.initial_state = InitialState()
        C, A = config.hidden_size, config.attention_hidden_size
        self.x_r = nn.Parameter(torch.empty(1, 1, C))
        self.x_w = nn.Parameter(torch.empty(1, 1, C))
        self.x_k = nn.Parameter(torch.empty(1, 1, C))
        self.x_v = nn.Parameter(torch.empty(1, 1, C))
        self.x_a = nn.Parameter(torch.empty(1, 1, C))
        self.x_g = nn.Parameter(torch.empty(1, 1, C))
        self.k_k = nn.Parameter(torch.empty(A))
        self.k_a = nn.Parameter(torch.empty(A))
        self.r_k = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        self.r_proj = nn.Linear(C, A, bias=False)
        self.k_proj = nn.Linear(C, A, bias=False)
        self.v_proj = nn.Linear(C, A, bias=False)
        self.o_proj = nn.Linear(A, C, bias=False)
        depth = layer_idx / max(1, config.num_hidden_layers - 1)
        w, a, v = (
            partial(initial, A, config.head_dim) for initial in (_initial_decay, _initial_rate, _initial_value_mix)
        )
        self.w_lora = Rwkv7LowRank(config, config.decay_low_rank_dim, nn.Tanh(), partial(w, depth))
        self.a_lora = Rwkv7LowRank(config, config.a_low_rank_dim, nn.Identity(), a)
        if layer_idx > 0:
            self.v_lora = Rwkv7LowRank(config, config.v_low_rank_dim, nn.Identity(), v)
        self.g_lora = Rwkv7LowRank(config, config.gate_low_rank_dim, nn.Sigmoid())
        self.g_norm = HeadGroupNorm(config.num_heads, A, eps=config.group_norm_eps)

    def forward(self, x, v_first, past_key_values, plan):
        """x (B, T, C), v_first (B, T, A) or None in layer 0. Returns the update of the residual and v_first."""
        carried, S = read_state(past_key_values, self.layer_idx, 0)
        mixes = [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]
        (x_r, x_w, x_k, x_v, x_a, x_g), last = shift_mix(x, carried, plan, mixes)
        v = self.v_proj(x_v)
        if v_first is None:
            v_first = v
        else:
            v = value_residual(v, v_first, self.v_lora(x_v))
        # (B, T, H, K) from here to the output stage.
        r, v = self.heads(self.r_proj(x_r)), self.heads(v)
        raw_w, raw_k, raw_a = self.w_lora(x_w), self.k_proj(x_k), self.a_lora(x_a)
        log_w, k, a, b = key_stage(raw_w, raw_k, raw_a, self.k_k, self.k_a, r.shape[2])
        # Padding is an identity step.
        if plan.mask is not None:
            padding = ~plan.mask[..., None, None]
            log_w, k, b = (x.masked_fill(padding, 0) for x in (log_w, k, b))
        o, S = run_operator(wkv7, (r, log_w, k, v, a, b), S, plan, self.state_shape, self.initial_state())
        write_state(past_key_values, self.layer_idx, 0, last, S)
        return self.o_proj(out_stage(self.g_norm, o, r, k, v, self.g_lora(x_g), self.r_k)), v_first

    def heads(self, x):
        """(B, T, A) to (B, T, H, K)."""
        return x.unflatten(-1, (-1, self.head_dim))


class Rwkv7ChannelMix(ReorderedChannelMix):
    """The position-wise half of a block: token shift, then value(relu(key(x))^2)."""

    def __init__(self, config: Rwkv7Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_layers = config.num_hidden_layers
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, past_key_values, plan):
        """x (B, T, C). Returns the update of the residual."""
        self.by_rows_for_gradients()
        carried, _ = read_state(past_key_values, self.layer_idx, 1)
        (x_k,), last = shift_mix(x, carried, plan, [self.x_k])
        write_state(past_key_values, self.layer_idx, 1, last)
        return self.value(relu_squared(self.key(x_k)))


class Rwkv7Block(GradientCheckpointingLayer):
    """Time-mix and channel-mix, each on the normalised residual; block 0 also normalises the embeddings."""

    def __init__(self, config: Rwkv7Config, layer_idx: int):
        super().__init__()
        if layer_idx == 0:
            self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Rwkv7TimeMix(config, layer_idx)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = Rwkv7ChannelMix(config, layer_idx)

    # `v_first` is positional, so that re-entrant gradient checkpointing keeps its gradient.
    def forward(self, hidden_states, v_first, past_key_values=None, plan=None):
        if v_first is None:
            hidden_states = self.pre_norm(hidden_states)
        update, v_first = self.attn(self.attn_norm(hidden_states), v_first, past_key_values, plan)
        hidden_states = hidden_states + update
        return hidden_states + self.ffn(self.ffn_norm(hidden_states), past_key_values, plan), v_first


class Rwkv7PreTrainedModel(RwkvPreTrainedModel):
    config: Rwkv7Config
    _no_split_modules = ["Rwkv7Block"]
    _can_record_outputs = {"hidden_states": Rwkv7Block}
    # Some checkpoints carry the value-residual tensors of layer 0, which nothing reads.
    _keys_to_ignore_on_load_unexpected = [r"layers\.0\.attn\.v_lora\."]
    _sizes_from_tensors = (
        (r"(^|\.)(emb|embeddings|embed_tokens)\.weight$", ("vocab_size", "hidden_size")),
        (r"att\w*\.r_k$", ("num_heads", "head_dim")),
        (r"((attn|ffn|pre)_norm|model\.norm|\.ln[012]|ln_out)\.weight$", ("hidden_size",)),
        (r"([rkv]_proj|att\w*\.(receptance|key|value))\.weight$", ("attention_hidden_size", "hidden_size")),
        (r"((ffn|feed_forward)\.key|up_proj)\.weight$", ("intermediate_size",)),
        (r"(w_lora\.lora\.0|att\w*\.w1)\.weight$", ("decay_low_rank_dim",)),
        (r"(a_lora\.lora\.0|att\w*\.a1)\.weight$", ("a_low_rank_dim",)),
        (r"(v_lora\.lora\.0|att\w*\.v1)\.weight$", ("v_low_rank_dim",)),
        (r"(g_lora\.lora\.0|att\w*\.g1)\.weight$", ("gate_low_rank_dim",)),
        (r"att\w*\.w1$", (None, "decay_low_rank_dim")),
        (r"att\w*\.a1$", (None, "a_low_rank_dim")),
        (r"att\w*\.v1$", (None, "v_low_rank_dim")),
        (r"att\w*\.g1$", (None, "gate_low_rank_dim")),
    )

    @staticmethod
    def _load_pretrained_model(model, *args, expected_keys=None, **kwargs):
        info, rest = RwkvPreTrainedModel._load_pretrained_model(model, *args, expected_keys=expected_keys, **kwargs)
        # For an adapter transformers expects whatever has "lora" in its name: our low-rank pairs are not the adapter's.
        if expected_keys is not None:
            info.missing_keys = {key for key in info.missing_keys if not LOW_RANK_PAIR.search(key)}
        return info, rest

    @torch.no_grad()
    def _init_weights(self, module):
        """The official initialisation, tensor by tensor (RWKV-LM, the RWKV-7 trainer)."""
        super()._init_weights(module)
        init_embedding_and_head(self, module)
        if isinstance(module, Rwkv7TimeMix):
            _init_time_mix(module)
        # By the layers themselves: ZeRO-3 gathers what a module and its children have, and nothing deeper.
        elif hasattr(module, "initialise"):
            module.initialise(module)
        elif isinstance(module, Rwkv7ChannelMix):
            C = module.x_k.numel()
            ratio = 1 - module.layer_idx / module.num_layers
            init.copy_(module.x_k, 1 - (torch.arange(C) / C) ** (ratio**4))
            init.orthogonal_(module.key.weight)
            init.zeros_(module.value.weight)


def _init_time_mix(m: Rwkv7TimeMix) -> None:
    C, A = m.x_r.numel(), m.k_k.numel()
    remaining = 1 - m.layer_idx / m.num_layers
    position = torch.arange(C) / C
    for x, power in ((m.x_r, 0.2), (m.x_w, 0.9), (m.x_k, 0.7), (m.x_v, 0.7), (m.x_a, 0.9), (m.x_g, 0.2)):
        init.copy_(x, (1 - position ** (power * remaining)).view(1, 1, C))

    init.copy_(m.k_k, 0.71 - 0.1 * _along(A))
    init.constant_(m.k_a, 1.02)
    init.constant_(m.r_k, -0.04)
    init.orthogonal_(m.r_proj.weight)
    init.orthogonal_(m.k_proj.weight, gain=0.1)
    init.orthogonal_(m.v_proj.weight)
    init.zeros_(m.o_proj.weight)
    init.constant_(m.g_norm.weight, ((1 + m.layer_idx) / m.num_layers) ** 0.7)


def _init_down(down: nn.Linear) -> None:
    init.zeros_(down.weight)


def _init_up(up: nn.Linear, initial_bias) -> None:
    init.orthogonal_(up.weight, gain=0.1 * max(1.0, up.in_features / up.out_features) ** 0.5)
    if initial_bias is not None:
        init.copy_(up.bias, initial_bias())


def _initial_decay(A: int, head_dim: int, depth: float) -> torch.Tensor:
    return -5.5 + 6 * (_along(A) + 0.5) ** (1 + depth**0.3) + 2.5 * _zigzag(A, head_dim)


def _initial_rate(A: int, head_dim: int) -> torch.Tensor:
    return -0.19 + 0.3 * _zigzag(A, head_dim) + 0.4 * _along(A)


def _initial_value_mix(A: int, head_dim: int) -> torch.Tensor:
    return 0.73 - 0.4 * _along(A)


def _along(A: int) -> torch.Tensor:
    """-1/2 to 1/2 in A steps."""
    return torch.arange(A) / max(1, A - 1) - 0.5


def _zigzag(A: int, head_dim: int) -> torch.Tensor:
    """-1 to 1 along each head, small in its middle."""
    x = (torch.arange(A) % head_dim - (head_dim - 1) / 2) / max(1, (head_dim - 1) / 2)
    return x * x.abs()


class Rwkv7Model(Rwkv7PreTrainedModel, GenericRwkvModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache."""

    fused_step = FusedStep(Rwkv7Block, Rwkv7Block, Rwkv7TimeMix, Rwkv7ChannelMix, Rwkv7LowRank)
    _keys_to_ignore_on_load_unexpected = [
        *Rwkv7PreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(lm_head|score)\.",
    ]

    def __init__(self, config: Rwkv7Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Rwkv7Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_blocks(self):
        return self.layers

    def run_blocks(self, past_key_values, tokens, plan):
        """Ids (B, T) or embeddings (B, T, C) through all blocks and the last norm."""
        x = tokens if tokens.is_floating_point() else self.embeddings(tokens)
        hidden_states = self.fused_step(self, x, past_key_values, plan)
        if hidden_states is None:
            hidden_states, v_first = x, None
            for layer in self.layers:
                hidden_states, v_first = layer(hidden_states, v_first, past_key_values=past_key_values, plan=plan)
            hidden_states = self.norm(hidden_states)
        return hidden_states


class RWKV7ForCausalLM(Rwkv7PreTrainedModel, GenericRwkvForCausalLM):
    """RWKV-7 with its language-model head."""

    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: Rwkv7Config):
        super().__init__(config)
        self.model = Rwkv7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class RWKV7ForSequenceClassification(Rwkv7PreTrainedModel, GenericRwkvForSequenceClassification):
    """RWKV-7 with a linear head on the last token that is not padding: classifiers and reward models."""

    _keys_to_ignore_on_load_unexpected = [*Rwkv7PreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: Rwkv7Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = Rwkv7Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
