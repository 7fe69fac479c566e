"""How the compiled operators wkv4, wkv6, wkv7 are called: threads, autograd, compilation, layouts, what they refuse.

Letters: see wkv_cases.py.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from wkv_cases import OPERATORS, Case, assert_equal, compiled, cu_seqlens, expected, inputs, make, run, tokens

every_op = pytest.mark.parametrize("op", OPERATORS)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Three heads on 1 to 3 threads; one head on 2 and 3, which share its value channels.
THREADS = [
    *(Case(op, 129) for op in OPERATORS),
    *(Case(op, 300, B=1, H=1, dtype=torch.bfloat16) for op in OPERATORS),
    *(Case(op, 300, H=1, shared="all") for op in ("wkv4", "wkv6")),
    Case("wkv6", 300, B=1, H=1, shared="all"),
]


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("case", THREADS, ids=lambda case: f"{case.op}-{case}")
def test_threads(threads, n_threads, case):
    threads(n_threads)
    x, grads = make(case)
    actual = run(compiled(case.op), x, grads)
    assert_equal(actual, expected(case))
    again = run(compiled(case.op), x, grads)
    assert all(torch.equal(again[name], t) for name, t in actual.items())


# With a task or more for every thread, sums do not depend on their number.
@pytest.mark.parametrize(
    "case",
    [Case(op, 129, shared=shared) for op in OPERATORS for shared in ("", "rows", "all") if op != "wkv7" or not shared],
    ids=lambda case: f"{case.op}-{case}",
)
def test_threads_change_nothing(threads, case):
    x, grads = make(case)
    results = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        results.append(run(compiled(case.op), x, grads))
    assert all(torch.equal(t, other[name]) for other in results[1:] for name, t in results[0].items())


@every_op
def test_threads_of_python(threads, op):
    threads(2)
    x, grads = make(Case(op, 129))
    alone = run(compiled(op), x, grads)
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: run(compiled(op), x, grads), range(12)):
            assert all(torch.equal(alone[name], together[name]) for name in alone)


TEAM = """
import os, signal, psutil, torch
from wkv_kernels.wkv7 import wkv7

torch.set_num_threads(3)
tokens = [torch.zeros(1, 512, 4, 64) for _ in range(6)]
torch.ones(2000, 2000).exp()
before = psutil.Process().num_threads()
if os.fork() == 0:
    signal.alarm(20)
    wkv7(*tokens)
    os._exit(0)
_, status = os.wait()
wkv7(*tokens)
print(psutil.Process().num_threads() - before, status)
"""


def test_runs_on_the_threads_of_torch():
    """A second set of threads would fight torch's for the cores. A child of fork has none, and must not wait."""
    result = subprocess.run([sys.executable, "-c", TEAM], capture_output=True, text=True, check=True)
    more_threads, status = map(int, result.stdout.split())
    assert more_threads <= 0 and status == 0


@every_op
def test_fork(threads, op):
    threads(2)
    o, _ = compiled(op)(*inputs(Case(op, 129)))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        again, _ = compiled(op)(*inputs(Case(op, 129)))
        os._exit(0 if again.numpy().tobytes() == o.numpy().tobytes() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0


@every_op
def test_int32_cu_seqlens_and_strided_state(op):
    case = Case(op, 63, B=1, packed=True)
    *rows, state = inputs(case)
    o, final_state = compiled(op)(*rows, state, cu_seqlens(case))
    shuffled = state.transpose(-2, -1).contiguous().transpose(-2, -1)
    spread = torch.stack([state, state], 1)[:, 1]
    for other in (shuffled, spread):
        again = compiled(op)(*rows, other, cu_seqlens(case, torch.int32))
        assert torch.equal(again[0], o) and torch.equal(again[1], final_state)


@every_op
def test_nothing_is_kept_without_gradients(op):
    leaves = [t.clone().requires_grad_() for t in inputs(Case(op, 17))]
    with torch.no_grad():
        assert all(t.grad_fn is None for t in compiled(op)(*leaves))
    assert all(t.grad_fn is None for t in compiled(op)(*(t.detach() for t in leaves)))
    for i, name in enumerate(OPERATORS[op].names):
        outputs = compiled(op)(*(t if j == i else t.detach() for j, t in enumerate(leaves)))
        assert all(t.grad_fn is not None for t in outputs), name


@every_op
def test_second_derivative_is_refused(op):
    first, *rest = inputs(Case(op, 1))
    first = first.clone().requires_grad_()
    o, final_state = compiled(op)(first, *rest)
    (grad,) = torch.autograd.grad(o.square().sum() + final_state.square().sum(), first, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op} has no second derivative"):
        grad.sum().backward()


@every_op
def test_default_dtype_and_autocast_change_nothing(op):
    o, final_state = compiled(op)(*inputs(Case(op, 17)))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = compiled(op)(*inputs(Case(op, 17)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again[0], o) and torch.equal(again[1], final_state)


CHECKED = [
    *(Case(op, 5) for op in OPERATORS),
    *(Case(op, 5, zero_state=True, dtype=torch.bfloat16) for op in OPERATORS),
    *(Case(op, 5, shared="all") for op in ("wkv4", "wkv6")),
]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: f"{case.op}-{case}")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(case, requires_grad):
    leaves = [None if t is None else t.clone().requires_grad_(requires_grad) for t in inputs(case)]
    torch.library.opcheck(getattr(torch.ops.wkv, case.op).default, (*leaves, None))


@every_op
def test_opcheck_packed_and_backward(op):
    case = Case(op, 63, B=1, packed=True)
    _, grads = make(case)
    arguments = (*inputs(case), cu_seqlens(case))
    torch.library.opcheck(getattr(torch.ops.wkv, op).default, arguments)
    backward = getattr(torch.ops.wkv, f"{op}_backward").default
    torch.library.opcheck(backward, (grads["o"], grads["final_state"], *arguments))


@pytest.mark.parametrize("op, shared", [*((op, "") for op in OPERATORS), ("wkv4", "all"), ("wkv6", "all")])
def test_compile(op, shared):
    torch._dynamo.reset()
    function = torch.compile(lambda *args: compiled(op)(*args), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (1, 16, 37):
        case = Case(op, T, shared=shared)
        x, grads = make(case)
        eager, traced = run(compiled(op), x, grads), run(function, x, grads)
        assert all(torch.equal(eager[name], traced[name]) for name in eager)
    with torch.no_grad():
        assert torch.equal(function(*inputs(case))[0], eager["o"])


def bad_arguments():
    for op, row in OPERATORS.items():
        others = [name for name in row.names if name != row.compared]
        yield op, row.compared, lambda t: t[0]
        yield from ((op, name, lambda t: t[:, :-1]) for name in tokens(op) if name != row.compared)
        yield from ((op, name, lambda t: t[..., :-1]) for name in others if name != "v" or op == "wkv4")
        yield from ((op, name, lambda t: t.double()) for name in row.names)
        yield op, "state", lambda t: t.bfloat16()
        yield op, "state", lambda t: t[:1]
        yield from ((op, name, lambda t: t.to("meta")) for name in others)
    yield from ((op, "log_w", lambda t: t[:0]) for op in ("wkv4", "wkv6"))


@pytest.mark.parametrize("op, name, spoil", list(bad_arguments()), ids=lambda x: x if isinstance(x, str) else "")
def test_bad_argument_is_named(op, name, spoil):
    x, _ = make(Case(op, 5))
    with pytest.raises(ValueError, match=rf"^{name} "):
        compiled(op)(*(spoil(t) if n == name else t for n, t in x.items()))


@pytest.mark.parametrize("packing", [[0, 5, 62], [1, 63], [0, 40, 30, 63], [0, -1, 63], [0, 64, 63]], ids=str)
@every_op
def test_bad_cu_seqlens_is_named(op, packing):
    with pytest.raises(ValueError, match=r"^cu_seqlens "):
        compiled(op)(*inputs(Case(op, 63, B=1, packed=True, zero_state=True)), torch.tensor(packing))


@pytest.mark.parametrize(
    "packing", [torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.tensor([]).long()], ids=repr
)
def test_cu_seqlens_of_wrong_kind_is_named(packing):
    with pytest.raises(ValueError, match=r"^cu_seqlens must be a vector of n \+ 1 int32 or int64"):
        compiled("wkv7")(*inputs(Case("wkv7", 5, B=1, zero_state=True)), packing)


@every_op
def test_cu_seqlens_with_several_rows_is_refused(op):
    with pytest.raises(ValueError, match=r"^cu_seqlens packs sequences in one row, but \w has 2 rows"):
        compiled(op)(*inputs(Case(op, 5, zero_state=True)), torch.tensor([0, 5]))
