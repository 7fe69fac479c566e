"""The pieces of rwkv7_fused in Triton's interpreter: the tests of a CPU's kernels, and what only a GPU's have to do.

test_triton.py runs this file in a process of its own.
"""

import pytest
import torch
from test_rwkv7_fused import (  # noqa: F401  (tests that are collected here)
    BF16,
    CASES,
    FP16,
    FP32,
    Draw,
    assert_parity,
    kernels,
    make,
    run,
    test_extreme_values,
    test_key_near_zero,
    test_no_tokens,
)
from triton_interpreter import poisoned  # noqa: F401  (which also makes the interpreter as strict as a device)
from wkv_kernels.triton import rwkv7_fused

# What the CPU runs from here on is what is registered for GPUs.
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
LIBRARY = torch.library.Library("wkv", "IMPL")
for piece in ("shift_mix", "key_stage", "value_residual", "out_stage", "relu_squared"):
    for name in (f"rwkv7_{piece}", f"rwkv7_{piece}_backward"):
        op = getattr(torch.ops.wkv, name).default
        LIBRARY.impl(op, lambda *inputs, op=op: op.redispatch(CUDA, *inputs), "CPU", allow_override=True)


@pytest.mark.parametrize(
    ("sizes", "draw"),
    [
        ((2, 9, 3, 64), {"dtype": FP32, "strided": True}),
        ((1, 18, 2, 20), {"dtype": BF16}),
        ((3, 1, 12, 64), {"dtype": BF16, "parameters": FP32, "strided": True}),
        ((2, 2, 1, 300), {"dtype": FP16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, sizes, draw):
    assert_parity(case, Draw(0, **draw), *sizes)


@pytest.mark.parametrize("case", CASES)
def test_runs(case, monkeypatch):
    """Of two tokens: some begin or end a batch row, some do neither; and more parts than are added at a time."""
    monkeypatch.setattr(rwkv7_fused, "SHORTEST_RUN", 2)
    monkeypatch.setattr(rwkv7_fused, "PARTS_TILE", 4)
    assert_parity(case, Draw(1, FP32), 2, 9, 2, 16)


@pytest.mark.parametrize("case", CASES)
def test_nothing_at_all(case):
    """No tokens, no rows: gradients are zeros, and not what new memory is full of."""
    for B, T in ((2, 0), (0, 3)):
        name, arguments = make(case, Draw(3), B, T, 2, 16)
        outputs, found, _ = run(getattr(kernels, name), arguments)
        assert not any(x.numel() for x in outputs) and not any(g.any() for g in found)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_many_channels(case):
    assert_parity(case, Draw(2, BF16), 1, 18, 64, 128)
