"""On a GPU: the operators against their definitions in float64, compiled, captured and never waited for.

Run with `make test-gpu`; without a GPU, test_triton.py interprets the same kernels. Letters: see wkv_cases.py.
"""

import pytest
import torch
import wkv_kernels
from test_wkv import CASES
from wkv_cases import (
    OPERATORS,
    Case,
    arrange,
    assert_equal,
    coarse_on_tensor_cores,
    compiled,
    cu_seqlens,
    expected,
    make,
    run,
    tokens,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SERVED = [op for op in OPERATORS if wkv_kernels.serves(op, CUDA)]
every_op = pytest.mark.parametrize("op", SERVED)


def on_gpu(case: Case) -> tuple[dict, dict, torch.Tensor | None]:
    """Inputs, laid out in the GPU's memory as in the CPU's, gradients and packing."""
    x, grads = make(case)
    x = {name: None if t is None else t.to(CUDA) for name, t in x.items()}
    x = {name: arrange(t, case.layout) if name in tokens(case.op) else t for name, t in x.items()}
    if case.layout == "broadcast":
        x["log_w"] = x["log_w"][:1, :1].expand_as(x["k"])
    packing = cu_seqlens(case)
    return x, {name: g.to(CUDA) for name, g in grads.items()}, None if packing is None else packing.to(CUDA)


@pytest.mark.parametrize("case", [c for c in CASES if c.op in SERVED], ids=lambda case: f"{case.op}-{case}")
def test_parity(case):
    x, grads, packing = on_gpu(case)
    torch.use_deterministic_algorithms(True)
    try:
        # New memory is full of NaN.
        actual = run(compiled(case.op), x, grads, packing)
        again = run(compiled(case.op), x, grads, packing)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(again[name], t) for name, t in actual.items())
    assert_equal({name: t.cpu() for name, t in actual.items()}, expected(case), coarse=coarse_on_tensor_cores(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_op
def test_long_sequence(op, dtype):
    """As on the CPU, whose errors test_wkv.py bounds at a hundred thousand tokens."""
    case = Case(op, 40_000, B=1, H=2, K=64, V=64, dtype=dtype)
    x, grads, _ = on_gpu(case)
    exact = run(compiled(op), *({name: t.cpu().float() for name, t in d.items()} for d in (x, grads)))
    found = {name: t.cpu() for name, t in run(compiled(op), x, grads).items()}
    assert_equal(found, exact, coarse=coarse_on_tensor_cores(case))


@pytest.mark.parametrize("packed", [False, True])
@every_op
def test_nothing_waits_for_the_gpu(op, packed):
    case = Case(op, 63, B=1, packed=packed)
    x, grads, packing = on_gpu(case)
    run(compiled(op), x, grads, packing)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(compiled(op), x, grads, packing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_compile(op):
    torch._dynamo.reset()
    function = torch.compile(lambda *args: compiled(op)(*args), fullgraph=True)
    for T in (1, 37, 65):
        x, grads, _ = on_gpu(Case(op, T))
        eager, traced = run(compiled(op), x, grads), run(function, x, grads)
        assert all(torch.equal(eager[name], traced[name]) for name in eager)


@every_op
def test_graph_of_a_decoding_step(op):
    """One token after the other: the graph reads inputs and state where they were when it was captured."""
    x, _, _ = on_gpu(Case(op, 8))
    whole, last = compiled(op)(*x.values())
    step = {name: t[:, :1].clone() if name in tokens(op) else t.clone() for name, t in x.items()}
    compiled(op)(*step.values())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, state = compiled(op)(*step.values())
        step["state"].copy_(state)
    step["state"].copy_(x["state"])
    for t in range(8):
        for name in tokens(op):
            step[name].copy_(x[name][:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(o, whole[:, t : t + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step["state"], last, rtol=1e-5, atol=1e-5)
