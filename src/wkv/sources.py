"""Any checkpoint as lazily read tensors with official names, axes and shapes: what conversions start from."""

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, logging

from .gguf_files import read_gguf
from .gguf_format import is_gguf
from .layouts import Generation, Shapes, detect_version
from .matching import axes_shape, match, rearrange, stored_as
from .models.configuration_rwkv7 import GROUP_NORM_EPS
from .names import generation_of_layout, is_linear, layout_of, official_names
from .tensor_files import Checkpoint, CheckpointError, LazyTensor, open_checkpoint

logger = logging.get_logger(__name__)

# Beside the weights in a folder: what an official file has and a folder has no place for.
EXTRAS_NAME = "official_extras.safetensors"
# What an official file stands for, by the names of all configurations.
_EXACT = {
    "norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "group_norm_eps": GROUP_NORM_EPS,
    "group_norm_epsilon": GROUP_NORM_EPS,
}


@dataclass
class Source:
    """A checkpoint by official names.

    `layout` is that of the file: official, hf, fla or gguf. `tensors` have the usual shapes, `shapes` those of an
    official file that differ; `unused` are the v0, v1, v2 of block 0 that some have. `sizes` are by letter. `plain`
    tells that the file is a `.pth` with exactly these names and shapes, `order` the order of its names, if it has one.
    """

    path: Path
    layout: str
    version: str
    generation: Generation
    sizes: dict[str, int]
    tensors: dict[str, LazyTensor]
    shapes: Shapes
    unused: dict[str, LazyTensor]
    plain: bool = False
    order: list[str] | None = None


def read_source(path: Path) -> Source:
    """Open any checkpoint: a `.pth`, safetensors or GGUF file, or a folder. `CheckpointError` names what is wrong."""
    gguf = is_gguf(path)
    checkpoint = read_gguf(path) if gguf else open_checkpoint(path)
    layout = layout_of(checkpoint.tensors)
    if layout == "official":
        return _read_official(checkpoint, "gguf" if gguf else layout)
    if not path.is_dir():
        raise CheckpointError(f"{path}: has the tensors of a folder; name the folder, its config.json is needed")
    return _read_folder(checkpoint, layout)


def attributed(path: Path, function: Callable, *arguments):
    """Call a function that knows only names and shapes, and name the file in its complaint."""
    try:
        return function(*arguments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _shapes(tensors: dict[str, LazyTensor]) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _turned(tensor: LazyTensor) -> LazyTensor:
    return tensor._replace(shape=tensor.shape[::-1], read=lambda: tensor.read().t())


def _read_official(checkpoint: Checkpoint, layout: str) -> Source:
    path, tensors = checkpoint.path, {}
    # A fork's folder; what else its configuration says, the tensors tell better.
    if (path / CONFIG_NAME).is_file():
        _refuse_epsilons(path, json.loads((path / CONFIG_NAME).read_text("utf-8")))
    names = attributed(path, official_names, checkpoint.tensors)
    for name, stored in names.items():
        tensor = checkpoint.tensors[stored]
        tensors[name] = _turned(tensor) if is_linear(stored) else tensor
    version = attributed(path, detect_version, _shapes(tensors))
    generation = attributed(path, generation_of_layout, "official", _shapes(tensors))
    found = attributed(path, match, generation.name, generation.rows, _shapes(tensors), True)
    if version == "5.2" and generation.constants["bonus_is_log"] and path.suffix == ".safetensors":
        logger.warning(
            f"{path}: time_first is read as the logarithm of the bonus, as the `rwkv` package does; some programs "
            "write the bonus itself under this name: use the original .pth if the model talks nonsense"
        )
    usual, shapes = {}, {}
    for name, (row, _) in found.rows.items():
        axes = row.official_axes
        usual[name] = rearranged(tensors[name], axes, axes, found.sizes)
        if tensors[name].shape != usual[name].shape:
            shapes[name] = tensors[name].shape
    unused = {name: tensors[name] for name in found.unused}
    plain = not shapes and zipfile.is_zipfile(path) and all(name == stored for name, stored in names.items())
    return Source(path, layout, version, generation, found.sizes, usual, shapes, unused, plain, list(tensors))


def _read_folder(checkpoint: Checkpoint, layout: str) -> Source:
    folder = checkpoint.path
    generation = attributed(folder, generation_of_layout, layout, _shapes(checkpoint.tensors))
    _refuse_other_constants(folder, generation)
    tensors = _unstacked(checkpoint.tensors, generation)
    rows = generation.fla if layout == "fla" else generation.rows
    found = attributed(folder, match, generation.name, rows, _shapes(tensors), False)
    if found.unused:
        logger.warning(f"{folder}: left out, no official file has a use for them: {', '.join(found.unused)}")
    official = {}
    for name, (row, block) in found.rows.items():
        axes = row.our_axes, row.official_axes
        official[row.official.replace("*", block)] = rearranged(tensors[name], *axes, found.sizes)
    extras = open_checkpoint(folder / EXTRAS_NAME) if (folder / EXTRAS_NAME).is_file() else Checkpoint(folder, {})
    shapes = {name: tuple(shape) for name, shape in json.loads(extras.metadata.get("shapes", "{}")).items()}
    version = detect_version(_shapes(official))
    return Source(folder, layout, version, generation, found.sizes, official, shapes, extras.tensors)


def _unstacked(tensors: dict[str, LazyTensor], generation: Generation) -> dict[str, LazyTensor]:
    """Flash-linear-attention's stacks of mixes (n, C) taken apart into the tensors that the table knows."""
    stacks, apart = generation.stacked | generation.once_stacked, {}
    for name, stack in tensors.items():
        if parts := stacks.get(re.sub(r"\.\d+\.", ".*.", name, count=1)):
            block = re.search(r"\.(\d+)\.", name)[1]
            for number, part in enumerate(parts):
                read = lambda stack=stack, number=number: stack.read()[number]  # noqa: E731
                apart[part.replace("*", block)] = LazyTensor(stack.shape[1:], stack.dtype, read)
        else:
            apart[name] = stack
    return apart


def _refuse_other_constants(folder: Path, generation: Generation) -> None:
    """Refuse a config.json of another generation, or with constants that an official file cannot express."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{folder}: its config.json cannot be used ({reason})") from error
    if config.model_type != generation.model_type:
        raise CheckpointError(
            f"{folder}: its config.json says model_type {config.model_type}, its tensors are those of {generation.name}"
        )
    # The configuration's own dictionary lacks what follows from other fields.
    _refuse_epsilons(folder, {name: getattr(config, name) for name in _EXACT if hasattr(config, name)})


def _refuse_epsilons(folder: Path, config: dict) -> None:
    for name, value in _EXACT.items():
        if not math.isclose(config.get(name, value), value):
            raise CheckpointError(
                f"{folder}: {name} {config[name]} cannot be kept: an official file stands for {value}"
            )


def rearranged(stored: LazyTensor, source_axes: str, target_axes: str, sizes: dict[str, int]) -> LazyTensor:
    """The tensor in other axes, and in the shape that they stand for."""

    def read() -> torch.Tensor:
        return rearrange(stored.read(), source_axes, target_axes, sizes)

    return LazyTensor(axes_shape(target_axes, sizes), stored.dtype, read)


def as_in_file(source: Source) -> dict[str, LazyTensor]:
    """The tensors of a source in the shapes of the official file that they come from, with those that nothing reads."""

    def shaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, tensor.dtype, lambda: stored_as(tensor.read(), shape).contiguous())

    tensors = source.tensors | source.unused
    for name, shape in source.shapes.items():
        if name in source.tensors:
            tensors[name] = shaped(tensors[name], shape)
    return {name: tensors[name] for name in source.order or tensors}
