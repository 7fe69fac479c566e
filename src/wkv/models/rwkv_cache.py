"""The state of an RWKV model as a layer type, "rwkv", of transformers' own caches.

Glossary: B batch, T time, C channels, S the recurrent state of a layer.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, LinearAttentionLayer
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask
from transformers.utils import is_torchdynamo_compiling


class RwkvCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """The state of one RWKV layer, as a layer of transformers' own caches (layer type "rwkv").

    Two token-shift states, `conv_states[0]` of the time-mix and `conv_states[1]` of the channel-mix, each (B, C, 1) in
    the activations' dtype, and the WKV state `recurrent_states[0]` in float32. Its size does not depend on the number
    of tokens seen; that number is kept in a tensor, so that compiled decoding does not recompile at every step.
    """

    _layer_type = "rwkv"
    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=2)
        self.cumulative_length = torch.zeros((), dtype=torch.long)

    def lazy_initialization(self, **kwargs) -> None:
        super().lazy_initialization(**kwargs)
        if self.device is not None and self.cumulative_length.device != self.device:
            self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("an RWKV layer keeps a recurrent state, it has no keys and values to update")

    def update_conv_state(self, conv_states, state_idx=0, **kwargs):
        """Replace token-shift state `state_idx` by `conv_states` (B, C, 1), in place and without gradient."""
        _check_batch(self.conv_states[state_idx], conv_states)
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        self.has_previous_state[state_idx] = True
        return self.conv_states[state_idx].copy_(conv_states.detach())

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """Replace the WKV state by `recurrent_states`, in place and without gradient."""
        _check_batch(self.recurrent_states[state_idx], recurrent_states)
        return super().update_recurrent_state(recurrent_states.detach(), state_idx)

    def get_seq_length(self):
        """Tokens seen, padding included: an int before the first forward, a tensor afterwards."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens as seen."""
        self.cumulative_length.add_(tokens)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda state: state[indices])

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def _map(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)


class CarriedLayer(RwkvCacheLayer):
    """A layer whose states carry gradients: each forward puts its own in their place and leaves those it read alone."""

    _layer_type = None

    def update_conv_state(self, conv_states, state_idx=0, **kwargs):
        """Replace token-shift state `state_idx` by `conv_states` (B, C, 1)."""
        _check_batch(self.conv_states[state_idx], conv_states)
        self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
        # It may be a view of all tokens, which it would keep alive.
        self.conv_states[state_idx] = conv_states.clone()
        self.lazy_initialization()
        return self.conv_states[state_idx]

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """Replace the WKV state by `recurrent_states`."""
        _check_batch(self.recurrent_states[state_idx], recurrent_states)
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


def carried_cache(config, states=None) -> Cache:
    """A cache through which gradients flow, empty or with `states` (B, N) as `packed_states` returns them."""
    cache = Cache(layers=[CarriedLayer() for _ in range(config.num_hidden_layers)])
    if states is None:
        return cache
    sizes = config.hidden_size, config.hidden_size, math.prod(config.local_state_shape)
    for layer, state in zip(cache.layers, states.split(sum(sizes), 1), strict=True):
        *shifts, S = state.split(sizes, 1)
        for i, last in enumerate(shifts):
            layer.update_conv_state(last.unsqueeze(-1), i)
        layer.update_recurrent_state(S.unflatten(1, config.local_state_shape))
    return cache


def packed_states(cache) -> torch.Tensor:
    """All states of a cache in one tensor (B, N), float32: of each layer both token shifts, then the WKV state.

    Of many small tensors, each made in the midst of larger ones, a long-lived one keeps the memory around it.
    """
    states = [x for layer in cache.layers for x in (*layer.conv_states.values(), layer.recurrent_states[0])]
    return torch.cat([x.flatten(1).float() for x in states], 1)


def _check_batch(held: torch.Tensor | None, new: torch.Tensor) -> None:
    if held is not None and held.shape != new.shape:
        raise ValueError(
            f"the cache holds a state of shape {tuple(held.shape)}, this forward needs {tuple(new.shape)}: "
            "it was made by another model or for another batch size"
        )


STATIC_LAYER_TYPE_MAPPING["rwkv"] = RwkvCacheLayer


def recurrent_mask(config, inputs_embeds, attention_mask, past_key_values=None, **kwargs):
    """The columns of a 0/1 mask that belong to the new tokens, (B, T); None where nothing is masked, if not on a GPU.

    As transformers' own, but a masked single token is honoured too (outside of compiled graphs).
    """
    if attention_mask is None or inputs_embeds.shape[1] > 1 or is_torchdynamo_compiling():
        return create_recurrent_attention_mask(config, inputs_embeds, attention_mask, past_key_values)
    newest = attention_mask[:, -1:]
    return None if newest.device.type == "cpu" and bool(newest.all()) else newest


LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["rwkv"] = recurrent_mask


def read_state(past_key_values, layer_idx: int, shift_idx: int):
    """The carried token (B, C) of token shift `shift_idx` and the WKV state of a layer; None where there is none."""
    if past_key_values is None:
        return None, None
    carried = past_key_values.get_conv_state(layer_idx, shift_idx)
    S = past_key_values.get_recurrent_state(layer_idx)
    # The cache is overwritten in place, autograd still needs what the forward saw.
    if S is not None and torch.is_grad_enabled():
        S = S.clone()
    return None if carried is None else carried[..., -1], S


def write_state(past_key_values, layer_idx: int, shift_idx: int, last, S=None) -> None:
    """Store the last token (B, C) of token shift `shift_idx` and, when given, the WKV state."""
    if past_key_values is None:
        return
    if S is not None:
        past_key_values.update_recurrent_state(S, layer_idx)
    past_key_values.update_conv_state(last.unsqueeze(-1), layer_idx, shift_idx)


class InitialState(nn.Module):
    """The WKV state that every text begins with: None, which is zeros.

    An adapter may put another module in its place, which returns it in the shape of one row, in float32.
    """

    def forward(self) -> torch.Tensor | None:
        return None


def check_cache(config, past_key_values, batch: int) -> None:
    if past_key_values is None:
        return
    layers = getattr(past_key_values, "layers", ())
    if len(layers) != config.num_hidden_layers or not all(isinstance(layer, RwkvCacheLayer) for layer in layers):
        raise ValueError(
            f"past_key_values must hold {config.num_hidden_layers} RWKV states, as "
            f"DynamicCache(config=model.config) does; got {type(past_key_values).__name__} with {len(layers)} layers"
        )
    held = layers[0].conv_states[0], layers[0].recurrent_states[0]
    for state, shape in zip(held, ((config.hidden_size, 1), config.local_state_shape), strict=True):
        if state is not None and tuple(state.shape) != (batch, *shape):
            raise ValueError(
                f"past_key_values holds a state of shape {tuple(state.shape)}, this forward needs {(batch, *shape)}: "
                "it is from another model or another batch size"
            )
