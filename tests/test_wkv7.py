"""The operator wkv7: every implementation against its definition in float64, outputs, states and all gradients.

Letters: B batch rows, T tokens, H heads, K key and V value channels of a head, n packed sequences.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import wkv_kernels
from conftest import OPERATOR_TOLERANCE
from oracle import wkv_numpy
from wkv_kernels.library import available_isas
from wkv_kernels.wkv7 import wkv7

from wkv.models.wkv7 import chunk_wkv7, naive_recurrent_wkv7

NAMES = ["r", "log_w", "k", "v", "a", "b", "state"]
IMPLEMENTATIONS = {"cpu": wkv7, "chunk": chunk_wkv7, "naive": naive_recurrent_wkv7}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PACKED = [0, 0, 5, 6, 22, 22, 59, 63, 63]


@dataclass(frozen=True)
class Case:
    """A call of the operator; `layout` says how the inputs lie in memory, `raw` what the decay is made from."""

    T: int
    B: int = 2
    H: int = 3
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = ""
    raw: str = ""
    packed: bool = False
    zero_state: bool = False

    def __str__(self) -> str:
        sizes = "" if self.K == self.V == 64 else f"-K{self.K}-V{self.V}"
        flags = [self.layout, self.raw, "packed" * self.packed, "zero_state" * self.zero_state]
        return f"{DTYPE_NAMES[self.dtype]}-B{self.B}-T{self.T}-H{self.H}{sizes}" + "".join(f"-{f}" for f in flags if f)


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


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (B, T, H, N), lying differently in memory."""
    if layout == "fused":
        return torch.cat([torch.full_like(x, float("nan")), x], -1)[..., x.shape[-1] :]
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels_first":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    return x


@cache
def make(case: Case) -> tuple[dict, dict]:
    """Inputs like those of a model, the state included, and gradients of the two results."""
    generator = torch.Generator().manual_seed(case.T)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    rows = len(PACKED) - 1 if case.packed else B
    kk = F.normalize(draw(B, T, H, K), dim=-1)
    raw = {
        "": draw(B, T, H, K),
        "fastest": torch.full((B, T, H, K), 20.0),
        "slowest": torch.full((B, T, H, K), -20.0),
        "extremes": 20.0 * draw(B, T, H, K).sign(),
    }[case.raw]
    x = {
        "r": draw(B, T, H, K),
        "log_w": -0.6065306597126334 * torch.sigmoid(raw),
        "k": draw(B, T, H, K),
        "v": draw(B, T, H, V),
        "a": -kk,
        "b": kk * torch.sigmoid(draw(B, T, H, K)),
    }
    x = {name: t if name == "log_w" else t.to(case.dtype) for name, t in x.items()}
    if case.layout == "broadcast":
        x["log_w"] = x["log_w"][:1, :1].expand(B, T, H, K)
    x = {name: arrange(t, case.layout) for name, t in x.items()}
    x["state"] = None if case.zero_state else draw(rows, H, K, V)
    grads = {"o": draw(B, T, H, V).to(case.dtype), "final_state": draw(rows, H, K, V)}
    return x, grads


def cu_seqlens(case: Case, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
    return torch.tensor(PACKED, dtype=dtype) if case.packed else None


def run(implementation, x: dict, grads: dict, packing: torch.Tensor | None) -> dict:
    """Both results and the gradients of all inputs, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in x.items() if t is not None}
    o, final_state = implementation(*(leaves.get(name) for name in NAMES), packing)
    loss = (o.to(final_state) * grads["o"]).sum() + (final_state * grads["final_state"]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final_state": final_state, **{f"grad of {n}": g for n, g in zip(leaves, found, strict=True)}}


@cache
def expected(case: Case) -> dict:
    x, grads = make(case)
    x, grads = ({name: None if t is None else t.double() for name, t in d.items()} for d in (x, grads))
    return run(naive_recurrent_wkv7, x, grads, cu_seqlens(case))


def assert_equal(actual: dict, reference: dict) -> None:
    """Root mean square error, relative to the value's own, by the dtype of what is compared."""
    assert actual.keys() == reference.keys()
    for name, y in reference.items():
        x = actual[name]
        assert x.shape == y.shape, name
        error = ((x.double() - y).norm() / y.norm()).item() if y.any() else x.double().norm().item()
        tolerance = OPERATOR_TOLERANCE[x.dtype]
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.0e} in {x.dtype}"


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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "parity and cpu", __file__]
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_instruction_set_in_use():
    assert wkv_kernels.info()["isa"] == os.environ.get("WKV_ISA", available_isas()[0])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Three heads on 1 to 3 threads; one head on 2 and 3, which share its value channels.
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("case", [Case(129), Case(300, B=1, H=1, dtype=torch.bfloat16)], ids=str)
def test_threads(threads, n_threads, case):
    threads(n_threads)
    x, grads = make(case)
    assert_equal(run(wkv7, x, grads, None), expected(case))


def test_threads_of_python(threads):
    threads(2)
    x, grads = make(Case(129))
    alone = run(wkv7, x, grads, None)
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: run(wkv7, x, grads, None), range(12)):
            assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_fork(threads):
    threads(2)
    x, _ = make(Case(129))
    inputs = [x[name] for name in NAMES]
    o, _ = wkv7(*inputs)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        again, _ = wkv7(*inputs)
        os._exit(0 if again.numpy().tobytes() == o.numpy().tobytes() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0


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


def test_int32_cu_seqlens_and_strided_state():
    case = Case(63, B=1, packed=True)
    x, _ = make(case)
    o, final_state = wkv7(*(x[name] for name in NAMES), cu_seqlens(case))
    shuffled = x["state"].transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.stack([x["state"], x["state"]], 1)[:, 1]
    for state in (shuffled, spread):
        again = wkv7(*(x[name] for name in NAMES[:6]), state, cu_seqlens(case, torch.int32))
        assert torch.equal(again[0], o) and torch.equal(again[1], final_state)


@pytest.mark.parametrize("used", ["o", "final_state"])
def test_gradient_of_one_result_only(used):
    x, grads = make(Case(17))
    grads = {name: g if name == used else torch.zeros_like(g) for name, g in grads.items()}

    def one_result(*args):
        o, final_state = wkv7(*args)
        return (o, final_state.detach()) if used == "o" else (o.detach(), final_state)

    reference = run(naive_recurrent_wkv7, {n: t.double() for n, t in x.items()}, grads, None)
    assert_equal(run(one_result, x, grads, None), reference)


def test_nothing_is_kept_without_gradients():
    x, _ = make(Case(17))
    inputs = [x[name].clone().requires_grad_() for name in NAMES]
    with torch.no_grad():
        assert all(t.grad_fn is None for t in wkv7(*inputs))
    assert all(t.grad_fn is None for t in wkv7(*(t.detach() for t in inputs)))
    assert all(t.grad_fn is not None for t in wkv7(*inputs))


def test_second_derivative_is_refused():
    x, _ = make(Case(1))
    r = x["r"].clone().requires_grad_()
    o, _ = wkv7(r, *(x[name] for name in NAMES[1:]))
    (grad,) = torch.autograd.grad(o.square().sum(), r, create_graph=True)
    with pytest.raises(NotImplementedError, match="wkv7 has no second derivative"):
        grad.sum().backward()


def test_default_dtype_and_autocast_change_nothing():
    x, _ = make(Case(17))
    inputs = [x[name] for name in NAMES]
    o, final_state = wkv7(*inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = wkv7(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again[0], o) and torch.equal(again[1], final_state)


@pytest.mark.parametrize("case", [Case(5), Case(5, zero_state=True, dtype=torch.bfloat16)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(case, requires_grad):
    x, _ = make(case)
    inputs = [None if x[name] is None else x[name].clone().requires_grad_(requires_grad) for name in NAMES]
    torch.library.opcheck(torch.ops.wkv.wkv7.default, (*inputs, None))


def test_opcheck_packed_and_backward():
    case = Case(63, B=1, packed=True)
    x, grads = make(case)
    inputs = (*(x[name] for name in NAMES), cu_seqlens(case))
    torch.library.opcheck(torch.ops.wkv.wkv7.default, inputs)
    torch.library.opcheck(torch.ops.wkv.wkv7_backward.default, (grads["o"], grads["final_state"], *inputs))


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: wkv7(*args), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (1, 16, 37):
        x, grads = make(Case(T))
        eager, traced = run(wkv7, x, grads, None), run(compiled, x, grads, None)
        assert all(torch.equal(eager[name], traced[name]) for name in eager)
    with torch.no_grad():
        assert torch.equal(compiled(*(x[name] for name in NAMES))[0], eager["o"])


BAD = [
    ("r", lambda t: t[0]),
    *((name, lambda t: t[:, :-1]) for name in NAMES[1:6]),
    *((name, lambda t: t[..., :-1]) for name in ("log_w", "k", "a", "b", "state")),
    *((name, lambda t: t.double()) for name in NAMES),
    ("state", lambda t: t.bfloat16()),
    ("state", lambda t: t[:1]),
    *((name, lambda t: t.to("meta")) for name in NAMES[1:]),
]


@pytest.mark.parametrize("name, spoil", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_argument_is_named(name, spoil):
    x, _ = make(Case(5))
    with pytest.raises(ValueError, match=rf"^{name} "):
        wkv7(*(spoil(x[n]) if n == name else x[n] for n in NAMES))


@pytest.mark.parametrize(
    "packing",
    [[0, 5, 62], [1, 63], [0, 40, 30, 63], [0, -1, 63], [0, 64, 63]],
    ids=str,
)
def test_bad_cu_seqlens_is_named(packing):
    x, _ = make(Case(63, B=1, packed=True, zero_state=True))
    with pytest.raises(ValueError, match=r"^cu_seqlens "):
        wkv7(*(x[n] for n in NAMES), torch.tensor(packing))


@pytest.mark.parametrize(
    "packing", [torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.tensor([], dtype=torch.int64)]
)
def test_cu_seqlens_of_wrong_kind_is_named(packing):
    x, _ = make(Case(5, zero_state=True))
    for B in (1, 2):
        with pytest.raises(ValueError, match=r"^cu_seqlens "):
            wkv7(*(None if x[n] is None else x[n][:B] for n in NAMES), packing)


def test_cu_seqlens_with_several_rows_is_refused():
    x, _ = make(Case(5, zero_state=True))
    with pytest.raises(ValueError, match=r"^cu_seqlens packs sequences in one row, but r has 2 rows"):
        wkv7(*(x[n] for n in NAMES), torch.tensor([0, 5]))


def test_thirty_times_as_fast_as_the_loop():
    x, grads = make(Case(512, B=1, H=12))

    def seconds(implementation):
        start = time.perf_counter()
        run(implementation, x, grads, None)
        return time.perf_counter() - start

    seconds(wkv7)
    # Measured in turns, so that both meet the same load.
    ratios = [seconds(naive_recurrent_wkv7) / statistics.median(seconds(wkv7) for _ in range(5)) for _ in range(3)]
    assert statistics.median(ratios) >= 30, ratios
