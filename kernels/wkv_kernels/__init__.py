"""Compiled kernels for RWKV: operators declared through torch.library, and a tokenizer trie."""

import torch

from .library import isa, version
from .wkv7 import wkv7

__all__ = ["info", "wkv7"]

OPS = ("wkv7", "rwkv7_fused", "rwkv7_step", "few_rows_linear", "cross_entropy")


def info() -> dict:
    """What runs here: version, instruction set, threads, and for each operator the backend of each device."""
    return {
        "version": version(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "ops": {name: {"cpu": f"C++ ({isa()})"} for name in OPS},
    }
