"""What the RWKV generations share as transformers models: strict loading, saving in our names, caches in training."""

import functools
import json
import re
from collections import Counter

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    is_peft_available,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .rwkv_publishing import ModelPushesCode

logger = logging.get_logger(__name__)

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


LINEAR_FORWARD = nn.Linear.forward


def is_plain_linear(module) -> bool:
    """Whether calling the module is the product with its weight and nothing else: no bias, hook or adapter."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and nn.Linear.forward is LINEAR_FORWARD
    )


def autocast_dtype(x) -> torch.dtype | None:
    """The dtype that autocast gives to products on the device of x; None where it is off."""
    device = x.device.type
    # The meta device knows no autocast.
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def no_cache_in_training(forward):
    """A training forward builds a cache only when the caller asks for it, whatever the configuration's default."""

    @functools.wraps(forward)
    def wrapper(self, *args, use_cache=None, **kwargs):
        if use_cache is None and self.training and kwargs.get("past_key_values") is None:
            use_cache = False
        return forward(self, *args, use_cache=use_cache, **kwargs)

    return wrapper


class RwkvPreTrainedModel(ModelPushesCode, PreTrainedModel):
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
        weights = _base_model_of(pretrained_model_name_or_path, hub)
        if not isinstance(config, PreTrainedConfig):
            source = weights if config is None else config
            rest = {key: value for key, value in kwargs.items() if key not in hub}
            config, rest = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **rest)
            kwargs = hub | rest
        # Packed tensors of a quantised checkpoint have other shapes.
        if kwargs.get("gguf_file") is None and getattr(config, "quantization_config", None) is None:
            config = cls.config_from_shapes(config, checkpoint_shapes(weights, kwargs.get("state_dict"), hub))
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **dtype, **kwargs)

    @classmethod
    def config_from_shapes(cls, config, shapes: dict[str, tuple[int, ...]]):
        """A copy of `config` with every size that the tensors' shapes tell; `config` itself where they tell nothing."""
        votes, layers = {}, 0
        for name, shape in shapes.items():
            for pattern, fields in cls._sizes_from_tensors:
                if re.search(pattern, name):
                    for field, size in zip(fields, shape, strict=False):
                        votes.setdefault(field, Counter())[size] += 1
            if layer := re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name):
                layers = max(layers, int(layer[1]) + 1)
        # The majority, so that one misshapen tensor does not make all the others wrong.
        sizes = {field: counts.most_common(1)[0][0] for field, counts in votes.items() if field}
        if layers:
            sizes["num_hidden_layers"] = layers
        sizes |= cls._told_by_names(shapes)
        told = {field: size for field, size in sizes.items() if getattr(config, field) != size}
        if not told:
            return config
        logger.warning(
            f"{type(config).__name__}: the checkpoint's tensors say {told}, which replaces the config's sizes"
        )
        return type(config).from_dict(config.to_dict() | told)

    @staticmethod
    def _told_by_names(shapes: dict[str, tuple[int, ...]]) -> dict[str, int | bool]:
        """Fields of the configuration that single tensors do not tell, for generations that have such."""
        return {}

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # Refuse before transformers would fill the gaps with random numbers.
        missing = {key for key in loading_info.missing_keys if not key.startswith(model._new_heads)}
        unknown = set(loading_info.unexpected_keys)
        for pattern in model._keys_to_ignore_on_load_unexpected or ():
            unknown = {key for key in unknown if not re.search(pattern, key)}
        where = load_config.pretrained_model_name_or_path
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            name, found, expected = sorted(loading_info.mismatched_keys)[0]
            # The type that transformers raises here.
            raise RuntimeError(f"{where}: tensor {name} has shape {tuple(found)}, expected {tuple(expected)}")
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


def _base_model_of(folder, hub_arguments: dict):
    """The model that `folder` is an adapter of, by PEFT's adapter_config.json; `folder` itself when it is none."""
    if folder is None or not is_peft_available():
        return folder
    adapter = find_adapter_config_file(folder, **hub_arguments)
    if adapter is None:
        return folder
    with open(adapter, encoding="utf-8") as file:
        return json.load(file)["base_model_name_or_path"]


def checkpoint_shapes(folder, state_dict=None, hub_arguments=None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, without reading the data; empty for unknown formats."""
    if state_dict is not None:
        return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if folder is None:
        return {}
    hub = {"_raise_exceptions_for_missing_entries": False} | (hub_arguments or {})
    shapes = {}
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        files = [cached_file(folder, single, **hub)]
        if files == [None] and (found := cached_file(folder, index, **hub)):
            files, _ = get_checkpoint_shard_files(folder, found, **(hub_arguments or {}))
        for file in filter(None, files):
            shapes |= _shapes_in(file)
        if shapes:
            break
    return shapes


def _shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    if not file.endswith(".safetensors"):
        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except Exception as error:
        raise OSError(f"{file}: not a readable safetensors file ({error})") from error
