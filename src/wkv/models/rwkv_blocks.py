"""What RWKV-4, 5 and 6 have in common around their time-mix and channel-mix: blocks, model, heads, initialisation.

Glossary: B batch, T time, C residual width, l the index of a block.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .rwkv_cache import read_state, write_state
from .rwkv_common import RwkvPreTrainedModel
from .rwkv_fused import relu_squared, shift_mix
from .rwkv_linear import linear_of_few_rows
from .rwkv_memory_order import ReorderedChannelMix
from .rwkv_models import (
    GenericRwkvForCausalLM,
    GenericRwkvForSequenceClassification,
    GenericRwkvModel,
    init_embedding_and_head,
)
from .rwkv_step import FusedStep


class RescaledLayerNorm(nn.LayerNorm):
    """Layer norm of a residual that is kept `scale` times smaller than it is; exact, since the epsilon shrinks too."""

    def forward(self, x, scale=1.0):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps * scale**2)


class RwkvBlock(GradientCheckpointingLayer):
    """Time-mix and channel-mix, each on the normalised residual; block 0 also normalises the embeddings.

    In float16 the residual is kept `scale` times smaller than it is, by 2 more after every `rescale_every` blocks, and
    so is what the block adds to it. Nothing else changes: whatever reads the residual normalises it first.
    """

    def __init__(self, config, layer_idx: int, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        if layer_idx == 0:
            self.pre_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.ln1 = RescaledLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.ln2 = RescaledLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attention = attention
        self.feed_forward = feed_forward
        self.layer_idx, self.rescale_every = layer_idx, config.rescale_every

    def forward(self, hidden_states, past_key_values=None, plan=None):
        if self.layer_idx == 0:
            hidden_states = self.pre_ln(hidden_states)
        scale = residual_scale(hidden_states, self.rescale_every, self.layer_idx)
        after = residual_scale(hidden_states, self.rescale_every, self.layer_idx + 1)
        hidden_states = hidden_states + self.attention(self.ln1(hidden_states, scale), past_key_values, plan, scale)
        hidden_states = hidden_states + self.feed_forward(self.ln2(hidden_states, scale), past_key_values, plan, scale)
        return scaled(hidden_states, after / scale)


class GatedChannelMix(ReorderedChannelMix):
    """The position-wise half of a block: token shift, then sigmoid(receptance) times value(relu(key)^2).

    A generation adds the parameters of the token shift and `mixes()`, those of key and receptance as shares of the
    previous token.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.position = Position(config, layer_idx)
        C, F = config.hidden_size, config.intermediate_size
        self.key = nn.Linear(C, F, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(F, C, bias=False)

    def forward(self, x, past_key_values, plan, scale):
        """x (B, T, C). Returns `scale` times the update of the residual."""
        self.by_rows_for_gradients()
        carried, _ = read_state(past_key_values, self.layer_idx, 1)
        (x_k, x_r), last = shift_mix(x, carried, plan, self.mixes())
        write_state(past_key_values, self.layer_idx, 1, last)
        hidden = relu_squared(linear_of_few_rows(self.key, x_k))  # (B, T, F)
        r = linear_of_few_rows(self.receptance, x_r).sigmoid()
        return r * linear_of_few_rows(self.value, scaled(hidden, scale))

    def init_weights(self) -> None:
        init.orthogonal_(self.key.weight)
        for linear in (self.receptance, self.value):
            init.zeros_(linear.weight)


class MixChannelMix(GatedChannelMix):
    """The channel-mix of RWKV-4 and 5, whose parameters are the shares of the current token."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def mixes(self):
        return [1 - self.time_mix_key, 1 - self.time_mix_receptance]

    def init_weights(self) -> None:
        super().init_weights()
        for mix in (self.time_mix_key, self.time_mix_receptance):
            init.copy_(mix, self.position.channel**self.position.remaining)


def residual_scale(x, rescale_every: int, blocks: int) -> float:
    """What the residual x is kept multiplied by after so many blocks."""
    return 0.5 ** (blocks // rescale_every) if x.dtype == torch.float16 and rescale_every > 0 else 1.0


def scaled(x, scale: float):
    return x if scale == 1 else x * scale


class BlocksPreTrainedModel(RwkvPreTrainedModel):
    """Names, sizes and initialisation rules of RWKV-4, 5 and 6; a generation adds `time_mix` and `channel_mix`."""

    base_model_prefix = "rwkv"
    _no_split_modules = ["RwkvBlock"]
    _can_record_outputs = {"hidden_states": RwkvBlock}
    _sizes_from_tensors = (
        (r"embeddings\.weight$|(^|\.)emb\.weight$", ("vocab_size", "hidden_size")),
        (r"(\.(ln[012]|pre_ln)|ln_out)\.weight$", ("hidden_size",)),
        (r"att(ention)?\.(key|value|receptance|gate)\.weight$", ("attention_hidden_size", "hidden_size")),
        (r"(feed_forward|ffn)\.key\.weight$", ("intermediate_size",)),
    )
    # The classes that a generation's blocks are made of.
    time_mix: type
    channel_mix: type

    @torch.no_grad()
    def _init_weights(self, module):
        """The official initialisation, tensor by tensor (RWKV-LM, the trainer of the generation)."""
        super()._init_weights(module)
        init_embedding_and_head(self, module)
        if isinstance(module, (self.time_mix, self.channel_mix)):
            module.init_weights()


class BlocksModel(GenericRwkvModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache."""

    _keys_to_ignore_on_load_unexpected = [r"^(head|score)\."]
    fused_step: FusedStep

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        classes = (RwkvBlock, RescaledLayerNorm, cls.time_mix, cls.channel_mix)
        cls.fused_step = FusedStep(cls.make_block, *classes)

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(self.make_block(config, i) for i in range(config.num_hidden_layers))
        self.ln_out = RescaledLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def make_block(cls, config, layer_idx: int) -> RwkvBlock:
        """Block `layer_idx` of a model."""
        return RwkvBlock(config, layer_idx, cls.time_mix(config, layer_idx), cls.channel_mix(config, layer_idx))

    def get_blocks(self):
        return self.blocks

    def run_blocks(self, past_key_values, tokens, plan):
        """Ids (B, T) or embeddings (B, T, C) through all blocks and the last norm."""
        x = tokens if tokens.is_floating_point() else self.embeddings(tokens)
        hidden_states = self.fused_step(self, x, past_key_values, plan)
        if hidden_states is None:
            hidden_states = x
            for block in self.blocks:
                hidden_states = block(hidden_states, past_key_values=past_key_values, plan=plan)
            scale = residual_scale(hidden_states, self.config.rescale_every, len(self.blocks))
            hidden_states = self.ln_out(hidden_states, scale)
        return hidden_states


class BlocksForCausalLM(GenericRwkvForCausalLM):
    """A base model with its language-model head."""

    _fsdp_plan = {"head": "keep_full_weight"}
    _tp_plan = {"head": "colwise_gather_output"}
    base_class: type

    def __init__(self, config):
        super().__init__(config)
        self.rwkv = self.base_class(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, new_embeddings):
        self.head = new_embeddings


class BlocksForSequenceClassification(GenericRwkvForSequenceClassification):
    """A base model with a linear head on the last token that is not padding: classifiers and reward models."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]
    base_class: type

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.rwkv = self.base_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class Position:
    """Where a tensor stands, as initialisations need it: `depth` l / (L - 1), `remaining` 1 - l / L."""

    def __init__(self, config, layer_idx: int):
        L = config.num_hidden_layers
        self.depth = layer_idx / max(1, L - 1)
        self.remaining = 1 - layer_idx / L
        self.norm_scale = ((1 + layer_idx) / L) ** 0.7
        self.hidden_size = config.hidden_size

    @property
    def channel(self) -> torch.Tensor:
        """i / C for every channel i, (1, 1, C)."""
        return (torch.arange(self.hidden_size) / self.hidden_size).view(1, 1, -1)

    def decay(self, n: int, low: float, span: float) -> torch.Tensor:
        """The raw decay of n channels or heads, rising from `low` by `span`."""
        return low + span * self.along(n) ** (0.7 + 1.3 * self.depth)

    @staticmethod
    def along(n: int) -> torch.Tensor:
        """0 to 1 in n steps."""
        return torch.arange(n) / max(1, n - 1)

    @staticmethod
    def zigzag(n: int) -> torch.Tensor:
        """0, 1, -1, 0, 1, -1 ..., n values."""
        return (torch.arange(n) + 1) % 3 - 1.0
