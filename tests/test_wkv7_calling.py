"""How the compiled operator wkv7 is called: threads, autograd, compilation, memory layouts, and what it refuses.

Letters: see wkv7_cases.py.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from wkv7_cases import NAMES, Case, assert_equal, cu_seqlens, expected, make, run
from wkv_kernels.wkv7 import wkv7


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


def test_int32_cu_seqlens_and_strided_state():
    case = Case(63, B=1, packed=True)
    x, _ = make(case)
    o, final_state = wkv7(*(x[name] for name in NAMES), cu_seqlens(case))
    shuffled = x["state"].transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.stack([x["state"], x["state"]], 1)[:, 1]
    for state in (shuffled, spread):
        again = wkv7(*(x[name] for name in NAMES[:6]), state, cu_seqlens(case, torch.int32))
        assert torch.equal(again[0], o) and torch.equal(again[1], final_state)


def test_nothing_is_kept_without_gradients():
    x, _ = make(Case(17))
    inputs = [x[name].clone().requires_grad_() for name in NAMES]
    with torch.no_grad():
        assert all(t.grad_fn is None for t in wkv7(*inputs))
    assert all(t.grad_fn is None for t in wkv7(*(t.detach() for t in inputs)))
    for i in range(len(NAMES)):
        outputs = wkv7(*(t if j == i else t.detach() for j, t in enumerate(inputs)))
        assert all(t.grad_fn is not None for t in outputs), NAMES[i]


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


@pytest.mark.parametrize("packing", [[0, 5, 62], [1, 63], [0, 40, 30, 63], [0, -1, 63], [0, 64, 63]], ids=str)
def test_bad_cu_seqlens_is_named(packing):
    x, _ = make(Case(63, B=1, packed=True, zero_state=True))
    with pytest.raises(ValueError, match=r"^cu_seqlens "):
        wkv7(*(x[n] for n in NAMES), torch.tensor(packing))


@pytest.mark.parametrize(
    "packing", [torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.tensor([]).long()], ids=repr
)
def test_cu_seqlens_of_wrong_kind_is_named(packing):
    x, _ = make(Case(5, B=1, zero_state=True))
    with pytest.raises(ValueError, match=r"^cu_seqlens must be a vector of n \+ 1 int32 or int64"):
        wkv7(*(x[n] for n in NAMES), packing)


def test_cu_seqlens_with_several_rows_is_refused():
    x, _ = make(Case(5, zero_state=True))
    with pytest.raises(ValueError, match=r"^cu_seqlens packs sequences in one row, but r has 2 rows"):
        wkv7(*(x[n] for n in NAMES), torch.tensor([0, 5]))
