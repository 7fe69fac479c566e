"""Writing files and folders that appear when they are complete, with a progress bar and a look at the disk before."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .tensor_files import CheckpointError, LazyTensor, write_safetensors

SHARD_BYTES = 5_000_000_000


def total_bytes(tensors: dict[str, LazyTensor]) -> int:
    """The size of the tensors' data."""
    return sum(tensor.nbytes for tensor in tensors.values())


@contextlib.contextmanager
def with_progress(tensors: dict[str, LazyTensor]) -> Iterator[dict[str, LazyTensor]]:
    """The same tensors; each moves a progress bar on standard error, if that is a terminal, when it is read."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=total_bytes(tensors))

        def counted(tensor: LazyTensor) -> LazyTensor:
            def read() -> torch.Tensor:
                progress.advance(task, tensor.nbytes)
                return tensor.read()

            return tensor._replace(read=read)

        yield {name: counted(tensor) for name, tensor in tensors.items()}


def write_shards(folder: Path, tensors: dict[str, LazyTensor]) -> None:
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
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


@contextlib.contextmanager
def appearing(destination: Path, nbytes: int, folder: bool = False) -> Iterator[Path]:
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
