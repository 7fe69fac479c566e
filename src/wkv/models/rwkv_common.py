"""What the RWKV generations share: the cache layer, padding and packing, token shift, and strict loading.

Glossary: B batch, T time, C channels, S the recurrent state of a layer.
"""

import functools
import re
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_torchdynamo_compiling
from transformers.utils.hub import get_checkpoint_shard_files

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "_commit_hash",
)


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
        """Replace token-shift state `state_idx` by `conv_states` (B, C, 1), in place."""
        _check_batch(self.conv_states[state_idx], conv_states)
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        self.has_previous_state[state_idx] = True
        return self.conv_states[state_idx].copy_(conv_states)

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """Replace the WKV state by `recurrent_states`, in place."""
        _check_batch(self.recurrent_states[state_idx], recurrent_states)
        return super().update_recurrent_state(recurrent_states, state_idx)

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


def _check_batch(held: torch.Tensor | None, new: torch.Tensor) -> None:
    if held is not None and held.shape != new.shape:
        raise ValueError(
            f"the cache holds a state of shape {tuple(held.shape)}, this forward needs {tuple(new.shape)}: "
            "it was made by another model or for another batch size"
        )


STATIC_LAYER_TYPE_MAPPING["rwkv"] = RwkvCacheLayer


def recurrent_mask(config, inputs_embeds, attention_mask, past_key_values=None, **kwargs):
    """The columns of a 0/1 mask that belong to the new tokens, (B, T); None where nothing is masked.

    As transformers' own, but a masked single token is honoured too (outside of compiled graphs).
    """
    if attention_mask is None or inputs_embeds.shape[1] > 1 or is_torchdynamo_compiling():
        return create_recurrent_attention_mask(config, inputs_embeds, attention_mask, past_key_values)
    newest = attention_mask[:, -1:]
    return None if newest.device.type == "cpu" and bool(newest.all()) else newest


LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["rwkv"] = recurrent_mask


class SequencePlan(NamedTuple):
    """Which tokens belong together in a batch with padding or packed documents; all None for plain rows.

    `mask` (B, T) is False at padding. `source` (B, T) and `last` (B,) index the tensor [carried state, zeros, tokens]
    along time: the predecessor of every token, and the last token of a row. `cu_seqlens` (n + 1,) are the bounds of the
    packed documents in the flattened (B * T) batch, `first` and `final` (B,) the documents a row begins and ends with.
    """

    mask: torch.Tensor | None = None
    source: torch.Tensor | None = None
    last: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    first: torch.Tensor | None = None
    final: torch.Tensor | None = None


def plan_sequences(inputs_embeds, mask, position_ids=None, continues=False, cu_seq_lens_q=None, seq_idx=None):
    """Build the SequencePlan of a forward from whatever the caller gave to describe padding and packing.

    `inputs_embeds` (B, T, C); `mask` (B, T) or None; `position_ids` (B, T) restarting at 0, `cu_seq_lens_q` (n + 1,)
    with B = 1, or `seq_idx` (B, T) describe packed documents. `continues` says that a cache holds earlier tokens; then
    `position_ids` do not mark packing. Raises `ValueError` when a shape does not fit.
    """
    B, T, _ = inputs_embeds.shape
    starts = _document_starts(inputs_embeds, mask, position_ids, continues, cu_seq_lens_q, seq_idx)
    if mask is None and starts is None:
        return SequencePlan()
    valid = torch.ones(B, T, dtype=torch.bool, device=inputs_embeds.device) if mask is None else mask.bool()
    # Time index + 2: 0 is the carried state, 1 the zeros before a document.
    index = torch.arange(2, T + 2, device=valid.device).expand(B, T)
    newest = torch.where(valid, index, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(newest[:, :1]), newest[:, :-1]], 1)
    plan = SequencePlan(None if mask is None else valid, before, newest[:, -1])
    if starts is None:
        return plan
    document = torch.where(starts, index, 0).cummax(1).values
    plan = plan._replace(
        source=torch.where(before >= document, before, 1),
        last=torch.where(newest[:, -1] >= document[:, -1], newest[:, -1], 1),
    )
    if cu_seq_lens_q is not None:
        first = torch.zeros(1, dtype=torch.long, device=valid.device)
        return plan._replace(cu_seqlens=cu_seq_lens_q, first=first, final=first + cu_seq_lens_q.shape[0] - 2)
    starts = starts.clone()
    starts[:, 0] = True
    bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([B * T], device=starts.device)])
    per_row = starts.sum(1)
    final = per_row.cumsum(0) - 1
    return plan._replace(cu_seqlens=bounds, first=final - per_row + 1, final=final)


def _document_starts(inputs_embeds, mask, position_ids, continues, cu_seq_lens_q, seq_idx):
    """Where documents begin inside the rows, (B, T) bool; None if nowhere. A row's first token never begins one."""
    B, T, _ = inputs_embeds.shape
    if cu_seq_lens_q is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, the batch has {B} rows")
        starts = torch.zeros(1, T + 1, dtype=torch.bool, device=inputs_embeds.device)
        starts[0, cu_seq_lens_q.long()] = True
        starts[0, 0] = False
        return starts[:, :T]
    if seq_idx is not None:
        if seq_idx.shape != (B, T):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, the tokens have {(B, T)}")
        starts = seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0
    elif position_ids is not None and position_ids.ndim == 2 and T > 1 and not continues:
        # The first real token of a row begins nothing: padding to its left may be numbered 0 as well.
        real = torch.ones_like(position_ids) if mask is None else mask.long()
        starts = (position_ids == 0) & (real == 1) & (real.cumsum(1) > 1)
    else:
        return None
    return starts if bool(starts.any()) else None


def token_shift(x, carried, plan: SequencePlan):
    """The predecessor of every token, and the last token of every row.

    x (B, T, C); carried (B, C), the last token before this call, or None for zeros. Returns (B, T, C) and (B, C).
    """
    carried = torch.zeros_like(x[:, 0]) if carried is None else carried.to(x.dtype)
    if plan.source is None:
        return torch.cat([carried.unsqueeze(1), x[:, :-1]], 1), x[:, -1]
    padded = torch.cat([carried.unsqueeze(1), torch.zeros_like(x[:, :1]), x], 1)
    rows = torch.arange(x.shape[0], device=x.device)
    return padded[rows.unsqueeze(1), plan.source], padded[rows, plan.last]


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
    """Store the last token (B, C) of token shift `shift_idx` and, when given, the WKV state; no gradient is kept."""
    if past_key_values is None:
        return
    if S is not None:
        past_key_values.update_recurrent_state(S.detach(), layer_idx)
    past_key_values.update_conv_state(last.detach().unsqueeze(-1), layer_idx, shift_idx)


def check_inputs(config, input_ids, inputs_embeds, attention_mask, past_key_values) -> None:
    """Raise `ValueError` for what would otherwise fail far away or pass unnoticed."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens.ndim != (2 if inputs_embeds is None else 3) or tokens.shape[1] == 0:
        name = "input_ids must be (B, T)" if inputs_embeds is None else "inputs_embeds must be (B, T, C)"
        raise ValueError(f"{name} with at least one token, got shape {tuple(tokens.shape)}")
    if past_key_values is not None:
        layers = getattr(past_key_values, "layers", ())
        if len(layers) != config.num_hidden_layers or not all(isinstance(layer, RwkvCacheLayer) for layer in layers):
            raise ValueError(
                f"past_key_values must hold {config.num_hidden_layers} RWKV states, as "
                f"DynamicCache(config=model.config) does; got {type(past_key_values).__name__} with {len(layers)} layers"
            )
    if isinstance(attention_mask, torch.Tensor) and not is_torchdynamo_compiling():
        B, T = tokens.shape[:2]
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if attention_mask.ndim == 2 and (
            attention_mask.shape[0] != B or attention_mask.shape[1] < T or (not seen and attention_mask.shape[1] != T)
        ):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({B}, {T})"
                + (f" or ({B}, {seen + T})" if seen else "")
            )
    if input_ids is not None and input_ids.device.type == "cpu" and not is_torchdynamo_compiling():
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside of the vocabulary, 0 to {config.vocab_size - 1}")


def no_cache_in_training(forward):
    """A training forward builds a cache only when the caller asks for it, whatever the configuration's default."""

    @functools.wraps(forward)
    def wrapper(self, *args, use_cache=None, **kwargs):
        if use_cache is None and self.training and kwargs.get("past_key_values") is None:
            use_cache = False
        return forward(self, *args, use_cache=use_cache, **kwargs)

    return wrapper


class RwkvPreTrainedModel(PreTrainedModel):
    """Loading and saving rules of every generation: sizes come from the tensors, and no tensor is ever made up."""

    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _can_compile_fullgraph = True
    # Heads that a checkpoint of the bare language model cannot have.
    _new_heads = ("score.",)
    # (pattern of a tensor's name, configuration field of each of its axes; None where an axis says nothing)
    _sizes_from_tensors: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As transformers', but the sizes are read from the tensors, and a missing or unknown tensor is an error."""
        # Not for the configuration, which cannot hold a dtype of "auto".
        dtype = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            rest = {key: value for key, value in kwargs.items() if key not in hub}
            config, rest = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **rest)
            kwargs = hub | rest
        if kwargs.get("gguf_file") is None:
            shapes = checkpoint_shapes(pretrained_model_name_or_path, kwargs.get("state_dict"), hub)
            config = cls.config_from_shapes(config, shapes)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **dtype, **kwargs)

    @classmethod
    def config_from_shapes(cls, config, shapes: dict[str, tuple[int, ...]]):
        """A copy of `config` with every size that the tensors' shapes tell; `config` itself where they tell nothing."""
        sizes = {}
        for name, shape in shapes.items():
            for pattern, fields in cls._sizes_from_tensors:
                if re.search(pattern, name):
                    sizes |= {field: size for field, size in zip(fields, shape, strict=False) if field}
            if layer := re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name):
                sizes["num_hidden_layers"] = max(sizes.get("num_hidden_layers", 0), int(layer[1]) + 1)
        if not sizes:
            return config
        return type(config).from_dict(config.to_dict() | sizes)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # Refuse before transformers would fill the gaps with random numbers.
        missing = {key for key in loading_info.missing_keys if not key.startswith(model._new_heads)}
        unknown = set(loading_info.unexpected_keys)
        for pattern in model._keys_to_ignore_on_load_unexpected or ():
            unknown = {key for key in unknown if not re.search(pattern, key)}
        where = load_config.pretrained_model_name_or_path
        for problem, keys in (("lacks", missing), ("has unknown", unknown)):
            if keys:
                names = ", ".join(sorted(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
                raise ValueError(f"{where}: the checkpoint {problem} tensors for {type(model).__name__}: {names}")
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As transformers', but always in our own names, whatever layout the weights were loaded from."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # transformers answers False for every class with "rwkv" in its name; our cache layer fits its caches.
        return True


def checkpoint_shapes(folder, state_dict=None, hub_arguments=None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, without reading the data; empty for formats other than safetensors."""
    if state_dict is not None:
        return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if folder is None:
        return {}
    hub = {"_raise_exceptions_for_missing_entries": False} | (hub_arguments or {})
    files = [cached_file(folder, SAFE_WEIGHTS_NAME, **hub)]
    if files == [None] and (index := cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, **hub)):
        files, _ = get_checkpoint_shard_files(folder, index, **(hub_arguments or {}))
    shapes = {}
    for file in filter(None, files):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:
            raise OSError(f"{file}: not a readable safetensors file ({error})") from error
    return shapes
