"""The container of GGUF files: typed metadata, a table of tensors, and their data, all little-endian.

Quantised tensors are read through transformers' dequantisation; nothing quantised is written.
"""

import mmap
import struct
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_NAME, dequantize

from .tensor_files import CheckpointError, LazyTensor

MAGIC = b"GGUF"
# Kinds of metadata values: the letter of `struct`, or one of these two.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KIND_OF = {bool: 7, int: 4, float: 6, str: _STRING, list: _ARRAY}
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_UNREAD = {6: "Q5_0", 7: "Q5_1", 28: "F64", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
_ALIGNMENT = 32

Metadata = dict[str, bool | int | float | str | list[int] | list[str]]


class Contents(NamedTuple):
    """The metadata of a file and its tensors under the names in the file, in the order of axes of PyTorch."""

    metadata: Metadata
    tensors: dict[str, LazyTensor]


class _Header:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise EOFError("it ends within its header")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, letter: str):
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))
        return value

    def value(self, kind: int):
        if kind == _STRING:
            return self.take(self.scalar("Q")).decode()
        if kind == _ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file, by its name or by how it starts."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == MAGIC


def read(path: Path) -> Contents:
    """Read the header of a file and open its tensors: F32, F16 and BF16 as stored, quantised ones as float32.

    Raises `CheckpointError` for a file that is cut short or corrupt, and for a type that cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, _Header(data), len(data))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    # Damage shows itself in many ways: lengths, text, kinds and an empty file.
    except (EOFError, ValueError, KeyError, struct.error, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt GGUF file ({error})") from error


def _read(path: Path, header: _Header, size: int) -> Contents:
    if header.take(4) != MAGIC:
        raise ValueError("it does not start with GGUF")
    version, tensor_count, metadata_count = header.scalar("I"), header.scalar("Q"), header.scalar("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    metadata, table = {}, []
    for _ in range(metadata_count):
        key = header.value(_STRING)
        metadata[key] = header.value(header.scalar("I"))
    for _ in range(tensor_count):
        name = header.value(_STRING)
        # The fastest axis comes first in the file.
        shape = tuple(header.scalar("Q") for _ in range(header.scalar("I")))[::-1]
        table.append((name, shape, header.scalar("I"), header.scalar("Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-header.position // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in table:
        if number not in _DTYPES and number not in GGML_BLOCK:
            kind = f"type {_UNREAD.get(number, number)}"
            raise CheckpointError(f"{path}: tensor {name} has the quantisation {kind}, which cannot be read")
        dtype = _DTYPES.get(number, torch.float32)
        elements, nbytes = GGML_BLOCK.get(number, (1, dtype.itemsize))
        nbytes *= prod(shape) // elements
        if start + offset + nbytes > size:
            raise EOFError(f"it ends before the data of {name}")
        if number in GGML_BLOCK and (not shape or shape[-1] % elements):
            raise ValueError(f"{name} of shape {shape} is said to be {GGML_NAME[number]}, in blocks of {elements}")
        tensors[name] = LazyTensor(shape, dtype, partial(_read_tensor, path, shape, number, start + offset, nbytes))
    return Contents(metadata, tensors)


def _read_tensor(path: Path, shape: tuple[int, ...], number: int, offset: int, nbytes: int) -> torch.Tensor:
    data = torch.from_numpy(np.fromfile(path, np.uint8, nbytes, offset=offset))
    if len(data) != nbytes:
        raise CheckpointError(f"{path}: was cut short while it was read")
    return (data.view(_DTYPES[number]) if number in _DTYPES else dequantize(data, number)).reshape(shape)


def _pack(value) -> bytes:
    """A metadata value as it stands in a file, without its kind."""
    if isinstance(value, str):
        text = value.encode()
        return struct.pack("<Q", len(text)) + text
    if isinstance(value, list):
        # Token types, the only numbers in an array, are signed.
        kind = _STRING if isinstance(value[0], str) else 5
        packed = map(_pack, value) if kind == _STRING else [struct.pack(f"<{len(value)}i", *value)]
        return struct.pack("<IQ", kind, len(value)) + b"".join(packed)
    return struct.pack("<" + _SCALARS[_KIND_OF[type(value)]], value)


def write(path: Path, metadata: Metadata, tensors: dict[str, LazyTensor]) -> None:
    """Write a file of version 3, reading one tensor after the other; they are float32, float16 or bfloat16."""
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += _pack(key), struct.pack("<I", _KIND_OF[type(value)]), _pack(value)
    end = 0
    for name, tensor in tensors.items():
        axes = tensor.shape[::-1]
        table = struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, TYPES[tensor.dtype], end)
        header += _pack(name), table
        end += _padded(tensor.nbytes)
    with path.open("wb") as file:
        file.write(b"".join(header))
        _pad(file)
        for tensor in tensors.values():
            file.write(tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy())
            _pad(file)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _pad(file) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
