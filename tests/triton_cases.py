"""The Triton kernels in Triton's interpreter, on CPU tensors: test_triton.py runs this file in a process of its own.

The interpreter must be chosen, by TRITON_INTERPRET=1, before triton is imported. Letters: see wkv_cases.py.
"""

import importlib

import pytest
import torch
import triton_interpreter  # noqa: F401  (as strict as a device)
from wkv_cases import Case, assert_equal, cu_seqlens, expected, make, run, run_exactly

# A row per operator: its module in wkv_kernels.triton is called what the operator is called.
MODULES = {op: importlib.import_module(f"wkv_kernels.triton.{op}") for op in ("wkv4", "wkv6", "wkv7")}


class Interpreted(torch.autograd.Function):
    """What calling.py makes of a module's `forward` and `backward` on a GPU."""

    @staticmethod
    def forward(ctx, module, *args):
        ctx.module = module
        ctx.save_for_backward(*args)
        ctx.set_materialize_grads(False)
        return module.forward(*args)

    @staticmethod
    def backward(ctx, grad_o, grad_final_state):
        *grads, grad_state = ctx.module.backward(grad_o, grad_final_state, *ctx.saved_tensors)
        return None, *grads, None if ctx.saved_tensors[-2] is None else grad_state, None


def interpreted(op: str):
    return lambda *args: Interpreted.apply(MODULES[op], *args)


# Small: the interpreter takes milliseconds for every program. A GPU gets those of test_wkv.py.
CASES = [
    *(Case(op, T, B=1, H=1, K=16, V=16) for op in MODULES for T in (1, 15, 16, 17, 63, 64, 65, 257)),
    *(Case(op, 65, B=1, H=2) for op in MODULES),
    *(Case(op, 33, B=1, H=1, dtype=dtype) for op in MODULES for dtype in (torch.bfloat16, torch.float16)),
    *(Case(op, 33, B=1, H=1, K=N, V=N) for op in MODULES for N in (32, 128)),
    *(Case(op, 33, H=1, K=24, V=20) for op in MODULES),
    *(Case(op, 9, H=1, K=5, V=7, dtype=torch.bfloat16) for op in MODULES),
    *(Case(op, 17, B=1, H=1, K=1, V=130) for op in MODULES),
    *(Case(op, 33, B=1, H=2, K=16, V=16, layout="channels_first") for op in MODULES),
    *(Case(op, 33, H=1, K=16, V=16, layout="broadcast") for op in MODULES),
    *(Case(op, 33, H=1, K=16, V=16, layout="fused", dtype=torch.bfloat16) for op in MODULES),
    *(Case(op, 63, B=1, H=1, K=24, V=20, packed=True, dtype=torch.bfloat16) for op in MODULES),
    *(Case(op, 63, B=1, H=1, K=16, V=16, packed=True, zero_state=True) for op in MODULES),
    *(Case(op, 37, B=1, H=1, K=16, V=16, zero_state=True) for op in MODULES),
    *(Case(op, 65, B=1, H=1, K=32, V=32, decay=decay) for op in MODULES for decay in ("fastest", "slowest", "bimodal")),
    *(
        Case(op, T, H=1, K=16, V=16, shared=shared)
        for op in MODULES
        if op != "wkv7"
        for shared in ("rows", "tokens", "all")
        for T in (1, 37)
    ),
    *(Case("wkv4", T, B=1, H=1, K=16, V=16, keys="large", shared="all") for T in (17, 129)),
    Case("wkv4", 17, B=1, H=1, K=16, V=16, keys="padding"),
    Case("wkv4", 37, B=1, H=1, K=16, V=16, keys="padding", zero_state=True),
]
every_op = pytest.mark.parametrize("op", MODULES)
every_case = pytest.mark.parametrize(
    "case",
    [
        # It walks through the tokens one by one.
        pytest.param(case, marks=[pytest.mark.slow] if case.op == "wkv4" and case.T > 17 and not case.packed else [])
        for case in CASES
    ],
    ids=lambda case: f"{case.op}-{case}",
)


@pytest.fixture(autouse=True)
def _poisoned():
    """New tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@every_case
def test_parity(case):
    x, grads = make(case)
    actual = run(interpreted(case.op), x, grads, cu_seqlens(case))
    assert actual["o"].dtype == case.dtype
    assert actual["final_state"].dtype == torch.float32
    for name, t in x.items():
        if t is not None:
            assert actual[f"grad of {name}"].dtype == t.dtype
    assert_equal(actual, expected(case))


@every_op
def test_no_tokens(op):
    x, grads = make(Case(op, 0, H=1, K=16, V=16))
    actual = run(interpreted(op), x, grads)
    # An empty state of wkv4 has a p of its own, and its p is a constant.
    filled = x["state"].flatten(1) != 0
    assert torch.equal(actual["final_state"].flatten(1)[filled], x["state"].flatten(1)[filled])
    gradient = grads["final_state"].clone()
    if op == "wkv4":
        gradient[..., 2] = 0
    assert torch.equal(actual["grad of state"], gradient)
    assert not any(actual[f"grad of {name}"].any() for name in x if name != "state")


@pytest.mark.parametrize("used", ["o", "final_state"])
@every_op
def test_gradient_of_one_result_only(op, used):
    case = Case(op, 37, B=1, H=1, K=16, V=16)
    x, grads = make(case)
    grads = {name: g if name == used else torch.zeros_like(g) for name, g in grads.items()}

    def one_result(*args):
        o, final_state = interpreted(op)(*args)
        return (o, final_state.detach()) if used == "o" else (o.detach(), final_state)

    assert_equal(run(one_result, x, grads), run_exactly(op, x, grads))


@pytest.mark.parametrize("op", ["wkv7"])
def test_keys_that_repeat(op):
    """The same token over and over: powers of the matrix to invert reach 1e17, its inverse stays small."""
    x, grads = make(Case(op, 65, B=1, H=1, K=32, V=32, decay="slowest"))
    x = {**x, "a": x["a"][:, :1].expand_as(x["a"]), "b": -x["a"][:, :1].expand_as(x["a"])}
    assert_equal(run(interpreted(op), x, grads), run_exactly(op, x, grads))


@every_op
def test_packing_that_lies_writes_nowhere_else(op):
    """Lengths are not read back from the device, so that wrong ones go unnoticed: they must do no harm."""
    x, grads = make(Case(op, 40, B=1, H=1, K=16, V=16, zero_state=True))
    grads["final_state"] = grads["final_state"].expand(2, *grads["final_state"].shape[1:])
    for packing in ([0, 50, 20], [7, -3, 45]):
        run(interpreted(op), x, grads, torch.tensor(packing, dtype=torch.int32))
