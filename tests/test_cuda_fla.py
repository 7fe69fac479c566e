"""On a GPU: our operators against flash-linear-attention's, where it is installed. Run with `make test-gpu`.

It is no dependency: `pip install flash-linear-attention`, 0.6 or later. Only without an initial state, and final states
are not compared: `chunk_rwkv7` was found to differ from the official kernel where a state is given (its issue 351), and
it rounds states between chunks to the dtype of the rows, which ours keeps in float32. kernels/bench_cuda.py passes the
arguments on, and measures both.
"""

import sys
from pathlib import Path

import pytest
import torch
from wkv_cases import OPERATORS, Case, compiled, make

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import bench_cuda

pytestmark = pytest.mark.gpu

# Root mean square error in bfloat16, relative to the value's own; as fla's own tests.
TOLERANCE = 0.01


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_outputs_and_gradients(op):
    theirs = bench_cuda.fla_operator(op)
    if theirs is None:
        pytest.skip("flash-linear-attention is not installed")
    case = Case(op, 200, dtype=torch.bfloat16, zero_state=True)
    x, gradients = make(case)
    inputs = [x[name].cuda() for name in OPERATORS[op].names if name != "state"]
    found = {}
    for whose, function in (("ours", compiled(op)), ("theirs", theirs)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        o = function(*leaves)[0]
        found[whose] = o, *torch.autograd.grad(o, leaves, gradients["o"].cuda())
    names = ["o", *(f"gradient of {name}" for name in OPERATORS[op].names)]
    for name, ours, theirs in zip(names, found["ours"], found["theirs"], strict=False):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error <= TOLERANCE, f"{name}: {error:.2e}"
