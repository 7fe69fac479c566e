"""The Triton kernels where there is no GPU: interpreted against the definitions, and never in the way.

What they compute on a GPU, test_cuda_operators.py compares; that they compile for one, test_triton_compile.py.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import wkv_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from wkv_cases import Case, make
from wkv_kernels import gpu

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
@pytest.mark.parametrize("cases", ["wkv4", "wkv6", "wkv7", "products and not wkv"])
def test_interpreted(cases):
    interpret("triton_cases", "-m", "not slow", "-k", cases)


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


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU that Triton's kernels fit, Triton and a compiler; a test takes something away."""
    monkeypatch.setattr(gpu, "_runs", {})
    monkeypatch.setattr(gpu, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    monkeypatch.delenv("CC", raising=False)
    return monkeypatch


def served(caplog, op: str = "wkv7", head_size: int = 64) -> tuple[bool, list[str]]:
    """Whether an operator is, and what is said of it, however often it is asked."""
    found = {wkv_kernels.serves(op, torch.device("cuda", index), head_size) for index in (0, 0, 1)}
    assert len(found) == 1
    return found.pop(), [record.getMessage() for record in caplog.records]


def test_operators_of_a_gpu(machine, caplog):
    assert served(caplog) == (True, [])
    assert served(caplog, "rwkv_step") == (False, [])


def test_doubles_stay_plain(machine):
    def x(dtype):
        return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 2, 3, 64))

    assert wkv_operators.is_compiled(x(torch.float32), "wkv7")
    assert not wkv_operators.is_compiled(x(torch.float64), "wkv7")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_stay_plain(machine, caplog, capability, expected):
    machine.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found, said = served(caplog)
    assert found == expected and len(said) == (not expected)
    assert expected or "compute capability 8.0, a card has 7.5" in said[0]


def test_any_gpu_of_amd_is_served(machine, caplog):
    machine.setattr(torch.version, "hip", "7.0")
    machine.setattr(torch.cuda, "get_device_capability", None)
    assert served(caplog) == (True, [])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "need Triton 3.6 or later, which cannot be imported"),
        (types.ModuleType("triton"), "need Triton 3.6 or later, which cannot be imported"),
        (types.SimpleNamespace(__version__="3.5.1"), "need Triton 3.6 or later, this is 3.5.1"),
        (types.SimpleNamespace(__version__="3.10.0+git"), None),
    ],
    ids=["none", "folder", "old", "new"],
)
def test_without_a_recent_triton_gpus_stay_plain_and_say_so(machine, caplog, module, message):
    machine.setitem(sys.modules, "triton", module)
    found, said = served(caplog)
    assert found == (message is None) and len(said) == (not found)
    assert found or message in said[0]


@pytest.mark.parametrize(
    ("compiler", "chosen", "message"),
    [
        ("clang", None, None),
        ("/opt/cc", "/opt/cc", None),
        (None, None, "neither gcc nor clang is on the path"),
        ("gcc", "/opt/cc", "CC is '/opt/cc'"),
        ("gcc", "", "CC is ''"),
    ],
)
def test_without_a_compiler_gpus_stay_plain_and_say_so(machine, caplog, compiler, chosen, message):
    machine.setattr(shutil, "which", lambda name: name if name == compiler else None)
    if chosen is not None:
        machine.setenv("CC", chosen)
    found, said = served(caplog)
    assert found == (message is None) and len(said) == (not found)
    assert found or message in said[0]


def test_without_headers_gpus_stay_plain_and_say_so(machine, caplog, tmp_path):
    (tmp_path / "Python.h").unlink()
    found, said = served(caplog)
    assert not found and len(said) == 1 and str(tmp_path / "Python.h") in said[0]


@pytest.mark.parametrize("spec", [None, ModuleSpec("triton", None)], ids=["without_spec", "folder"])
def test_a_module_that_is_not_triton(monkeypatch, spec):
    module = types.ModuleType("triton")
    module.__spec__ = spec
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not wkv_kernels.serves("wkv7", torch.device("cuda"))


def test_large_heads_stay_plain(machine, caplog):
    found = {op: [served(caplog, op, head_size)[0] for head_size in (128, 129)] for op in gpu.OPS}
    assert found == {"wkv6": [True, False], "wkv7": [True, False], "wkv4": [True] * 2, "rwkv7_fused": [True] * 2}


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_large_heads_on_a_gpu(machine, op):
    """Tensors of a GPU that is not there have shapes and a device, but no numbers."""
    module = sys.modules[f"wkv.models.{op}"]
    for name in (f"compiled_{op}", f"chunk_{op}"):
        machine.setattr(module, name, lambda *_, name=name: name)
    found = []
    for K in (128, 129):
        x, _ = make(Case(op, 70, B=1, H=1, K=K, V=16))
        with FakeTensorMode():
            found.append(getattr(module, op)(*(torch.empty(t.shape, device="cuda") for t in x.values())))
    assert found == [f"compiled_{op}", f"chunk_{op}"]


@pytest.mark.parametrize("missing", [None, "everything"])
def test_the_choice_is_made_while_compiling(monkeypatch, missing):
    monkeypatch.setattr(gpu, "_runs", {})
    monkeypatch.setattr(gpu, "_missing", lambda index: missing)
    # The compiler itself must go on seeing that there is no GPU.
    monkeypatch.setattr(gpu, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True)))

    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def choose(x):
        return x + wkv_kernels.serves("wkv7", torch.device("cuda", 0), x.shape[-1])

    assert [choose(torch.zeros(1, K))[0, 0].item() for K in (128, 129)] == [missing is None, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes where there is a GPU")
def test_bench_says_that_there_is_no_gpu():
    command = [sys.executable, str(Path(__file__).parents[1] / "kernels" / "bench.py"), "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == "bench.py: no CUDA device is available to this torch\n"


@with_triton
def test_head_sizes_that_do_not_fit_are_named():
    """Before anything is launched, where an operator is called by itself."""
    for op, size in gpu.MAX_HEAD_SIZE.items():
        module = importlib.import_module(f"wkv_kernels.triton.{op}")
        for T in (9, 40):
            x, _ = make(Case(op, T, B=1, H=1, K=size + 1, V=16))
            with pytest.raises(ValueError, match=f"^r must have heads of at most {size} channels"):
                module.forward(*x.values(), None)
