"""Triton's interpreter, made as strict as a device: import this file before any kernel runs.

The interpreter must be chosen, by TRITON_INTERPRET=1, before triton is imported.
"""

import functools

import numpy as np
import pytest
import torch
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _convert_float_as_hardware(x, from_dtype, to_dtype, rounding):
    """The interpreter cuts digits off where it makes bfloat16; devices round to nearest."""
    if from_dtype != tl.float32 or to_dtype != tl.bfloat16:
        return _convert_float(x, from_dtype, to_dtype, rounding)
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()


interpreter._convert_float = _convert_float_as_hardware


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Tensor cores ignore what lies beyond ten digits behind the point."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


# How a device rounds the parts that it splits a factor into, and which products of parts it adds up, smallest first.
SPLITS = {
    INPUT_PRECISION.TF32: (_tf32, ((0, 0),)),
    INPUT_PRECISION.BF16x3: (lambda x: x.bfloat16().float(), ((1, 0), (0, 1), (0, 0))),
    INPUT_PRECISION.BF16x6: (lambda x: x.bfloat16().float(), ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0))),
}


def _parts(x, rounded) -> list:
    """Three that add up to x, or nearly."""
    parts, rest = [], torch.from_numpy(np.ascontiguousarray(x))
    for _ in range(3):
        parts.append(rounded(rest))
        rest = rest - parts[-1]
    return [part.numpy() for part in parts]


def _dot_in_parts(dot):
    @functools.wraps(dot)
    def wrapper(self, a, b, accumulator, precision, imprecise):
        if precision not in SPLITS:
            return dot(self, a, b, accumulator, precision, imprecise)
        rounded, products = SPLITS[precision]
        a, b = _parts(a.data, rounded), _parts(b.data, rounded)
        total = sum(np.matmul(a[i], b[j]) for i, j in products)
        return interpreter.TensorHandle(total + accumulator.data, accumulator.dtype.scalar)

    return wrapper


interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
    allowed_dot_input_precisions=("bf16x3", "bf16x6", "tf32")
)

# Where the memory of the running kernel's arguments begins and ends.
_memory = []


def _tensors(arguments):
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


def _remembering(run):
    @functools.wraps(run)
    def wrapper(self, *arguments, **options):
        storages = [x.untyped_storage() for x in _tensors((*arguments, *options.values()))]
        _memory[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        return run(self, *arguments, **options)

    return wrapper


def _checking(access, mask_at):
    @functools.wraps(access)
    def wrapper(self, pointers, *arguments):
        mask = np.broadcast_to(arguments[mask_at].data.astype(bool), pointers.data.shape)
        addresses = pointers.data[mask].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, bool)
        for begin, end in _memory:
            inside |= (begin <= addresses) & (addresses + size <= end)
        assert inside.all(), f"{access.__name__} of {np.count_nonzero(~inside)} addresses outside of all arguments"
        return access(self, pointers, *arguments)

    return wrapper


interpreter.GridExecutor.__call__ = _remembering(interpreter.GridExecutor.__call__)
_builder = interpreter.InterpreterBuilder
_builder.create_dot = _dot_in_parts(_builder.create_dot)
_builder.create_masked_load = _checking(_builder.create_masked_load, 0)
_builder.create_masked_store = _checking(_builder.create_masked_store, 1)


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
