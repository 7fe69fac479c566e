"""The operator cross_entropy: losses of rows of logits, which turn into their gradients in place.

Letters: n rows, V classes.
"""

import ctypes
import struct

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

torch.library.define("wkv::cross_entropy", "(Tensor(a!) logits, Tensor targets, float pull) -> Tensor")

# wkv_cross_entropy_args of wkv.h.
_ARGUMENTS = struct.Struct("7qdq")

_run = LIBRARY.wkv_cross_entropy
_run.argtypes = [ctypes.c_char_p]
_run.restype = ctypes.c_int


def cross_entropy(logits: Tensor, targets: Tensor, pull: float = 0.0) -> Tensor:
    """The cross-entropy of every row in float32, (n,); the logits become the gradient of its sum, in their dtype.

    logits (n, V) are float32, bfloat16 or float16, rows contiguous; targets (n,) int64. `pull` times a row's largest
    logit is added to the gradient where that stands, the first of equals. No gradient flows. Raises ValueError for
    tensors that do not fit and IndexError for a target that is no class.
    """
    return torch.ops.wkv.cross_entropy.default(logits, targets, pull)


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.stride(1) != 1 or logits.dtype not in DTYPES:
        raise ValueError(
            "logits must be (n, V) in float32, bfloat16 or float16 with contiguous rows, "
            f"not {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"targets must be int64 ({logits.shape[0]},) on {logits.device}, "
            f"not {targets.dtype} {tuple(targets.shape)} on {targets.device}"
        )


@torch.library.impl("wkv::cross_entropy", "CPU")
def _cross_entropy_cpu(logits, targets, pull):
    _check(logits, targets)
    n, V = logits.shape
    losses = torch.empty(n)
    if n == 0:
        return losses
    lowest, highest = (int(x) for x in targets.aminmax())
    if lowest < 0 or highest >= V:
        raise IndexError(f"target {lowest if lowest < 0 else highest} is out of bounds: there are {V} classes")
    targets = targets.contiguous()
    pointers = logits.data_ptr(), logits.stride(0), targets.data_ptr(), pull, losses.data_ptr()
    check(_run(_ARGUMENTS.pack(n, V, DTYPES[logits.dtype], torch.get_num_threads(), *pointers)))
    return losses


@torch.library.register_fake("wkv::cross_entropy")
def _cross_entropy_fake(logits, targets, pull):
    _check(logits, targets)
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)
