"""The operators wkv4, wkv6, wkv7: every implementation against its definition in float64, results and all gradients.

Letters: see wkv_cases.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wkv_kernels
from wkv_cases import (
    OPERATORS,
    Case,
    assert_equal,
    assert_states_pass,
    compiled,
    cu_seqlens,
    expected,
    make,
    run,
    run_exactly,
    tokens,
)
from wkv_kernels.library import available_isas

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import bench_operator

LENGTHS = (1, 15, 16, 17, 37, 64, 129)

CASES = [
    *(Case(op, T) for op in OPERATORS for T in LENGTHS),
    *(Case(op, 63, H=4, dtype=dtype) for op in OPERATORS for dtype in (torch.bfloat16, torch.float16)),
    *(Case(op, 37, K=N, V=N) for op in ("wkv6", "wkv7") for N in (32, 128)),
    *(Case(op, 19, K=24, V=20) for op in OPERATORS),
    *(Case(op, 9, K=5, V=7, dtype=torch.bfloat16) for op in OPERATORS),
    *(Case(op, 17, K=1, V=130) for op in OPERATORS),
    *(
        Case(op, 37, H=2, layout=layout)
        for op in OPERATORS
        for layout in ("fused", "heads_first", "channels_first", "broadcast")
    ),
    *(Case(op, 37, dtype=torch.bfloat16, layout="fused") for op in OPERATORS),
    *(Case(op, 63, B=1, packed=True) for op in OPERATORS),
    *(Case(op, 63, B=1, K=24, V=20, packed=True, dtype=torch.bfloat16) for op in OPERATORS),
    *(Case(op, 63, B=1, packed=True, zero_state=True) for op in OPERATORS),
    *(Case(op, 37, zero_state=True) for op in OPERATORS),
    *(Case(op, 129, H=2, decay=decay) for op in OPERATORS for decay in ("fastest", "slowest", "bimodal")),
    *(Case(op, 37, H=2, shared=shared) for op in ("wkv4", "wkv6") for shared in ("rows", "tokens", "all")),
    *(Case(op, 63, B=1, shared="all", packed=True) for op in ("wkv4", "wkv6")),
    *(Case(op, 1, shared="all") for op in ("wkv4", "wkv6")),
    Case("wkv6", 37, K=24, V=20, shared="tokens", layout="fused", dtype=torch.bfloat16),
    Case("wkv4", 129, keys="large", shared="all"),
    Case("wkv4", 37, keys="padding"),
    Case("wkv4", 37, keys="padding", zero_state=True),
]
PAIRS = [
    pytest.param(case, name, id=f"{case.op}-{name}-{case}")
    for case in CASES
    for name in OPERATORS[case.op].implementations
    # At large exponents, p of the definition loses digits in float32.
    if case.keys != "large" or name != "naive"
]

every_op = pytest.mark.parametrize("op", OPERATORS)


@pytest.mark.parametrize("case, name", PAIRS)
def test_parity(case, name):
    x, grads = make(case)
    actual = run(OPERATORS[case.op].implementations[name], x, grads, cu_seqlens(case))
    assert actual["o"].dtype == case.dtype
    assert actual["final_state"].dtype == torch.float32
    for input_name, t in x.items():
        if t is not None:
            assert actual[f"grad of {input_name}"].dtype == t.dtype
    assert_equal(actual, expected(case))


@every_op
def test_definition_is_the_formula(op):
    x, _ = make(Case(op, 17))
    o, final_state = OPERATORS[op].implementations["naive"](*(t.double() for t in x.values()))
    if op == "wkv4":
        final_state = final_state[..., :2] * final_state[..., 2:].exp()
    for row in range(2):
        o_row, state_row = OPERATORS[op].oracle(*(t if name == "u" else t[row] for name, t in x.items()))
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


WRITTEN = [
    *(Case(op, 37) for op in OPERATORS),
    *(Case(op, 19, K=24, V=20) for op in OPERATORS),
    *(Case(op, 63, B=1, packed=True) for op in OPERATORS),
    *(Case(op, 0) for op in OPERATORS),
    *(Case(op, T, shared=shared) for op in ("wkv4", "wkv6") for T in (0, 19) for shared in ("rows", "tokens", "all")),
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: f"{case.op}-{case}")
def test_every_element_is_written(case):
    x, grads = make(case)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        actual = run(compiled(case.op), x, grads, cu_seqlens(case))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in actual.values())


@every_op
def test_no_tokens(op):
    case = Case(op, 0)
    x, grads = make(case)
    actual = run(compiled(op), x, grads)
    assert actual["o"].shape == x["v"].shape
    assert_states_pass(op, actual, x, grads)


@every_op
def test_zeros_are_an_empty_state(op):
    x, grads = make(Case(op, 17, zero_state=True))
    from_none = run(compiled(op), x, grads)
    zeros = torch.zeros_like(make(Case(op, 17))[0]["state"])
    from_zeros = run(compiled(op), {**x, "state": zeros}, grads)
    assert all(torch.equal(from_zeros[name], t) for name, t in from_none.items())


@every_op
def test_decay_that_erases_the_state(op):
    x, grads = make(Case(op, 17))
    x = {**x, "log_w": x["log_w"].clone()}
    x["log_w"][:, 3], x["log_w"][:, 8], x["log_w"][:, 9, ..., ::2] = -torch.inf, -3000.0, -90.0
    assert_equal(run(compiled(op), x, grads), run_exactly(op, x, grads))


@every_op
def test_masked_steps_leave_the_state_alone(op):
    x, _ = make(Case(op, 17))
    x = {
        name: torch.full_like(t, OPERATORS[op].masked.get(name, 0)) if name in OPERATORS[op].masked else t
        for name, t in x.items()
    }
    _, final_state = compiled(op)(*x.values())
    filled = x["state"][..., 1] != 0 if op == "wkv4" else ...
    assert torch.equal(final_state[filled], x["state"][filled])


@every_op
def test_nan_and_infinity_show(op):
    x, _ = make(Case(op, 17))
    for value in (torch.nan, torch.inf):
        for name in tokens(op):
            bad = x[name].clone()
            bad.view(2, 17, 3, 64)[1, 5, 2, 7] = value
            o, _ = compiled(op)(*(bad if n == name else t for n, t in x.items()))
            o = o.view(2, 17, 3, 64)
            assert not o[1, 5:, 2].isfinite().all(), name
            assert o[1, :5].isfinite().all() and o[0].isfinite().all() and o[1, :, :2].isfinite().all(), name


@pytest.mark.parametrize("used", ["o", "final_state"])
@every_op
def test_gradient_of_one_result_only(op, used):
    x, grads = make(Case(op, 17))
    grads = {name: g if name == used else torch.zeros_like(g) for name, g in grads.items()}

    def one_result(*args):
        o, final_state = compiled(op)(*args)
        return (o, final_state.detach()) if used == "o" else (o.detach(), final_state)

    assert_equal(run(one_result, x, grads), run_exactly(op, x, grads))


def run_in_slices(op: str, form: str, x: dict, grads: dict, length: int) -> dict:
    """What `run_exactly` gives of one long row, slice by slice: a whole one costs autograd time that grows squared."""
    implementation = OPERATORS[op].implementations[form]
    x, grads = ({name: t.double() for name, t in d.items()} for d in (x, grads))
    slices, results = [], {"o": [], **{f"grad of {name}": [] for name in x}}
    for begin in range(0, x["v"].shape[1], length):
        part = {name: t[:, begin : begin + length] if name in tokens(op) else t for name, t in x.items()}
        slices.append((part, grads["o"][:, begin : begin + length]))
        with torch.no_grad():
            o, x["state"] = implementation(*part.values())
        results["o"].append(o)
    results["final_state"], gradient = [x["state"]], grads["final_state"]
    for part, grad_o in reversed(slices):
        found = run(implementation, part, {"o": grad_o, "final_state": gradient})
        gradient = found["grad of state"]
        for name in part:
            results[f"grad of {name}"].insert(0, found[f"grad of {name}"])
    whole = {"grad of u": lambda parts: sum(parts), "grad of state": lambda parts: parts[0]}
    return {name: whole.get(name, lambda parts: torch.cat(parts, 1))(parts) for name, parts in results.items()}


@pytest.mark.parametrize("op, form", [("wkv4", "scan"), ("wkv6", "chunk"), ("wkv7", "chunk")])
def test_a_hundred_thousand_tokens(op, form):
    """Errors stay those of short sequences, far below the tolerance. The reference is a parallel form in float64."""
    x, grads = make(Case(op, 100_000, B=1, H=1, K=8, V=8))
    assert_equal(run(compiled(op), x, grads), run_in_slices(op, form, x, grads, 1000), share=0.2)


@pytest.mark.parametrize(
    ("op", "form", "factor"),
    [("wkv4", "loop", 30), ("wkv6", "loop", 30), ("wkv7", "loop", 30), ("wkv7", "naive chunks", 10)],
)
def test_times_as_fast(op, form, factor):
    """Forward and backward, 30 times as fast as the definition and 10 times as fast as the chunk form written plainly.

    The best of several runs in turns: other programs slow single runs of both, by unequal shares.
    """
    operator = bench_operator.Operator(op, T=512, H=12, K=64)
    seconds = {"compiled": [], form: []}
    for _ in range(3):
        seconds[form].append(operator.step(form))
        seconds["compiled"] += [operator.step("compiled") for _ in range(5)]
    ratio = min(seconds[form]) / min(seconds["compiled"])
    assert ratio >= factor, seconds
