"""RWKV-7 ("Goose"): model, causal language model and sequence classifier.

Glossary, as in the paper: B batch, T time, C residual width, H heads of K channels (A = H K), `r` receptance,
`w` decay, `k` key, `v` value, `a` in-context learning rate, `g` gate; `x_r` ... `x_g` token-shift mixes, `k_k` and
`k_a` key modifiers, `r_k` bonus, `v_first` the values of layer 0, S the WKV state (B, H, K, K) in float32.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025) and the official inference code. In half precision
the projections run in the model's dtype, as its Python path does; decay, state, and what the operator reads from the
state are float32, as in its CUDA kernels. rwkv7_step.py, which decodes on CPUs, keeps all activations in float32.
"""

from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rwkv7 import Rwkv7Config, correct_world_tokens
from .rwkv7_fused import Rwkv7GroupNorm, key_stage, out_stage, relu_squared, shift_mix, value_residual
from .rwkv7_memory_order import by_rows
from .rwkv7_step import FusedStep, linear_of_few_rows
from .rwkv_cache import read_state, recurrent_mask, write_state
from .rwkv_common import RwkvPreTrainedModel, no_cache_in_training
from .rwkv_loss import deferred_logits, may_defer
from .rwkv_sequences import check_inputs, plan_sequences, run_slices, runs_in_slices
from .wkv7 import wkv7


class Rwkv7LowRank(nn.Module):
    """x -> W2 f(W1 x) (+ bias): how decay, learning rate, value mix and gate depend on the token."""

    def __init__(self, config, rank: int, activation: nn.Module, bias: bool = True):
        super().__init__()
        down = nn.Linear(config.hidden_size, rank, bias=False)
        self.lora = nn.Sequential(down, activation, nn.Linear(rank, config.attention_hidden_size, bias=bias))

    def forward(self, x):
        return self.lora(x)


class Rwkv7TimeMix(nn.Module):
    """The recurrent half of a block: token shift, the five projections, the WKV operator, group norm, bonus, gate."""

    def __init__(self, config: Rwkv7Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_layers = config.num_hidden_layers
        self.head_dim = config.head_dim
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
        self.w_lora = Rwkv7LowRank(config, config.decay_low_rank_dim, nn.Tanh())
        self.a_lora = Rwkv7LowRank(config, config.a_low_rank_dim, nn.Identity())
        if layer_idx > 0:
            self.v_lora = Rwkv7LowRank(config, config.v_low_rank_dim, nn.Identity())
        self.g_lora = Rwkv7LowRank(config, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = Rwkv7GroupNorm(config.num_heads, A, eps=config.group_norm_eps)

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
        o, S = self.recurrence(r, log_w, k, v, a, b, S, plan)
        write_state(past_key_values, self.layer_idx, 0, last, S)
        return self.o_proj(out_stage(self.g_norm, o, r, k, v, self.g_lora(x_g), self.r_k)), v_first

    def heads(self, x):
        """(B, T, A) to (B, T, H, K)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def recurrence(self, r, log_w, k, v, a, b, S, plan):
        """The WKV operator on a batch that may hold padding (an identity step there) and packed documents."""
        if plan.mask is not None:
            padding = ~plan.mask[..., None, None]
            log_w, k, b = (x.masked_fill(padding, 0) for x in (log_w, k, b))
        if plan.cu_seqlens is None:
            return wkv7(r, log_w, k, v, a, b, S)
        B, T, H, K = r.shape
        states = torch.zeros(plan.cu_seqlens.shape[0] - 1, H, K, K, dtype=torch.float32, device=r.device)
        if S is not None:
            states = states.index_copy(0, plan.first, S)
        row = (x.reshape(1, B * T, H, K) for x in (r, log_w, k, v, a, b))
        o, states = wkv7(*row, states, plan.cu_seqlens)
        return o.view(B, T, H, K), states[plan.final]


class Rwkv7ChannelMix(nn.Module):
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
        if torch.is_grad_enabled() and not is_torchdynamo_compiling():
            by_rows(self.value)
        carried, _ = read_state(past_key_values, self.layer_idx, 1)
        (x_k,), last = shift_mix(x, carried, plan, [self.x_k])
        write_state(past_key_values, self.layer_idx, 1, last)
        return self.value(relu_squared(self.key(x_k)))

    # The decoding step changes the memory order of `value`, never its values; training and saving get it back by rows.
    def train(self, mode: bool = True):
        if mode:
            by_rows(self.value)
        return super().train(mode)

    def _save_to_state_dict(self, *args):
        by_rows(self.value)
        super()._save_to_state_dict(*args)


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
        (r"embeddings\.weight$|(^|\.)emb\.weight$", ("vocab_size", "hidden_size")),
        (r"att(n)?\.r_k$", ("num_heads", "head_dim")),
        (r"((attn|ffn|pre)_norm|model\.norm|\.ln[012]|ln_out)\.weight$", ("hidden_size",)),
        (r"([rkv]_proj|att\.(receptance|key|value))\.weight$", ("attention_hidden_size", "hidden_size")),
        (r"ffn\.key\.weight$", ("intermediate_size",)),
        (r"(w_lora\.lora\.0|att\.w1)\.weight$", ("decay_low_rank_dim",)),
        (r"(a_lora\.lora\.0|att\.a1)\.weight$", ("a_low_rank_dim",)),
        (r"(v_lora\.lora\.0|att\.v1)\.weight$", ("v_low_rank_dim",)),
        (r"(g_lora\.lora\.0|att\.g1)\.weight$", ("gate_low_rank_dim",)),
        (r"att\.w1$", (None, "decay_low_rank_dim")),
        (r"att\.a1$", (None, "a_low_rank_dim")),
        (r"att\.v1$", (None, "v_low_rank_dim")),
        (r"att\.g1$", (None, "gate_low_rank_dim")),
    )

    @torch.no_grad()
    def _init_weights(self, module):
        """The official initialisation, tensor by tensor (RWKV-LM, the RWKV-7 trainer)."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif isinstance(module, Rwkv7TimeMix):
            _init_time_mix(module)
        elif isinstance(module, Rwkv7ChannelMix):
            C = module.x_k.numel()
            ratio = 1 - module.layer_idx / module.num_layers
            init.copy_(module.x_k, 1 - (torch.arange(C) / C) ** (ratio**4))
            init.orthogonal_(module.key.weight)
            init.zeros_(module.value.weight)
        # By the head itself: transformers skips the rule of a module without parameters of its own.
        elif module is getattr(self, "lm_head", None):
            V, C = module.weight.shape
            init.orthogonal_(module.weight, gain=0.5 * max(1.0, V / C) ** 0.5)


def _init_time_mix(m: Rwkv7TimeMix) -> None:
    C, A = m.x_r.numel(), m.k_k.numel()
    depth = m.layer_idx / max(1, m.num_layers - 1)
    remaining = 1 - m.layer_idx / m.num_layers
    position = torch.arange(C) / C
    for x, power in ((m.x_r, 0.2), (m.x_w, 0.9), (m.x_k, 0.7), (m.x_v, 0.7), (m.x_a, 0.9), (m.x_g, 0.2)):
        init.copy_(x, (1 - position ** (power * remaining)).view(1, 1, C))

    n = torch.arange(A)
    linear = n / max(1, A - 1) - 0.5
    zigzag = (n % m.head_dim - (m.head_dim - 1) / 2) / max(1, (m.head_dim - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    decay = -6 + 6 * (n / max(1, A - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
    init.copy_(m.w_lora.lora[2].bias, decay)
    init.copy_(m.a_lora.lora[2].bias, -0.19 + 0.3 * zigzag + 0.4 * linear)
    low_ranks = [m.w_lora, m.a_lora, m.g_lora]
    if m.layer_idx > 0:
        init.copy_(m.v_lora.lora[2].bias, 0.73 - 0.4 * linear)
        low_ranks.append(m.v_lora)
    for low_rank in low_ranks:
        init.zeros_(low_rank.lora[0].weight)
        rank = low_rank.lora[2].in_features
        init.orthogonal_(low_rank.lora[2].weight, gain=0.1 * max(1.0, rank / A) ** 0.5)

    init.copy_(m.k_k, 0.71 - 0.1 * linear)
    init.constant_(m.k_a, 1.02)
    init.constant_(m.r_k, -0.04)
    init.orthogonal_(m.r_proj.weight)
    init.orthogonal_(m.k_proj.weight, gain=0.1)
    init.orthogonal_(m.v_proj.weight)
    init.zeros_(m.o_proj.weight)
    init.constant_(m.g_norm.weight, ((1 + m.layer_idx) / m.num_layers) ** 0.7)


fused_step = FusedStep(Rwkv7Block, Rwkv7TimeMix, Rwkv7ChannelMix, Rwkv7LowRank)


class Rwkv7Model(Rwkv7PreTrainedModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache."""

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

    @no_cache_in_training
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cu_seq_lens_q=None,
        seq_idx=None,
        hidden_to_keep=0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Shapes: input_ids (B, T) or inputs_embeds (B, T, C); attention_mask (B, T), or (B, past + T) with a cache.

        Packed documents are told by `cu_seq_lens_q` (n + 1,) with B = 1, by `seq_idx` (B, T), or by `position_ids`
        (B, T) restarting at 0. Without gradients a long input runs in slices, in memory that does not grow with it;
        of the hidden states (B, T, C) it then returns only the last `hidden_to_keep`, unless that is 0. Raises
        `ValueError` for shapes, ids or caches that do not fit.
        """
        check_inputs(
            self.config,
            self.embeddings,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            past_key_values,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(attention_mask, dict):
            mask = attention_mask["rwkv"]
        else:
            mask = recurrent_mask(self.config, tokens, attention_mask, past_key_values)
        continues = past_key_values is not None and past_key_values.has_previous_state(0, 0)
        plan = plan_sequences(tokens, mask, position_ids, continues, cu_seq_lens_q, seq_idx)

        if runs_in_slices(tokens, plan, self.layers):
            state = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            hidden_states = run_slices(partial(self.run_blocks, state), tokens, plan.mask, hidden_to_keep)
        else:
            hidden_states = self.run_blocks(past_key_values, tokens, plan)
        if past_key_values is not None:
            for layer_cache in past_key_values.layers:
                layer_cache.advance(tokens.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def run_blocks(self, past_key_values, tokens, plan):
        """Ids (B, T) or embeddings (B, T, C) through all blocks and the last norm."""
        x = tokens if tokens.is_floating_point() else self.embeddings(tokens)
        hidden_states = fused_step(self, x, past_key_values, plan)
        if hidden_states is None:
            hidden_states, v_first = x, None
            for layer in self.layers:
                hidden_states, v_first = layer(hidden_states, v_first, past_key_values=past_key_values, plan=plan)
            hidden_states = self.norm(hidden_states)
        return hidden_states


class RWKV7ForCausalLM(Rwkv7PreTrainedModel, GenerationMixin):
    """RWKV-7 with its language-model head."""

    def __init__(self, config: Rwkv7Config):
        super().__init__(config)
        self.model = Rwkv7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        """Part of `from_pretrained`: the folder's own generation settings may name the wrong special tokens too."""
        super().adjust_generation_fn(*args, **kwargs)
        correct_world_tokens(self.generation_config, self.config.vocab_size)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Inputs as in `Rwkv7Model.forward`; logits (B, T, V), or only those that `logits_to_keep` asks for.

        `labels` (B, T) are the input ids, -100 where no loss is wanted; they are shifted here.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            hidden_to_keep=logits_to_keep if labels is None and isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        # In training the default loss does without logits, and they are made for whoever reads them.
        deferred = may_defer(self, hidden)
        logits = deferred_logits(hidden, self.lm_head.weight) if deferred else linear_of_few_rows(self.lm_head, hidden)
        loss = None
        if labels is not None and deferred and self.loss_function is ForCausalLMLoss:
            loss = logits.loss(labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class RWKV7ForSequenceClassification(Rwkv7PreTrainedModel):
    """RWKV-7 with a linear head on the last token that is not padding: classifiers and reward models."""

    _keys_to_ignore_on_load_unexpected = [*Rwkv7PreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]
    # The loss is a mean over texts: the Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: Rwkv7Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = Rwkv7Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        """Inputs as in `Rwkv7Model.forward`; logits (B, num_labels), one row a text.

        The last token is the mask's last 1, and without a mask the last id that is not `pad_token_id`: RWKV ends and
        pads texts with the same id, so only a mask tells a final one from padding.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden = outputs.last_hidden_state
        B, T, _ = hidden.shape
        if attention_mask is not None:
            real = attention_mask[:, -T:]
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            real = torch.ones(B, T, device=hidden.device)
        last = (torch.arange(T, device=hidden.device) * real.to(hidden.device).long()).argmax(-1)
        logits = self.score(hidden[torch.arange(B, device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
