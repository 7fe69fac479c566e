"""On a GPU: the fused pieces of RWKV-7 against their definitions in float64. Run with `make test-gpu`.

What the model makes of them there is in test_cuda.py; without a GPU, test_triton.py interprets the same kernels.
"""

import pytest
import torch
from test_rwkv7_fused import BF16, CASES, FP16, FP32, Draw, assert_parity, kernels, make, run
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.gpu
every_case = pytest.mark.parametrize("case", CASES)


def to_gpu(x):
    """With the strides that it has."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize(
    ("sizes", "dtypes"),
    [
        *(((2, 75, 3, 64), dtypes) for dtypes in ((FP32,), (BF16,), (FP16,), (BF16, FP32))),
        ((1, 40, 2, 20), (FP32,)),
        ((3, 1, 12, 64), (BF16,)),
        ((2, 33, 1, 600), (FP16,)),
        ((3, 1500, 2, 64), (FP32,)),
        ((1, 20, 64, 128), (BF16,)),
    ],
    ids=str,
)
@every_case
def test_parity(case, sizes, dtypes, strided):
    assert_parity(case, Draw(0, *dtypes, strided=strided), *sizes, to=to_gpu)


@every_case
def test_bits_and_every_element(case):
    """Two runs agree to the bit; new memory is full of NaN."""
    name, arguments = make(case, Draw(0, BF16), 2, 700, 3, 20)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (pytree.tree_leaves(run(getattr(kernels, name), arguments, to_gpu)[:2]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) and not x.isnan().any() for x, y in zip(once, again, strict=True))


@every_case
def test_operator_contract(case):
    name, arguments = make(case, Draw(0), 2, 5, 2, 8)
    arguments = pytree.tree_map_only(torch.Tensor, lambda x: to_gpu(x).requires_grad_(), arguments)
    torch.library.opcheck(getattr(torch.ops.wkv, f"rwkv7_{name}").default, arguments)


@every_case
def test_nothing_waits_for_the_gpu(case):
    name, arguments = make(case, Draw(0), 2, 40, 2, 16)
    arguments = pytree.tree_map_only(torch.Tensor, lambda x: to_gpu(x).requires_grad_(), arguments)
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = pytree.tree_leaves(getattr(kernels, name)(*arguments))
        torch.autograd.grad(outputs, tensors, [torch.ones_like(x) for x in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_graph_of_one_token(case):
    name, arguments = make(case, Draw(0, BF16), 2, 1, 4, 64)
    arguments = pytree.tree_map_only(torch.Tensor, to_gpu, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = pytree.tree_leaves(getattr(kernels, name)(*arguments))
        with torch.cuda.graph(graph):
            outputs = pytree.tree_leaves(getattr(kernels, name)(*arguments))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))
