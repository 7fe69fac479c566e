"""What the tests of GGUF files share: official weights in a file, files after the format's description, comparison."""

import struct
from pathlib import Path

import torch
from oracle.official import random_official

from wkv import gguf_format
from wkv.gguf_files import read_gguf, write_gguf
from wkv.tensor_files import LazyTensor

VERSIONS = ["6", "7"]


def lazy(weights: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, t.clone) for name, t in weights.items()}


def read(path) -> dict[str, torch.Tensor]:
    tensors = {name: (tensor, tensor.read()) for name, tensor in read_gguf(path).tensors.items()}
    assert all((stated.shape, stated.dtype) == (tuple(t.shape), t.dtype) for stated, t in tensors.values())
    return {name: t for name, (_, t) in tensors.items()}


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*as_bytes), name


def is_wide(name: str) -> bool:
    return name.endswith(".weight") and "ln" not in name


def by_hand(path: Path, metadata: dict, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    """A GGUF file of version 2 after the format's description: each tensor is its shape, type and data."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 2, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind = {str: 8, int: 4, float: 6}[type(value)]
        header += text(key) + struct.pack("<I", kind)
        header += text(value) if kind == 8 else struct.pack("<f" if kind == 6 else "<I", value)
    data = b""
    for name, (shape, kind, content) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind, len(data))
        data += content
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def taken_apart(path: Path) -> tuple[dict, dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Metadata and tensors of a file in float32, for `by_hand`; without a vocabulary."""
    metadata, tensors = gguf_format.read(path)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    return metadata, {name: (t.shape, 0, t.read().numpy().tobytes()) for name, t in tensors.items()}


def written(version: str, folder: Path, tokenizer=None, **arguments) -> tuple[dict[str, torch.Tensor], Path]:
    weights = random_official(version, **arguments)
    write_gguf(folder / "model.gguf", version, lazy(weights), tokenizer)
    return weights, folder / "model.gguf"
