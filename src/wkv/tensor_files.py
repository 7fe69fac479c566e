"""Checkpoint files, read and written one tensor at a time: memory holds a tensor, never a model.

A `.pth` file is a zip archive of a pickle, which names the tensors, and one record of raw bytes a storage. The pickle
is read by an unpickler that knows tensors and dictionaries and nothing else, so it cannot run code. A safetensors file
is a JSON header followed by raw bytes; ours is written here because the library wants all tensors of a file in memory.
"""

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, logging

logger = logging.get_logger(__name__)

# dtype -> (its name in safetensors, its storage class in a pickle)
DTYPES = {
    torch.float64: ("F64", "DoubleStorage"),
    torch.float32: ("F32", "FloatStorage"),
    torch.float16: ("F16", "HalfStorage"),
    torch.bfloat16: ("BF16", "BFloat16Storage"),
    torch.int64: ("I64", "LongStorage"),
    torch.int32: ("I32", "IntStorage"),
    torch.int16: ("I16", "ShortStorage"),
    torch.int8: ("I8", "CharStorage"),
    torch.uint8: ("U8", "ByteStorage"),
    torch.bool: ("BOOL", "BoolStorage"),
}
_DTYPE_OF_STORAGE = {storage: dtype for dtype, (_, storage) in DTYPES.items()}
_DTYPE_OF_SAFETENSORS = {name: dtype for dtype, (name, _) in DTYPES.items()}
# What the `rwkv` package adds when it saves a model in its own, already transposed and rescaled, form.
_CONVERTED_MARKS = {"_strategy", "_version", "_rescale_layer"}
_ALIGNMENT = 64
_PIECE = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file and the culprit."""


class LazyTensor(NamedTuple):
    """A tensor that is read from its file by every call of `read()`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Checkpoint:
    """The tensors of a file or folder by name; `metadata` is that of a safetensors file."""

    path: Path
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str] = field(default_factory=dict)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.pth`, a safetensors file or a folder of one model, without reading tensors.

    Raises `CheckpointError` for anything else, for truncated or corrupt files and for pickles of more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if start == b"PK\x03\x04":
        return _open_pth(path)
    if start[:1] == b"\x80":
        return _open_legacy_pth(path)
    raise CheckpointError(f"{path}: neither a PyTorch checkpoint (.pth) nor a safetensors file")


def _open_folder(folder: Path) -> Checkpoint:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            return replace(open_checkpoint(folder / single), path=folder)
        if (folder / index).is_file():
            return _open_shards(folder, folder / index)
    raise CheckpointError(f"{folder}: holds no {SAFE_WEIGHTS_NAME} and no {WEIGHTS_NAME}")


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = {name: open_checkpoint(folder / name) for name in sorted(set(weight_map.values()))}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid index of shards") from error
    if lost := [name for name, shard in weight_map.items() if name not in shards[shard].tensors]:
        raise CheckpointError(f"{folder / weight_map[lost[0]]}: lacks {lost[0]}, which {index.name} places there")
    return Checkpoint(folder, {name: shards[shard].tensors[name] for name, shard in weight_map.items()})


def _open_safetensors(path: Path) -> Checkpoint:
    def read(name: str) -> torch.Tensor:
        # The file is mapped; opening it anew for every tensor lets go of the pages of the one before.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            metadata = file.metadata() or {}
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file ({error})") from error
    if unknown := {name: dtype for name, (_, dtype) in shapes.items() if dtype not in _DTYPE_OF_SAFETENSORS}:
        name, dtype = unknown.popitem()
        raise CheckpointError(f"{path}: tensor {name} has the unsupported type {dtype}")
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        tensors[name] = LazyTensor(shape, _DTYPE_OF_SAFETENSORS[dtype], partial(read, name))
    return Checkpoint(path, tensors, metadata)


class _Storage(NamedTuple):
    """A record of a `.pth` archive."""

    key: str
    dtype: torch.dtype
    numel: int


class _PickledTensor(NamedTuple):
    """A tensor as its pickle describes it: a strided window on a record."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (*self, False, OrderedDict())


def _rebuild_tensor(storage, offset, shape, stride, *_):
    return _PickledTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor, *_):
    return tensor


_KNOWN_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _TensorUnpickler(pickle.Unpickler):
    """Reads dictionaries of tensors; every other name in the pickle is refused, so nothing in it can be called."""

    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _DTYPE_OF_STORAGE:
            return _DTYPE_OF_STORAGE[name]
        if (module, name) in _KNOWN_GLOBALS:
            return _KNOWN_GLOBALS[module, name]
        raise CheckpointError(f"{self._path}: refused, its pickle wants to call {module}.{name}; only tensors are read")

    def persistent_load(self, pid):
        kind, dtype, key, _, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return _Storage(key, dtype, numel)


def _check_flat(path: Path, content: object, kind: type) -> None:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    if marks := _CONVERTED_MARKS & content.keys():
        raise CheckpointError(
            f"{path}: was converted by the `rwkv` package for one strategy (key {min(marks)}); use the original file"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, kind):
            raise CheckpointError(
                f"{path}: entry {name!r} is not a tensor; expected a flat dictionary of named tensors"
            )


def _open_pth(path: Path) -> Checkpoint:
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            pickles = sorted((name for name in sizes if name.endswith("/data.pkl")), key=len)
            if not pickles:
                raise CheckpointError(f"{path}: a zip archive, but not one written by torch.save (no data.pkl)")
            root = pickles[0].removesuffix("data.pkl")
            if root + "byteorder" in sizes and archive.read(root + "byteorder") != b"little":
                raise CheckpointError(f"{path}: written on a big-endian machine, which is not supported")
            with archive.open(pickles[0]) as file:
                content = _TensorUnpickler(file, path).load()
    except CheckpointError:
        raise
    # A damaged pickle can fail in any way inside the unpickler.
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error})") from error
    _check_flat(path, content, _PickledTensor)
    for name, tensor in content.items():
        record = f"{root}data/{tensor.storage.key}"
        if sizes.get(record) != tensor.storage.numel * tensor.storage.dtype.itemsize:
            raise CheckpointError(f"{path}: truncated or corrupt (the data of {name} is missing or has the wrong size)")

    def read(name: str) -> torch.Tensor:
        tensor = content[name]
        buffer = bytearray(sizes[f"{root}data/{tensor.storage.key}"])
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{root}data/{tensor.storage.key}") as file:
                view = memoryview(buffer)
                while view:
                    view = view[file.readinto(view[:_PIECE]) or len(view) :]
            if not buffer:
                return torch.empty(tensor.shape, dtype=tensor.storage.dtype)
            flat = torch.frombuffer(buffer, dtype=tensor.storage.dtype)
            return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).contiguous()
        # Checksums, headers and strides: damage shows itself in many ways here too.
        except Exception as error:
            raise CheckpointError(f"{path}: tensor {name} is corrupt ({error})") from error

    tensors = {}
    for name, tensor in content.items():
        tensors[name] = LazyTensor(tensor.shape, tensor.storage.dtype, partial(read, name))
    return Checkpoint(path, tensors)


def _open_legacy_pth(path: Path) -> Checkpoint:
    logger.warning(f"{path} has the format of before PyTorch 1.6, which can only be read into memory as a whole")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, its pickle holds more than tensors or is corrupt") from error
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({str(error).splitlines()[0]})") from error
    _check_flat(path, content, torch.Tensor)
    tensors = {}
    for name, tensor in content.items():
        tensors[name] = LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach().contiguous)
    return Checkpoint(path, tensors)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str] | None = None) -> None:
    """Write the named tensors to one safetensors file, reading one after the other."""
    # Wide types first, as the library does, so that every tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, _ = DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(tensors[name].read()))


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return ("storage", getattr(torch, DTYPES[obj.dtype][1]), obj.key, "cpu", obj.numel)
        return None


def write_pth(path: Path, tensors: dict[str, LazyTensor]) -> None:
    """Write the named tensors as a `.pth` file that torch.load reads, reading one after the other."""
    content = {}
    for key, (name, tensor) in enumerate(tensors.items()):
        stride = torch.empty(tensor.shape, device="meta").stride()
        storage = _Storage(str(key), tensor.dtype, torch.Size(tensor.shape).numel())
        content[name] = _PickledTensor(storage, 0, tuple(tensor.shape), stride)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            _TensorPickler(file, protocol=2).dump(content)
        _write_record(archive, "archive/byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            _write_record(archive, f"archive/data/{key}", _bytes(tensor.read()))
        _write_record(archive, "archive/version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    # Padding in the extra field aligns the data, as torch.save does, so that the file can be mapped into memory.
    record = zipfile.ZipInfo(name)
    zip64_field = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
    start = archive.start_dir + 30 + len(name) + 4 + zip64_field
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + b"\0" * padding
    archive.writestr(record, data)
