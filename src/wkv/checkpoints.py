"""Conversion between the official flat checkpoints and Hub folders, a tensor at a time and without loss.

What a Hub folder has no place for - the unused v0, v1, v2 of block 0 in some official files, and shapes that differ
from the usual ones in singleton axes - is kept beside the weights in `official_extras.safetensors`, so that the way
back gives the identical dictionary. Letters of sizes are those of `layouts`.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .auto import GENERATIONS as CLASSES
from .checks import logit_difference, refuse_folded_embedding, refuse_nonfinite
from .layouts import (
    GENERATIONS,
    Generation,
    Match,
    axes_shape,
    detect_version,
    match,
    official_names,
    rearrange,
    stored_as,
)
from .models.configuration_rwkv7 import GROUP_NORM_EPS
from .tensor_files import Checkpoint, CheckpointError, LazyTensor, open_checkpoint, write_pth, write_safetensors
from .vocabulary import build_tokenizer

logger = logging.get_logger(__name__)

EXTRAS_NAME = "official_extras.safetensors"
WORLD_ROWS = 65536
SHARD_BYTES = 5_000_000_000


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "hf",
    vocab: str | Path | None = None,
    tokenizer: bool = True,
    check: bool = False,
) -> float | None:
    """Convert a checkpoint to a Hub folder (`to="hf"`) or to an official `.pth` file (`to="pth"`).

    `source` is a `.pth` or safetensors file or a folder. A Hub folder gets the World tokenizer of the installed `rwkv`
    package, that of the vocabulary file `vocab`, or none with `tokenizer=False`. `destination` appears when it is
    complete. With `check`, weights that are not finite are refused, and the model is run before and after on the same
    tokens; the largest difference of the float32 logits is returned, or None where that comparison cannot be made.

    Raises `CheckpointError`, one line that names the file and the culprit.
    """
    source, destination = Path(source), Path(destination)
    if to not in ("hf", "pth"):
        raise CheckpointError(f"cannot convert to {to!r}: hf or pth is expected")
    if destination.exists():
        raise CheckpointError(f"{destination}: exists already")
    checkpoint = open_checkpoint(source)
    names = _attributed(source, official_names, checkpoint.tensors)
    official = any(name.startswith(("emb.", "blocks.")) for name in names)
    if check:
        refuse_nonfinite(checkpoint)
    if to == "hf" and not official:
        raise CheckpointError(f"{source}: holds no official tensor names; a Hub folder loads without conversion")
    if not official:
        return _hub_to_pth(checkpoint, destination, check)
    checkpoint = replace(checkpoint, tensors={name: checkpoint.tensors[stored] for name, stored in names.items()})
    if to == "hf":
        return _to_hub(checkpoint, destination, vocab, tokenizer, check)
    _read_official(checkpoint)
    with _appearing(destination, _total(checkpoint.tensors)) as partial, _with_progress(checkpoint.tensors) as tensors:
        write_pth(partial, tensors)
    return None


def _attributed(path: Path, function: Callable, *arguments):
    """Call a function that knows only names and shapes, and name the file in its complaint."""
    try:
        return function(*arguments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _read_official(checkpoint: Checkpoint) -> tuple[Generation, Match]:
    """The generation of a checkpoint with official names, and its tensors laid over the table."""
    version = _attributed(checkpoint.path, detect_version, _shapes(checkpoint))
    if version not in GENERATIONS:
        supported = ", ".join(generation.name for generation in GENERATIONS.values())
        raise CheckpointError(f"{checkpoint.path}: this is RWKV-{version}; `wkv convert` supports {supported} so far")
    generation = GENERATIONS[version]
    return generation, _attributed(checkpoint.path, match, generation, _shapes(checkpoint), True)


def _to_hub(
    checkpoint: Checkpoint, folder: Path, vocab: str | Path | None, tokenizer: bool, check: bool
) -> float | None:
    generation, found = _read_official(checkpoint)
    sizes = found.sizes
    refuse_folded_embedding(checkpoint)
    words = _tokenizer_for(sizes["V"], vocab) if tokenizer else None
    tensors, shapes = {}, {}
    for name, (row, block) in found.rows.items():
        stored = checkpoint.tensors[name]
        if stored.shape != axes_shape(row.official_axes, sizes):
            shapes[name] = stored.shape
        tensors[row.ours.replace("*", block)] = _rearranged(stored, row.official_axes, row.our_axes, sizes)
    extras = {name: checkpoint.tensors[name] for name in found.unused}
    config = _config(generation, sizes, tensors)
    with _appearing(folder, _total(tensors) + _total(extras), folder=True) as partial:
        config.save_pretrained(partial)
        GenerationConfig.from_model_config(config).save_pretrained(partial)
        if words is not None:
            words.save_pretrained(partial)
        with _with_progress(tensors) as counted:
            _write_shards(partial, counted)
        if extras or shapes:
            write_safetensors(partial / EXTRAS_NAME, extras, {"shapes": json.dumps(shapes)})
        return logit_difference(checkpoint.path, partial, sizes) if check else None


def _config(generation: Generation, sizes: dict[str, int], tensors: dict[str, LazyTensor]):
    fields = {generation.fields[letter]: size for letter, size in sizes.items()}
    config = AutoConfig.for_model(generation.model_type, **fields)
    config.architectures = [CLASSES[generation.model_type][2].rpartition(".")[2]]
    weight = Counter()
    for tensor in tensors.values():
        weight[tensor.dtype] += tensor.nbytes
    ((config.dtype, _),) = weight.most_common(1)
    return config


def _hub_to_pth(checkpoint: Checkpoint, file: Path, check: bool) -> float | None:
    folder = checkpoint.path
    generation = _generation_of_folder(folder)
    found = _attributed(folder, match, generation, _shapes(checkpoint), False)
    extras = open_checkpoint(folder / EXTRAS_NAME) if (folder / EXTRAS_NAME).is_file() else Checkpoint(folder, {})
    shapes = json.loads(extras.metadata.get("shapes", "{}"))
    if found.unused:
        logger.warning(f"{folder}: left out, no official file has a use for them: {', '.join(found.unused)}")
    tensors = {}
    for name, (row, block) in found.rows.items():
        official = row.official.replace("*", block)
        axes = row.our_axes, row.official_axes
        tensors[official] = _rearranged(checkpoint.tensors[name], *axes, found.sizes, shapes.get(official))
    tensors |= extras.tensors
    with _appearing(file, _total(tensors)) as partial:
        with _with_progress(tensors) as counted:
            write_pth(partial, counted)
        return logit_difference(partial, folder, found.sizes) if check else None


def _generation_of_folder(folder: Path) -> Generation:
    """The generation that config.json names; refuses constants that an official file cannot express."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be used ({str(error).splitlines()[0]})") from error
    for generation in GENERATIONS.values():
        if generation.model_type == config.model_type:
            if (config.norm_eps, config.group_norm_eps) != (1e-5, GROUP_NORM_EPS):
                raise CheckpointError(
                    f"{folder}: norm_eps {config.norm_eps} and group_norm_eps {config.group_norm_eps} cannot be kept: "
                    f"an official file stands for 1e-05 and {GROUP_NORM_EPS}"
                )
            return generation
    raise CheckpointError(
        f"{folder}: its config.json says model_type {config.model_type}, which has no official layout here"
    )


def _tokenizer_for(rows: int, vocab: str | Path | None):
    if vocab is None and rows != WORLD_ROWS:
        raise CheckpointError(
            f"the model has {rows} embedding rows, not the {WORLD_ROWS} of the World vocabulary: "
            "name its vocabulary file (--vocab) or convert without a tokenizer (--no-tokenizer)"
        )
    try:
        tokenizer = build_tokenizer(vocab)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if len(tokenizer) > rows:
        raise CheckpointError(f"{vocab}: has {len(tokenizer)} ids, the model only {rows} embedding rows")
    return tokenizer


def _rearranged(
    stored: LazyTensor, source_axes: str, target_axes: str, sizes: dict[str, int], shape=None
) -> LazyTensor:
    """The tensor in the axes of the other layout, or in the `shape` that deviates from them in singleton axes."""
    usual = axes_shape(target_axes, sizes)
    shape = usual if shape is None else tuple(shape)

    def read() -> torch.Tensor:
        return stored_as(rearrange(stored.read(), source_axes, target_axes, sizes), shape)

    return LazyTensor(shape, stored.dtype, read)


def _total(tensors: dict[str, LazyTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@contextlib.contextmanager
def _with_progress(tensors: dict[str, LazyTensor]) -> Iterator[dict[str, LazyTensor]]:
    """The same tensors; each moves a progress bar on standard error, if that is a terminal, when it is read."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=_total(tensors))

        def counted(tensor: LazyTensor) -> LazyTensor:
            def read() -> torch.Tensor:
                progress.advance(task, tensor.nbytes)
                return tensor.read()

            return tensor._replace(read=read)

        yield {name: counted(tensor) for name, tensor in tensors.items()}


def _write_shards(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    """Write safetensors files of at most SHARD_BYTES (or one tensor), and their index if there are several."""
    shards, filled = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SAFE_WEIGHTS_NAME, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SAFE_WEIGHTS_NAME.replace(".", f"-{number:05d}-of-{len(shards):05d}.")
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": _total(tensors)}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


@contextlib.contextmanager
def _appearing(destination: Path, nbytes: int, folder: bool = False) -> Iterator[Path]:
    """Yield a new sibling of `destination` to write to; it takes its place at the end, or is removed if that fails."""
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}: no such folder")
    free = shutil.disk_usage(destination.parent).free
    if free < nbytes:
        raise CheckpointError(f"{destination.parent}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    partial = destination.with_name(destination.name + ".partial")
    try:
        partial.mkdir() if folder else partial.touch(exist_ok=False)
    except FileExistsError:
        raise CheckpointError(
            f"{partial}: exists; a conversion is running or was killed there; remove it to start anew"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error})") from error
    try:
        yield partial
        if destination.exists():
            raise CheckpointError(f"{destination}: exists already")
        os.rename(partial, destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error})") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
