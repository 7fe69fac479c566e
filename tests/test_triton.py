"""The Triton kernels where there is no GPU: interpreted against the definitions, and never in the way.

What they compute on a GPU, test_cuda_operators.py compares; that they compile for one, test_triton_compile.py.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wkv_cases import Case, make

from wkv.models import wkv_operators

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(cases: str, *options: str) -> None:
    """Triton reads from the environment, once and for all, that kernels are to be interpreted."""
    file = str(Path(__file__).with_name(f"{cases}.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *options, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@with_triton
@pytest.mark.parametrize("op", ["wkv4", "wkv6", "wkv7"])
def test_interpreted(op):
    interpret("triton_cases", "-m", "not slow", "-k", op)


@with_triton
def test_interpreted_fused_pieces():
    interpret("triton_fused_cases", "-m", "not slow")


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("cases", ["triton_cases", "triton_fused_cases"])
def test_interpreted_at_length(cases):
    interpret(cases, "-m", "slow")


WITHOUT_TRITON = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise AssertionError("triton was imported")

import torch
import wkv_kernels
sys.meta_path.insert(0, Missing())
import wkv
from wkv_kernels import wkv4, wkv6, wkv7
wkv7(*(torch.zeros(1, 2, 1, 16) for _ in range(6)))
assert not [name for name in sys.modules if name.startswith(("triton", "wkv_kernels.triton"))]
"""


def test_nothing_imports_triton_on_a_cpu():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


def test_operators_without_kernels_of_a_device_stay_plain(monkeypatch):
    class Elsewhere:
        device, dtype = torch.device("cuda"), torch.float32

    for has_triton in (True, False):
        monkeypatch.setattr(wkv_operators.wkv_kernels, "_HAS_TRITON", has_triton)
        assert wkv_operators.is_compiled(Elsewhere, "wkv7") == has_triton
        assert not wkv_operators.is_compiled(Elsewhere, "rwkv_step")
    Elsewhere.dtype = torch.float64
    assert not wkv_operators.is_compiled(Elsewhere, "wkv7")


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_stay_plain(monkeypatch, capability, served):
    monkeypatch.setattr(wkv_operators.wkv_kernels, "_fitting", {})
    monkeypatch.setattr(wkv_operators.wkv_kernels, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert wkv_operators.wkv_kernels.serves("wkv7", torch.device("cuda", 0)) == served


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes where there is a GPU")
def test_bench_says_that_there_is_no_gpu():
    command = [sys.executable, str(Path(__file__).parents[1] / "kernels" / "bench.py"), "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == "bench.py: no CUDA device is available to this torch\n"


@with_triton
def test_head_sizes_that_do_not_fit_are_named():
    """Before anything is launched."""
    from wkv_kernels.triton import wkv7

    x, _ = make(Case("wkv7", 40, B=1, H=1, K=129, V=16))
    with pytest.raises(ValueError, match=r"^r must have heads of at most 128 channels"):
        wkv7.forward(*x.values(), None)
