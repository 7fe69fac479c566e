"""Compiled kernels for RWKV: operators declared through torch.library, and a tokenizer trie."""

import importlib.util

import torch

from .library import isa, version
from .wkv4 import wkv4
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = ["info", "serves", "wkv4", "wkv6", "wkv7"]

OPS = ("wkv4", "wkv6", "wkv7", "rwkv7_fused", "rwkv_step", "few_rows_linear", "cross_entropy")
# Operators with a module in triton/, for devices that torch calls cuda: NVIDIA's and, through ROCm, AMD's.
_TRITON_OPS = ("wkv4", "wkv6", "wkv7", "rwkv7_fused")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_fitting: dict[int | None, bool] = {}


def _fits(index: int | None) -> bool:
    """Whether Triton's kernels fit a GPU: NVIDIA's from compute capability 8.0 on, and AMD's."""
    if index not in _fitting:
        fits = not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability(index) >= (8, 0)
        _fitting[index] = bool(fits)
    return _fitting[index]


# What torch.compiler.assume_constant_result does, which would import torch's compiler here.
_fits._dynamo_marked_constant = True


def serves(op: str, device: torch.device) -> bool:
    """Whether an operator has kernels for a device, or is only traced there."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    return _HAS_TRITON and op in _TRITON_OPS and _fits(device.index)


def info() -> dict:
    """What runs here: version, instruction set, threads, and for each operator the backend of each device."""
    cuda = torch.device("cuda")
    return {
        "version": version(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "ops": {name: {"cpu": f"C++ ({isa()})", **({"cuda": "Triton"} if serves(name, cuda) else {})} for name in OPS},
    }
