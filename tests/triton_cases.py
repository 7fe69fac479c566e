"""The Triton kernels in Triton's interpreter, on CPU tensors: test_triton.py runs this file in a process of its own.

The interpreter must be chosen, by TRITON_INTERPRET=1, before triton is imported. Letters: see wkv_cases.py.
"""

import importlib

import pytest
import torch
import triton
import triton.language as tl
from triton_interpreter import poisoned  # noqa: F401  (which also makes the interpreter as strict as a device)
from wkv_cases import (
    Case,
    assert_equal,
    assert_states_pass,
    coarse_on_tensor_cores,
    cu_seqlens,
    expected,
    make,
    run,
    run_exactly,
)
from wkv_kernels.triton import common

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


def quick(case: Case) -> bool:
    return case.packed or case.shared == "tokens"


every_op = pytest.mark.parametrize("op", MODULES)
every_case = pytest.mark.parametrize(
    "case",
    [
        # It walks through the tokens of a chunk one by one.
        pytest.param(case, marks=[pytest.mark.slow] if case.op == "wkv4" and case.T > 17 and not quick(case) else [])
        for case in CASES
    ],
    ids=lambda case: f"{case.op}-{case}",
)


@every_case
def test_parity(case):
    x, grads = make(case)
    actual = run(interpreted(case.op), x, grads, cu_seqlens(case))
    assert actual["o"].dtype == case.dtype
    assert actual["final_state"].dtype == torch.float32
    for name, t in x.items():
        if t is not None:
            assert actual[f"grad of {name}"].dtype == t.dtype
    assert_equal(actual, expected(case), coarse=coarse_on_tensor_cores(case))


@triton.jit
def product_kernel(x, y, z, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(z + at, common.dot(tl.load(x + at), tl.load(y + at), None, PRECISION, EXACT, EXACT))


@pytest.mark.parametrize(("products", "exact"), [("tf32", False), ("tf32x3", False), ("tf32x3", True)])
def test_products(products, exact):
    """Factors of eight digits are exact; not a number stays so, in the bits that a GPU gives it."""
    x, y = torch.randn(2, 16, 16).bfloat16().float()
    z = torch.empty(16, 16)
    product_kernel[(1,)](x, y, z, products, exact)
    torch.testing.assert_close(z, x @ y, rtol=1e-5, atol=1e-5)
    for factor in (x, y):
        for bits in (0x7FFFFFFF, -1, 0x7F800000):
            factor_before, factor.view(torch.int32)[3, 5] = factor.clone(), bits
            product_kernel[(1,)](x, y, z, products, exact)
            assert torch.equal(z.isfinite(), (x @ y).isfinite())
            factor.copy_(factor_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_products_on_amd(monkeypatch, op, dtype):
    monkeypatch.setattr(torch.version, "hip", "any version")
    test_parity(Case(op, 40, B=1, H=1, dtype=dtype))


@every_op
def test_no_tokens(op):
    x, grads = make(Case(op, 0, H=1, K=16, V=16))
    actual = run(interpreted(op), x, grads)
    assert_states_pass(op, actual, x, grads)


@pytest.mark.parametrize("T", [0, 37])
@every_op
def test_without_sequences(op, T):
    """Tokens of none have neither outputs nor gradients."""
    x, grads = make(Case(op, T, B=1, H=1, K=16, V=16))
    x, grads = {**x, "state": x["state"][:0]}, {**grads, "final_state": grads["final_state"][:0]}
    actual = run(interpreted(op), x, grads, torch.zeros(1, dtype=torch.int32))
    assert actual["final_state"].shape[0] == 0
    assert not any(t.any() for t in actual.values())


@pytest.mark.parametrize("shared", ["", "rows", "tokens", "all"])
@pytest.mark.parametrize("op", ["wkv4", "wkv6"])
def test_without_tokens_that_share_a_decay(op, shared):
    x, grads = make(Case(op, 0, B=2, H=1, K=16, V=16, shared=shared))
    if shared in ("tokens", "all"):
        assert x["log_w"].shape[1] == 1
    assert not any(run(interpreted(op), x, grads)[f"grad of {name}"].any() for name in ("log_w", "u"))


@pytest.mark.slow
def test_wkv4_that_hardly_forgets():
    """A constant decay is rounded alike in every token and in every chunk."""
    x, grads = make(Case("wkv4", 4000, B=1, H=1, K=16, V=16, shared="all"))
    x = {**x, "log_w": torch.full_like(x["log_w"], -3e-4)}
    assert_equal(run(interpreted("wkv4"), x, grads), run_exactly("wkv4", x, grads, form="scan"))


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


@every_op
def test_rows_of_several_dtypes(op):
    x, grads = make(Case(op, 37, B=1, H=1, K=16, V=16))
    x = {**x, "k": x["k"].bfloat16(), "v": x["v"].half()}
    grads = {**grads, "o": grads["o"].half()}
    assert_equal(run(interpreted(op), x, grads), run_exactly(op, x, grads))


@pytest.mark.parametrize("op", ["wkv6"])
def test_values_in_float32(op):
    """As models of RWKV-5 and 6 in bfloat16 have them."""
    case = Case(op, 37, B=1, H=1, K=32, V=32, dtype=torch.bfloat16)
    x, grads = make(case)
    x, grads = {**x, "v": x["v"].float()}, {**grads, "o": grads["o"].float()}
    actual = run(interpreted(op), x, grads)
    assert actual["o"].dtype == torch.float32
    assert_equal(actual, run_exactly(op, x, grads), coarse={"o", "grad of v", *coarse_on_tensor_cores(case)})


@pytest.mark.parametrize("T", [9, 37])
@pytest.mark.parametrize("op", ["wkv6"])
def test_states_that_are_forgotten_at_once(op, T):
    x, grads = make(Case(op, T, B=1, H=1, K=16, V=16))
    log_w = x["log_w"].clone()
    log_w[:, 3::7] = -torch.inf
    x = {**x, "log_w": log_w}
    assert_equal(run(interpreted(op), x, grads), run_exactly(op, x, grads))


@pytest.mark.parametrize("op", ["wkv7"])
def test_keys_that_repeat(op):
    """The same token over and over: powers of the matrix to invert reach 1e17, its inverse stays small."""
    x, grads = make(Case(op, 65, B=1, H=1, K=32, V=32, decay="slowest"))
    x = {**x, "a": x["a"][:, :1].expand_as(x["a"]), "b": -x["a"][:, :1].expand_as(x["a"])}
    assert_equal(run(interpreted(op), x, grads), run_exactly(op, x, grads))


@pytest.mark.parametrize("T", [9, 40])
@every_op
def test_packing_that_lies_writes_nowhere_else(op, T):
    """Lengths are not read back from the device, so that wrong ones go unnoticed: they must do no harm."""
    x, grads = make(Case(op, T, B=1, H=1, K=16, V=16, zero_state=True))
    grads["final_state"] = grads["final_state"].expand(2, *grads["final_state"].shape[1:])
    for packing in ([0, 50, 20], [7, -3, 45]):
        run(interpreted(op), x, grads, torch.tensor(packing, dtype=torch.int32))
