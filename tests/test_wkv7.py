"""The operator wkv7: every implementation against its definition in float64, outputs, states and all gradients.

Letters: see wkv7_cases.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wkv_kernels
from oracle import wkv_numpy
from wkv7_cases import NAMES, Case, assert_equal, cu_seqlens, expected, make, run
from wkv_kernels.library import available_isas
from wkv_kernels.wkv7 import wkv7

from wkv.models.wkv7 import chunk_wkv7, naive_recurrent_wkv7

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import bench_operator

IMPLEMENTATIONS = {"cpu": wkv7, "chunk": chunk_wkv7, "naive": naive_recurrent_wkv7}

CASES = [
    *(Case(T) for T in (1, 15, 16, 17, 37, 64, 129)),
    *(Case(63, H=4, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
    *(Case(37, K=N, V=N) for N in (32, 128)),
    Case(19, K=24, V=20),
    Case(9, K=5, V=7, dtype=torch.bfloat16),
    Case(17, K=1, V=130),
    *(Case(37, layout=layout) for layout in ("fused", "heads_first", "channels_first", "broadcast")),
    Case(37, dtype=torch.bfloat16, layout="fused"),
    Case(63, B=1, packed=True),
    Case(63, B=1, K=24, V=20, packed=True, dtype=torch.bfloat16),
    Case(63, B=1, packed=True, zero_state=True),
    Case(37, zero_state=True),
    *(Case(129, raw=raw) for raw in ("fastest", "slowest", "extremes")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", [f"wkv7-{name}" for name in IMPLEMENTATIONS])
def test_parity(name, case):
    x, grads = make(case)
    actual = run(IMPLEMENTATIONS[name.removeprefix("wkv7-")], x, grads, cu_seqlens(case))
    assert actual["o"].dtype == case.dtype
    assert actual["final_state"].dtype == torch.float32
    for input_name, t in x.items():
        if t is not None:
            assert actual[f"grad of {input_name}"].dtype == t.dtype
    assert_equal(actual, expected(case))


def test_definition_is_the_formula():
    x, _ = make(Case(17))
    o, final_state = naive_recurrent_wkv7(*(x[name].double() for name in NAMES))
    for row in range(2):
        o_row, state_row = wkv_numpy.wkv7(*(x[name][row] for name in NAMES))
        torch.testing.assert_close(o[row], torch.from_numpy(o_row), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final_state[row], torch.from_numpy(state_row), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", available_isas()[1:])
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "(parity and cpu) or in_use", __file__]
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_instruction_set_in_use():
    assert wkv_kernels.info()["isa"] == os.environ.get("WKV_ISA", available_isas()[0])


@pytest.mark.parametrize("case", [Case(37), Case(19, K=24, V=20), Case(63, B=1, packed=True), Case(0)], ids=str)
def test_every_element_is_written(case):
    x, grads = make(case)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        actual = run(wkv7, x, grads, cu_seqlens(case))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in actual.values())


def test_no_tokens():
    x, _ = make(Case(0))
    o, final_state = wkv7(*(x[name] for name in NAMES))
    assert o.shape == (2, 0, 3, 64)
    assert torch.equal(final_state, x["state"])


def test_decay_that_erases_the_state():
    x, grads = make(Case(17))
    x = {**x, "log_w": x["log_w"].clone()}
    x["log_w"][:, 3], x["log_w"][:, 8], x["log_w"][:, 9, :, ::2] = -torch.inf, -3000.0, -90.0
    reference = run(naive_recurrent_wkv7, {n: t.double() for n, t in x.items()}, grads, None)
    assert_equal(run(wkv7, x, grads, None), reference)


def test_masked_steps_leave_the_state_alone():
    x, _ = make(Case(17))
    x = {**x, **{name: torch.zeros_like(x[name]) for name in ("log_w", "k", "b")}}
    _, final_state = wkv7(*(x[name] for name in NAMES))
    assert torch.equal(final_state, x["state"])


def test_nan_and_infinity_show():
    x, _ = make(Case(17))
    for value in (torch.nan, torch.inf):
        for name in NAMES[:6]:
            bad = x[name].clone()
            bad[1, 5, 2, 7] = value
            o, _ = wkv7(*(bad if n == name else x[n] for n in NAMES))
            assert not o[1, 5:, 2].isfinite().all(), name
            assert o[1, :5].isfinite().all() and o[0].isfinite().all() and o[1, :, :2].isfinite().all(), name


@pytest.mark.parametrize("used", ["o", "final_state"])
def test_gradient_of_one_result_only(used):
    x, grads = make(Case(17))
    grads = {name: g if name == used else torch.zeros_like(g) for name, g in grads.items()}

    def one_result(*args):
        o, final_state = wkv7(*args)
        return (o, final_state.detach()) if used == "o" else (o.detach(), final_state)

    reference = run(naive_recurrent_wkv7, {n: t.double() for n, t in x.items()}, grads, None)
    assert_equal(run(one_result, x, grads, None), reference)


@pytest.mark.parametrize(("form", "factor"), [("loop", 30), ("naive chunks", 10)])
def test_times_as_fast(form, factor):
    """Forward and backward, 30 times as fast as the definition and 10 times as fast as the chunk form written plainly.

    The best of several runs in turns: other programs slow single runs of both, by unequal shares.
    """
    operator = bench_operator.Wkv7(T=512, H=12, K=64)
    seconds = {"compiled": [], form: []}
    for _ in range(3):
        seconds[form].append(operator.step(form))
        seconds["compiled"] += [operator.step("compiled") for _ in range(5)]
    ratio = min(seconds[form]) / min(seconds["compiled"])
    assert ratio >= factor, seconds
