"""The operator cross_entropy, and its definition in plain PyTorch, against torch in float64.

Letters: n rows, V classes.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import OPERATOR_TOLERANCE
from wkv_kernels.cross_entropy import cross_entropy
from wkv_kernels.library import available_isas

from wkv.models.rwkv_loss import plain_cross_entropy

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
IMPLEMENTATIONS = pytest.mark.parametrize("run", [cross_entropy, plain_cross_entropy], ids=["compiled", "plain"])


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(("n", "V"), [(3, 1), (5, 7), (4, 1024), (9, 2077), (2, 65536)])
def test_parity(run, dtype, n, V):
    logits = torch.full((n, V + 3), torch.nan, dtype=dtype)[:, :V].copy_(5 * torch.randn(n, V))
    targets = torch.randint(V, (n,))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    largest = exact.max(-1).values
    (gradient,) = torch.autograd.grad(expected.sum() + 0.005 * largest.square().sum(), exact)
    losses = run(logits, targets, 0.01)
    assert losses.dtype == FP32
    assert error(losses, expected) <= 1e-6
    assert error(logits, gradient) <= OPERATOR_TOLERANCE[dtype]


@pytest.mark.parametrize("isa", available_isas()[1:])
def test_every_instruction_set(isa):
    """In processes that load no more than the operator."""
    script = """
        import torch
        from wkv_kernels.cross_entropy import cross_entropy
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)):
            for V in (1, 7, 1024, 2077):
                logits, targets = 5 * torch.randn(3, V).to(dtype), torch.randint(V, (3,))
                exact = logits.double().requires_grad_()
                expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
                expected.sum().backward()
                assert torch.allclose(cross_entropy(logits, targets).double(), expected, rtol=1e-6, atol=1e-6)
                assert (logits.double() - exact.grad).norm() <= tolerance * exact.grad.norm()
    """
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@IMPLEMENTATIONS
def test_extreme_logits(run):
    """As torch's: exact at +-1e4, minus infinity is a class that is impossible, the rest is NaN."""
    inf, nan = torch.inf, torch.nan
    heads = [
        [1e4, -1e4, 0],
        [-1e4] * 3,
        [3e38, -3e38, 0],
        [-inf, 0, 1],
        [0, -inf, 1],
        [-inf] * 3,
        [inf, 0, 1],
        [nan, 0, 1],
    ]
    for tail in (0, 2000):
        logits = torch.cat([torch.tensor(heads), torch.full((len(heads), tail), -inf)], 1)
        targets = torch.zeros(len(heads), dtype=torch.int64)
        exact = logits.clone().requires_grad_()
        expected = F.cross_entropy(exact, targets, reduction="none")
        (gradient,) = torch.autograd.grad(expected.sum(), exact)
        torch.testing.assert_close(run(logits, targets), expected, equal_nan=True)
        torch.testing.assert_close(logits, gradient, equal_nan=True)


def test_operator_contract():
    torch.library.opcheck(torch.ops.wkv.cross_entropy.default, (torch.randn(3, 9), torch.tensor([0, 8, 4]), 0.5))
    assert cross_entropy(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("logits", "targets", "kind", "message"),
    [
        (torch.ones(2, 3), torch.tensor([0, 3]), IndexError, "target 3 is out of bounds: there are 3 classes"),
        (torch.ones(2, 3), torch.tensor([0, -1]), IndexError, "target -1"),
        (torch.ones(2, 3), torch.tensor([0]), ValueError, r"targets must be int64 \(2,\)"),
        (torch.ones(3, 2).T, torch.tensor([0, 1]), ValueError, "contiguous rows"),
        (torch.ones(2, 3).double(), torch.tensor([0, 1]), ValueError, "float64"),
    ],
)
def test_what_does_not_fit_is_named(logits, targets, kind, message):
    with pytest.raises(kind, match=message):
        cross_entropy(logits, targets)
