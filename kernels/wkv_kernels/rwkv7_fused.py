"""What stands between the matrix products of a RWKV-7 block, each piece one operator: schemas, checks, gradients.

Letters: B batch rows, T tokens, C channels, H heads of N channels each, A = H N; `raw_w`, `raw_a` what decay and
in-context learning rate are made from; `r_k` bonus, g gate, o the output of the WKV operator.

Rows are float32, bfloat16 or float16, of any dtype each and strided at will; the arithmetic is float32. A backward pass
computes anew whatever it needs from the inputs, nothing else is kept. Gradients flow once.
"""

import ctypes
import struct

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

MAX_MIXES = 6

_NO_ROWS = (0, 0, 0, 0)
_NO_VECTOR = (0, 0)


def shift_mix(x: Tensor, before: Tensor | None, mixes: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each of up to six mixes of every token with the one before it, p: x + (p - x) mix, in `dtype`.

    x is (B, T, C), each mix has C values. `before` is (B, C), what precedes the first token of a row (None for zeros),
    or (B, T, C), what precedes each token. Raises ValueError naming the argument that does not fit.
    """
    return _run(torch.ops.wkv.rwkv7_shift_mix.default, x, before, mixes, dtype)


def key_stage(raw_w: Tensor, raw_k: Tensor, raw_a: Tensor, k_k: Tensor, k_a: Tensor, heads: int) -> list[Tensor]:
    """What the WKV operator reads, (B, T, H, N) each: log_w in float32; k, a and b in the dtype of raw_k.

    log_w = -exp(-1/2) sigmoid(raw_w), eta = sigmoid(raw_a), kk = raw_k k_k divided by its norm in each head,
    k = raw_k (1 + (eta - 1) k_a), a = -kk, b = kk eta. Inputs are (B, T, A), parameters have A values. Raises ValueError
    naming the argument that does not fit.
    """
    return _run(torch.ops.wkv.rwkv7_key_stage.default, raw_w, raw_k, raw_a, k_k, k_a, heads)


def value_residual(v: Tensor, v_first: Tensor, raw: Tensor) -> Tensor:
    """v + (v_first - v) sigmoid(raw), in the shape (B, T, A) and dtype of v; ValueError names what does not fit."""
    return _run(torch.ops.wkv.rwkv7_value_residual.default, v, v_first, raw)


def out_stage(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """(group norm of o, affine, + bonus) g, where the bonus is v times the sum of r k r_k over a head.

    o, r, k and v are (B, T, H, N), g (B, T, A), r_k (H, N), weight and bias have A values. Returns (B, T, A) in the dtype
    of g. Raises ValueError naming the argument that does not fit.
    """
    return _run(torch.ops.wkv.rwkv7_out_stage.default, o, r, k, v, g, r_k, weight, bias, eps)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 for x (B, T, C)."""
    return _run(torch.ops.wkv.rwkv7_relu_squared.default, x)


def _run(op, *inputs):
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return op(*inputs)
    # Nothing to differentiate: going past autograd saves a single token some microseconds.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _fits(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the first argument on {device}: all must be on one device")


def _has(name: str, x: Tensor, size: int, device: torch.device) -> None:
    if x.numel() != size:
        raise ValueError(f"{name} must have {size} values, not {x.numel()}")
    _fits(name, x, x.shape, device)


def _rows_of_three(name: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name} must have three dimensions, batch, token and channel, not shape {tuple(x.shape)}")


class _Arguments:
    """The words of a structure of wkv.h, and the tensors that they point to."""

    __slots__ = ("tensors", "words")

    def __init__(self, B: int, T: int, H: int, N: int) -> None:
        self.words = [B, T, H, N, torch.get_num_threads()]
        self.tensors = []

    def rows(self, *tensors: Tensor) -> "_Arguments":
        """Appends a wkv_rows for each tensor (B, T, A) or (B, T, H, N)."""
        for x in tensors:
            strides = x.stride()
            if strides[-1] != 1 or (len(strides) == 4 and strides[2] != x.shape[3]):
                x = x.contiguous()
                strides = x.stride()
                self.tensors.append(x)
            self.words += (x.data_ptr(), DTYPES[x.dtype], strides[0], strides[1])
        return self

    def vectors(self, *tensors: Tensor) -> "_Arguments":
        """Appends a wkv_vector for each tensor."""
        for x in tensors:
            if not x.is_contiguous():
                x = x.contiguous()
                self.tensors.append(x)
            self.words += (x.data_ptr(), DTYPES[x.dtype])
        return self

    def run(self, function) -> None:
        check(function(struct.pack(f"{len(self.words)}q", *self.words)))


def _function(name: str):
    function = getattr(LIBRARY, name)
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int
    return function


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _define(name: str, inputs: str, output: str, grads: str, implement, differentiate, fakes, save, restore) -> None:
    raise NotImplementedError
