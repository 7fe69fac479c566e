"""Loads libwkv, the compiled part, through ctypes.

Structures of wkv.h consist of 64-bit words; callers write them with `struct`, which costs a fraction of what ctypes
structures do.
"""

import ctypes
import os
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ERRORS = {
    1: MemoryError("libwkv: out of memory"),
    2: ValueError("cu_seqlens must rise from 0 to the number of tokens"),
}


def _load() -> ctypes.CDLL:
    # An editable install has two folders: the sources, and the one where the library was built to.
    folders = [Path(folder) for folder in __import__(__package__).__path__]
    paths = [path for folder in folders for path in sorted(folder.glob("libwkv.*")) if path.suffix in {".so", ".dylib"}]
    if not paths:
        raise ImportError(f"wkv_kernels: the compiled library libwkv is not in {', '.join(map(str, folders))}")
    try:
        library = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        raise ImportError(f"wkv_kernels: {paths[0]} does not load: {error}") from error
    for name in ("wkv_version", "wkv_isa", "wkv_isas"):
        getattr(library, name).restype = ctypes.c_char_p
    if library.wkv_isa() is None:
        forced, possible = os.environ["WKV_ISA"], library.wkv_isas().decode()
        raise ImportError(f"wkv_kernels: WKV_ISA={forced} cannot run on this machine; possible: {possible}")
    return library


LIBRARY = _load()


def version() -> str:
    """Version of the package that the library was built for."""
    return LIBRARY.wkv_version().decode()


def isa() -> str:
    """Name of the instruction set in use, for example avx512."""
    return LIBRARY.wkv_isa().decode()


def available_isas() -> list[str]:
    """Names of the instruction sets that this machine can run, best first."""
    return LIBRARY.wkv_isas().decode().split()


def check(status: int) -> None:
    """Raises what a status returned by the library stands for."""
    if status:
        raise _ERRORS[status]
