"""GGUF files of RWKV-6 and RWKV-7, read under official names and written for llama.cpp, one tensor at a time.

What a GGUF file has no place for stands in its metadata: the types of tensors that llama.cpp wants in float32, and
shapes that differ from the usual ones.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from . import gguf_format
from .gguf_tables import TABLES, Table, fields_of, scale_of, table_of, take_apart
from .layouts import Row
from .matching import axes_shape, match, rearrange, stored_as
from .models.gguf_vocabulary import token_list
from .models.tokenization_rwkv import RwkvTokenizer
from .tensor_files import Checkpoint, CheckpointError, LazyTensor

logger = logging.get_logger(__name__)

_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_DTYPES, _SHAPES = "wkv.official_dtypes", "wkv.official_shapes"


def read_gguf(path: str | Path) -> Checkpoint:
    """Open a GGUF file of RWKV-6 or RWKV-7 under official names, without reading tensors.

    Quantised tensors are read as float32. Raises `CheckpointError` for other models, for damaged files, and for what
    cannot be read.
    """
    path = Path(path)
    contents = gguf_format.read(path)
    try:
        return Checkpoint(path, dict(_official(contents)))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _official(contents: gguf_format.Contents) -> Iterator[tuple[str, LazyTensor]]:
    metadata = contents.metadata
    table, fields = table_of(metadata), fields_of(metadata)
    sizes = table.sizes(fields)
    dtypes, shapes = (json.loads(metadata.get(key, "{}")) for key in (_DTYPES, _SHAPES))
    epsilon = fields[table.keys["attention.layer_norm_epsilon"]]
    if epsilon != 1e-5:
        raise CheckpointError(f"has the epsilon {epsilon}; official names stand for 1e-05")
    for name, stored in contents.tensors.items():
        rows, block = table.find(name)
        if not rows:
            raise CheckpointError(f"tensor {name} does not belong to {metadata['general.architecture']}")
        if block == "0" and rows[0].blocks == "later":
            continue
        wanted = sum(torch.Size(axes_shape(row.our_axes, sizes)).numel() for row in rows)
        if torch.Size(stored.shape).numel() != wanted:
            raise CheckpointError(f"tensor {name} has shape {stored.shape}; the metadata ask for {wanted} elements")
        for part, row in enumerate(rows):
            official = row.official.replace("*", block)
            shape = tuple(shapes.get(official, axes_shape(row.official_axes, sizes)))
            dtype = getattr(torch, dtypes[official]) if official in dtypes else stored.dtype
            scale = scale_of(metadata, row, block)
            read = partial(_read_official, stored, rows, part, sizes, scale, dtype, shape)
            yield official, LazyTensor(shape, dtype, read)


def _read_official(stored: LazyTensor, rows: list[Row], part: int, sizes, scale: int, dtype, shape) -> torch.Tensor:
    tensor = take_apart(stored.read(), rows, [row.official_axes for row in rows], sizes)[part]
    return stored_as((tensor * scale if scale > 1 else tensor).to(dtype), shape)


def read_gguf_tokenizer(path: str | Path) -> RwkvTokenizer | None:
    """The World tokenizer in a GGUF file; None where it has no vocabulary. Raises `CheckpointError` for another one."""
    path = Path(path)
    kind = gguf_format.read(path).metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return None
    try:
        return RwkvTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_gguf(
    path: str | Path,
    version: str,
    tensors: dict[str, LazyTensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the tensors of an official checkpoint as a GGUF file for llama.cpp, reading one after the other.

    The wide matrices keep their type, the rest is float32. Without a World tokenizer the file has no vocabulary, and
    llama.cpp takes ids only. Nothing is halved: llama.cpp computes activations in float32. Raises `CheckpointError`
    for a model that it cannot run.
    """
    architecture = f"rwkv{version}"
    if architecture not in TABLES:
        raise CheckpointError(f"this is RWKV-{version}; llama.cpp runs RWKV-6 and RWKV-7")
    table = TABLES[architecture]
    found = match(table.generation.name, tuple(table.rows.values()), {n: t.shape for n, t in tensors.items()}, True)
    sizes = found.sizes
    if sizes["A"] != sizes["C"]:
        raise CheckpointError(f"has the attention width {sizes['A']}; llama.cpp asks for the model's, {sizes['C']}")
    if found.unused:
        logger.warning(f"left out, a GGUF file has no place for them: {', '.join(found.unused)}")
    stored, dtypes, shapes = {}, {}, {}
    for name, (row, block) in found.rows.items():
        tensor = tensors[name]
        if tensor.dtype not in gguf_format.TYPES:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; GGUF files have float32, float16 and bfloat16")
        # Between wide layers; llama.cpp computes with everything else in float32.
        dtype = tensor.dtype if re.fullmatch("[VCAF] [VCAF]", row.official_axes) else torch.float32
        if dtype != tensor.dtype:
            dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if tensor.shape != axes_shape(row.official_axes, sizes):
            shapes[name] = tensor.shape
        read = partial(_read_for_gguf, tensor, row, sizes, dtype)
        stored[row.ours.replace("*", block)] = LazyTensor(axes_shape(row.our_axes, sizes), dtype, read)
    metadata = _metadata(
        architecture, sizes, Counter(tensor.dtype for tensor in stored.values() if len(tensor.shape) > 1)
    )
    metadata |= _vocabulary(tokenizer, sizes["V"]) if tokenizer is not None else {"tokenizer.ggml.model": "no_vocab"}
    metadata |= {key: json.dumps(value) for key, value in ((_DTYPES, dtypes), (_SHAPES, shapes)) if value}
    gguf_format.write(Path(path), metadata, _as_stacks(table, stored, sizes["L"]))


def _read_for_gguf(tensor: LazyTensor, row: Row, sizes: dict[str, int], dtype: torch.dtype) -> torch.Tensor:
    return rearrange(tensor.read(), row.official_axes, row.our_axes, sizes).to(dtype)


def _as_stacks(table: Table, stored: dict[str, LazyTensor], L: int) -> dict[str, LazyTensor]:
    """The tensors with the mixes of each block in one, and the unused ones of block 0 that llama.cpp asks for."""
    stack, names = table.stacked
    for block in range(L):
        parts = [stored.pop(name.replace("*", str(block))) for name in names]
        shape = len(parts), 1, 1, *parts[0].shape
        read = partial(_read_stack, parts, shape)
        stored[stack.replace("*", str(block))] = LazyTensor(shape, torch.float32, read)
    for row in table.rows.values():
        if row.blocks == "later":
            name = row.ours.replace("*", "0")
            stored[name] = stored[name.replace("time_mix_v", "time_mix_a")]
    return stored


def _read_stack(parts: list[LazyTensor], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([part.read() for part in parts]).reshape(shape)


def _metadata(architecture: str, sizes: dict[str, int], dtypes: Counter) -> gguf_format.Metadata:
    generation, keys = TABLES[architecture].generation, TABLES[architecture].keys
    fields = {field: sizes[letter] for letter, field in generation.fields.items() if letter in sizes}
    config = AutoConfig.for_model(generation.model_type, **fields)
    wide = [dtype for dtype, _ in dtypes.most_common() if dtype != torch.float32] or [torch.float32]
    metadata = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.file_type": _FILE_TYPES[wide[0]],
        f"{architecture}.vocab_size": sizes["V"],
        # There is no limit; this is what llama.cpp's own converter writes.
        f"{architecture}.context_length": 1048576,
        f"{architecture}.attention.head_count": 0,
    }
    return metadata | {f"{architecture}.{key}": getattr(config, field) for key, field in keys.items()}


def _vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> gguf_format.Metadata:
    try:
        tokens, types, empty_line = token_list(tokenizer, rows)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    metadata = {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    metadata |= {f"tokenizer.ggml.{role}_token_id": 0 for role in ("bos", "eos", "unknown", "padding")}
    if empty_line is not None:
        metadata["tokenizer.ggml.eot_token_id"] = empty_line
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata
