"""Products of a weight matrix with at most a few vectors, limited by reading the weights from memory.

Not an operator of torch.library: there is one device, one mode (inference), and the dispatcher would cost a tenth of a
small layer.
"""

import ctypes
import struct

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

# wkv_few_rows_linear_args of wkv.h.
_ARGUMENTS = struct.Struct("10q")

_multiply = LIBRARY.wkv_few_rows_linear
_multiply.argtypes = [ctypes.c_char_p]
_multiply.restype = ctypes.c_int


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T with sums in float32: x (B, n_in), weight (n_out, n_in) contiguous, both of one dtype; (B, n_out).

    Each weight is read once, whatever B. No gradient flows. Raises ValueError when the tensors do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be (B, n_in) and weight (n_out, n_in), not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        raise ValueError(f"x and weight must be float32, bfloat16 or float16, not {x.dtype} and {weight.dtype}")
    if not (x.is_cpu and weight.is_cpu and weight.is_contiguous()):
        raise ValueError("x and weight must be on the CPU, and weight contiguous")
    if x.stride(1) != 1:
        x = x.contiguous()
    B, n_in = x.shape
    y = torch.empty((B, weight.shape[0]), dtype=x.dtype)
    check(
        _multiply(
            _ARGUMENTS.pack(
                B,
                n_in,
                weight.shape[0],
                DTYPES[x.dtype],
                torch.get_num_threads(),
                x.data_ptr(),
                x.stride(0),
                weight.data_ptr(),
                y.data_ptr(),
                weight.shape[0],
            )
        )
    )
    return y
