"""Compiled kernels for RWKV: operators declared through torch.library, and a tokenizer trie."""

import torch

from .library import isa, version
from .wkv4 import wkv4
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = ["info", "wkv4", "wkv6", "wkv7"]

OPS = ("wkv4", "wkv6", "wkv7", "rwkv7_fused", "rwkv_step", "few_rows_linear", "cross_entropy")


def info() -> dict:
    """What runs here: version, instruction set, threads, and for each operator the backend of each device."""
    return {
        "version": version(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "ops": {name: {"cpu": f"C++ ({isa()})"} for name in OPS},
    }
