"""States in files and in several hands: a text is read once, kept, and continued any number of times.

A state file is one safetensors file, for each layer l `layers.l.att_shift` and `layers.l.ffn_shift` (B, C) and
`layers.l.wkv` (B, H, K, V), or (B, A, 3) for RWKV-4; its header names the model's type and sizes, the orientation, the
tokens seen and a checksum. It belongs to the weights that made it, but names their sizes only. The official files of
tuned states, `blocks.l.att.time_state` (H, V, K), load too.

Letters: B rows, T tokens, C channels, H heads, K and V the key and value channels of a head, A the time-mix's width.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .models.rwkv_cache import RwkvCacheLayer, write_state
from .tensor_files import LazyTensor, open_checkpoint, write_pth, write_safetensors

FORMAT, VERSION = "wkv state", "1"
# What must be equal for a state to fit a model, beside the type and the shape of the WKV state.
SIZES = ("num_hidden_layers", "hidden_size", "attention_hidden_size", "intermediate_size")
# How an official file of tuned states is written, by the end of its name.
TIME_STATE_WRITERS = {".pth": write_pth, ".safetensors": write_safetensors}
# What the axes of the WKV state mean, by their number.
ORIENTATIONS = {3: "[H, K, V]", 2: "[A, (numerator, denominator, exponent)]"}


def read_text(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache | None = None) -> Cache:
    """The state after the ids (B, T), from nothing or from a state, which stays as it is."""
    cache = copy.deepcopy(cache) if cache is not None else DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def expand_state(cache: Cache, rows: int) -> Cache:
    """A copy with every row `rows` times over, for as many continuations of it in one batch."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(rows)
    return copied


def continue_from(cache: Cache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict:
    """Arguments of `generate` that continue a state with the ids (B, T): `model.generate(**continue_from(...))`.

    The state stays as it is; one of a single row is shared by all B.
    """
    held = cache.layers[0].recurrent_states[0].shape[0]
    if held not in (1, input_ids.shape[0]):
        raise ValueError(f"the state has {held} rows, {input_ids.shape[0]} are to be continued")
    seen = int(cache.get_seq_length())
    new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {
        "input_ids": input_ids,
        "attention_mask": torch.cat([new.new_ones(new.shape[0], seen), new], 1),
        "past_key_values": expand_state(cache, input_ids.shape[0] if held == 1 else 1),
    }


def save_state(cache: Cache, path: str | Path, model: PreTrainedModel) -> None:
    """Write the state of a model to a file, which appears complete or not at all and replaces one of that name.

    Raises ValueError for a cache that is not a state of this model.
    """
    path = Path(path)
    layers = getattr(cache, "layers", ())
    if not layers or not all(isinstance(layer, RwkvCacheLayer) and layer.is_initialized for layer in layers):
        raise ValueError(f"{path}: nothing to save: the cache holds no RWKV state")
    tensors = {}
    for index, layer in enumerate(layers):
        for name, state in zip(_names(index), (*layer.conv_states.values(), layer.recurrent_states[0]), strict=True):
            tensors[name] = (state.squeeze(-1) if name.endswith("shift") else state).detach().cpu().contiguous()
    first = tensors[_names(0)[2]]
    identity = _identity(model.config)
    if tuple(first.shape[1:]) != tuple(model.config.state_shape) or len(layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"{path}: the cache holds {len(layers)} states of shape {tuple(first.shape[1:])}, this model "
            f"{model.config.num_hidden_layers} of {tuple(model.config.state_shape)}: it is another model's"
        )
    header = {
        "format": FORMAT,
        "version": VERSION,
        **identity,
        "orientation": ORIENTATIONS[len(model.config.state_shape)],
        "rows": str(first.shape[0]),
        "tokens": str(int(cache.get_seq_length())),
        "dtype": str(tensors[_names(0)[0]].dtype).removeprefix("torch."),
    }
    header["sha256"] = _checksum(header, tensors)
    _write(path, tensors, partial(write_safetensors, metadata=header))


def load_state(path: str | Path, model: PreTrainedModel) -> Cache:
    """The state in a file, as a cache for this model, in its dtype and on its device; every call makes a new one.

    `path` is a file by `save_state` or an official file of a tuned state (`.pth` or safetensors; RWKV-5, 6, 7). Raises
    ValueError, one line that names the file and the field or tensor, for another model's state and for damaged files.
    """
    path = Path(path)
    tensors, header = _read(path)
    if any(name.endswith(".att.time_state") for name in tensors):
        shift = torch.zeros(1, model.config.hidden_size)
        states, tokens = [(shift, shift, S[None]) for S in _time_states(path, tensors, model.config)], 0
    else:
        states, tokens = _own_states(path, tensors, header, model)
    cache = DynamicCache(config=model.config)
    for index, (att_shift, ffn_shift, S) in enumerate(states):
        write_state(cache, index, 0, att_shift.to(model.device, model.dtype), S.to(model.device, torch.float32))
        write_state(cache, index, 1, ffn_shift.to(model.device, model.dtype))
        cache.layers[index].advance(tokens)
    return cache


def load_time_state(path: str | Path, config: PreTrainedConfig) -> list[torch.Tensor]:
    """The tuned state of every layer, (H, K, V), in an official file; ValueErrors as by `load_state`."""
    path = Path(path)
    return _time_states(path, _read(path)[0], config)


def save_time_state(states: Sequence[torch.Tensor], path: str | Path) -> None:
    """Write tuned states (H, K, V), one a layer, to an official file, which ends in .pth or .safetensors.

    Raises ValueError for another ending, and for RWKV-4.
    """
    path = Path(path)
    if path.suffix not in TIME_STATE_WRITERS:
        raise ValueError(f"{path}: the name of an official file of states ends in {' or '.join(TIME_STATE_WRITERS)}")
    if any(S.ndim != 3 for S in states):
        raise ValueError(f"{path}: RWKV-4 has no official file of states; keep the adapter's folder")
    tensors = {_time_state(layer): S.detach().cpu().mT.contiguous() for layer, S in enumerate(states)}
    _write(path, tensors, TIME_STATE_WRITERS[path.suffix])


def _time_state(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"


def _names(layer: int) -> tuple[str, str, str]:
    return tuple(f"layers.{layer}.{name}" for name in ("att_shift", "ffn_shift", "wkv"))


def _identity(config) -> dict[str, str]:
    fields = {"model_type": config.model_type, **{name: str(getattr(config, name)) for name in SIZES}}
    return {**fields, "state_shape": json.dumps(config.state_shape)}


def _refuse_foreign(path: Path, header: dict[str, str], model: PreTrainedModel) -> None:
    for field, wanted in _identity(model.config).items():
        if header.get(field) != wanted:
            raise ValueError(f"{path}: `{field}` is {header.get(field)} in the file, {wanted} in the model")


def _own_states(path: Path, tensors: dict, header: dict, model: PreTrainedModel) -> tuple[list, int]:
    """(att_shift, ffn_shift, S) of every layer, and the tokens seen."""
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: not a state file: neither written by wkv nor an official file of a tuned state")
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: version {header.get('version')} of the format, this program reads {VERSION}")
    _refuse_foreign(path, header, model)
    if header.get("sha256") != _checksum(header, tensors):
        raise ValueError(f"{path}: damaged: its contents do not match its checksum")
    layers = range(model.config.num_hidden_layers)
    return [tuple(tensors[name] for name in _names(layer)) for layer in layers], int(header["tokens"])


def _time_states(path: Path, tensors: dict, config: PreTrainedConfig) -> list[torch.Tensor]:
    """The tuned states, turned from the official orientation (H, V, K) to (H, K, V)."""
    if len(config.state_shape) != 3:
        raise ValueError(
            f"{path}: holds time_state tensors, which a model of type {config.model_type} cannot begin with"
        )
    H, K, V = config.state_shape
    names = [_time_state(layer) for layer in range(config.num_hidden_layers)]
    for name in (*names, *tensors):
        if name not in tensors or name not in names:
            trouble = "is missing" if name not in tensors else "is not expected"
            raise ValueError(f"{path}: {name} {trouble}; the model has {len(names)} layers")
        found = tensors[name]
        if found.shape != (H, V, K) or not found.dtype.is_floating_point:
            raise ValueError(
                f"{path}: {name} is {found.dtype} {tuple(found.shape)}, the model needs floats {(H, V, K)}"
            )
    return [tensors[name].mT for name in names]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a `.pth` or safetensors file, and the header of the latter."""
    try:
        data = path.read_bytes()
        # A zip archive or a pickle, and not the length of a safetensors header that looks like one.
        if data[:1] in (b"P", b"\x80") and data[8:9] != b"{":
            return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}, {}
        tensors = load(data)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a state file ({error})") from error
    length = int.from_bytes(data[:8], "little")
    return tensors, json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _checksum(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """Of the header but for the sum itself, and of every tensor with its name, dtype and shape."""
    fields = {field: value for field, value in header.items() if field not in ("sha256", "format")}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, torch.Tensor], write: Callable) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: is a folder" if path.is_dir() else f"{path.parent}: no such folder")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    stored = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    try:
        write(unfinished, stored)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
