"""The models of all RWKV generations, up to what happens in their blocks: base, causal language model, classifier.

Glossary: B batch, T time, C residual width, V vocabulary.
"""

from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .rwkv_cache import recurrent_mask
from .rwkv_common import RwkvPreTrainedModel, no_cache_in_training
from .rwkv_configuration import correct_world_tokens
from .rwkv_linear import linear_of_few_rows
from .rwkv_loss import deferred_logits, may_defer
from .rwkv_parallel import register_styles
from .rwkv_sequences import check_inputs, plan_sequences, run_slices, runs_in_slices

register_styles()


def init_embedding_and_head(model, module) -> None:
    """The part of the official initialisation that all generations share; a case of `_init_weights`."""
    if isinstance(module, nn.Embedding):
        init.uniform_(module.weight, -1e-4, 1e-4)
    # By the head itself: transformers skips the rule of a module without parameters of its own.
    elif module is model.get_output_embeddings():
        V, C = module.weight.shape
        init.orthogonal_(module.weight, gain=0.5 * max(1.0, V / C) ** 0.5)


class GenericRwkvModel(RwkvPreTrainedModel):
    """The blocks between embedding and head. Returns the normalised last hidden state and the cache.

    A generation defines `run_blocks(past_key_values, tokens, plan)`, which takes ids (B, T) or embeddings (B, T, C)
    through all blocks and the last norm, and `get_blocks()`.
    """

    _auto_name = "AutoModel"

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

        if runs_in_slices(tokens, plan, self.get_blocks()):
            state = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            hidden_states = run_slices(partial(self.run_blocks, state), tokens, plan.mask, hidden_to_keep)
        else:
            hidden_states = self.run_blocks(past_key_values, tokens, plan)
        if past_key_values is not None:
            for layer_cache in past_key_values.layers:
                layer_cache.advance(tokens.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class GenericRwkvForCausalLM(RwkvPreTrainedModel, GenerationMixin):
    """A base model with its language-model head."""

    _auto_name = "AutoModelForCausalLM"
    # One mask for all layers, not one by their type: PEFT puts its prompts before a tensor or None.
    create_masks_for_generate = staticmethod(recurrent_mask)

    def adjust_generation_fn(self, *args, **kwargs):
        """Part of `from_pretrained`: the folder's own generation settings may name the wrong special tokens too."""
        super().adjust_generation_fn(*args, **kwargs)
        correct_world_tokens(self.generation_config, self.config.vocab_size)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs):
        """As transformers' own, but without the mask of a token that was generated: it is never padding."""
        if kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration"):
            kwargs["attention_mask"] = None
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

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
        """Inputs as in the base model's `forward`; logits (B, T, V), or only those that `logits_to_keep` asks for.

        `labels` (B, T) are the input ids, -100 where no loss is wanted; they are shifted here.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            hidden_to_keep=logits_to_keep if labels is None and isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        head = self.get_output_embeddings()
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        # In training the default loss does without logits, and they are made for whoever reads them.
        deferred = may_defer(self, hidden)
        logits = deferred_logits(hidden, head.weight) if deferred else linear_of_few_rows(head, hidden)
        loss = None
        if labels is not None and deferred and self.loss_function is ForCausalLMLoss:
            loss = logits.loss(labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class GenericRwkvForSequenceClassification(RwkvPreTrainedModel):
    """A base model with a linear head on the last token that is not padding: classifiers and reward models."""

    _auto_name = "AutoModelForSequenceClassification"
    # The loss is a mean over texts: the Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        """Inputs as in the base model's `forward`; logits (B, num_labels), one row a text.

        The last token is the mask's last 1, and without a mask the last id that is not `pad_token_id`: RWKV ends and
        pads texts with the same id, so only a mask tells a final one from padding.
        """
        outputs = self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
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
