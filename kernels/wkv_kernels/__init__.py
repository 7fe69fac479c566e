"""Compiled kernels for RWKV: operators declared through torch.library, and a tokenizer trie."""

import torch

from . import gpu
from .library import isa, version
from .wkv4 import wkv4
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = ["info", "serves", "wkv4", "wkv6", "wkv7"]

OPS = ("wkv4", "wkv6", "wkv7", "rwkv7_fused", "rwkv_step", "few_rows_linear", "cross_entropy")


def serves(op: str, device: torch.device, head_size: int = 0) -> bool:
    """Whether an operator has kernels for a device, and heads of so many key channels, or is only traced there."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    return op in gpu.OPS and head_size <= gpu.MAX_HEAD_SIZE.get(op, head_size) and gpu.runs(device.index)


def info() -> dict:
    """What runs here: version, instruction set, threads, and for each operator the backend of each device."""
    cuda = torch.device("cuda")
    return {
        "version": version(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "ops": {name: {"cpu": f"C++ ({isa()})", **({"cuda": "Triton"} if serves(name, cuda) else {})} for name in OPS},
    }
