"""`bench.py --device cuda` without a GPU: every table is made, on the CPU and with the clock stubbed."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

KERNELS = Path(__file__).parents[1] / "kernels"
sys.path.insert(0, str(KERNELS))

pytest.importorskip("triton")

import bench  # noqa: E402
import bench_cuda  # noqa: E402
import bench_cuda_work  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


@pytest.fixture
def on_cpu(monkeypatch):
    """Everything but the device, the clock and the sizes is as on a GPU."""
    for name, value in {
        "DEVICE": "cpu",
        "TOKENS": 64,
        "H": 2,
        "N": 16,
        "LENGTHS": [16, 64],
        "KERNELS_LENGTH": 32,
    }.items():
        monkeypatch.setattr(bench_cuda, name, value)
    monkeypatch.setattr(bench_cuda, "milliseconds", lambda run: run() or 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")


def run(monkeypatch, capsys, *arguments) -> list[list[str]]:
    """The cells of the tables that a run prints."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cuda", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_table(on_cpu, monkeypatch, capsys):
    rows = run(monkeypatch, capsys)
    assert {row[0] for row in rows if ":" in row[0]} == {
        *(f"{op}: T" for op in bench_cuda.OPERATORS),
        "rwkv7_fused: piece",
    }
    assert [row[:2] for row in rows[1:3]] == [["16", "4"], ["64", "1"]]
    measured = "0.50 / 0.50"
    for heading, row in ((rows[0], rows[1]), (rows[-6], rows[-1])):
        cells = dict(zip(heading, row, strict=True))
        assert cells["wkv"] == cells["plain"] == measured and cells.get("loop", measured) == measured
        assert cells.get("attention", measured) == measured and "%" in cells["reached"]


def test_a_part_of_it(on_cpu, monkeypatch, capsys):
    rows = run(monkeypatch, capsys, "--op", "wkv6", "--lengths", "32", "--without", "plain", "attention")
    assert len(rows) == 2 and rows[1][:2] == ["32", "2"]
    cells = dict(zip(rows[0], rows[1], strict=True))
    assert [cells[name] for name in ("plain", "loop", "attention")] == ["-", "0.50 / 0.50", "-"]


def test_time_by_kernel(on_cpu, monkeypatch, capsys):
    seen = {"scan_kernel": (3, 2.0), "of torch": (1, 1.0)}
    monkeypatch.setattr(bench_cuda, "kernel_times", lambda step: step() or seen)
    rows = run(monkeypatch, capsys, "--kernels")
    assert [row[0] for row in rows if ":" in row[0]][:2] == ["wkv7, T = 32: kernel", "wkv6, T = 32: kernel"]
    assert rows[1][:3] == ["scan_kernel", "3", "2.000"] and rows[1][4].endswith("%")
    assert rows[2] == ["of torch", "1", "1.000", "-", "-"] and rows[3][1].endswith("expected, none seen")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert capsys.readouterr().out == "bench.py: no CUDA device is available to this torch\n"


@pytest.fixture
def launched(monkeypatch) -> tuple[Counter, Counter]:
    """Filled with each launch of a kernel, which then does nothing: how many, and the bytes of their arguments."""
    calls, moved = Counter(), Counter()

    def record(kernel, *args, grid, warmup, **kwargs):
        calls[kernel.__name__] += 1
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        moved[kernel.__name__] += sum(x.nbytes for x in tensors)

    monkeypatch.setattr(JITFunction, "run", record)
    return calls, moved


def assert_predicted(works, launched, heads: int) -> None:
    """A kernel may read an argument in part, or write in place, but the small ones it does not count are small."""
    calls, moved = launched
    assert calls == {name: n for name, (n, _) in works.by_kernel(heads).items()}
    for name in calls.keys() - {"add_parts_kernel"}:
        expected = sum(heads * work.bytes for work in works.forward + works.backward if work.kernel == name)
        assert 0.5 <= moved[name] / expected <= 1.1, name


@pytest.mark.parametrize("op", bench_cuda.OPERATORS)
def test_predictions_are_of_what_is_launched(op, on_cpu, launched, monkeypatch):
    """Names and numbers of launches, and bytes by what is given to them."""
    monkeypatch.setattr(bench_cuda, "N", 64)
    inputs = [x.to("meta") for x in bench_cuda.OPERATORS[op][0](2, 1024)]
    module = importlib.import_module(f"wkv_kernels.triton.{op}")
    module.forward(*inputs, None, None)
    module.backward(inputs[-1] if op == "wkv4" else inputs[3], None, *inputs, None, None)
    assert_predicted(bench_cuda_work.OPERATORS[op](64, 2), launched, heads=2 * 1024 * 2)


@pytest.mark.parametrize("piece", bench_cuda_work.fused_works(64, 2))
def test_predictions_of_fused_pieces(piece, on_cpu, launched, monkeypatch):
    monkeypatch.setattr(bench_cuda, "N", 64)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def launch(op, *inputs):
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), inputs)
        outputs = op.redispatch(key, *inputs)
        backward = getattr(torch.ops.wkv, f"{op._opname}_backward").default
        backward.redispatch(key, pytree.tree_leaves(outputs), *inputs)
        return outputs

    monkeypatch.setattr(bench_cuda.rwkv7_fused, "_run", launch)
    inputs, ours, _ = bench_cuda.fused_pieces()[piece]
    ours(*inputs)
    assert_predicted(bench_cuda_work.fused_works(64, 2)[piece], launched, heads=64 * 2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--op wkv7", "--op: needs --device cuda"),
        ("--kernels", "--kernels: needs --device cuda"),
        ("--device cuda --lengths 70000", "--lengths: must divide 65536, got 70000"),
        ("--device cuda --quick", "--quick: is of the CPU's bench"),
        ("--device cuda --without wkv", "invalid choice: 'wkv'"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and complaint in error, error
