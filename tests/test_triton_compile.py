"""The Triton kernels compiled for GPUs that are not here: they fit, they spill little, they use tensor cores.

`python kernels/triton_table.py` prints what is checked.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_table as table
from triton_launches import CASES, Case

README = Path(__file__).parents[1] / "kernels" / "README.md"

# Bytes of shared memory of a program. sm_86 and sm_89, RTX 30 and 40, run the code of sm_80 with less.
LIMITS = {**table.SHARED_MEMORY, "sm_80": table.SHARED_MEMORY["sm_86"]}
# Bytes that a thread may keep in memory for want of registers, mostly for moments and in the first-level cache: with
# heads of up to 64 channels, and of 128.
SPILLED = {
    "wkv4": {"sm_80": (8, 8), "sm_90": (0, 0), "sm_100": (0, 0), "gfx942": (0, 0)},
    "wkv6": {"sm_80": (980, 3020), "sm_90": (880, 3020), "sm_100": (880, 3020), "gfx942": (8, 160)},
    "wkv7": {"sm_80": (790, 7400), "sm_90": (790, 1320), "sm_100": (830, 2500), "gfx942": (0, 0)},
    "rwkv7_fused": {"sm_80": (8, 8), "sm_90": (0, 0), "sm_100": (0, 0), "gfx942": (0, 0)},
}
# Instructions for products of matrices; the last ones serve large tiles. Which kernels have products, and whether their
# tiles for heads of 64 channels are large.
TENSOR_CORES = {"sm_80": ["mma"], "sm_90": ["mma", "wgmma"], "sm_100": ["mma", "tcgen05"], "gfx942": ["mfma"]}
PRODUCTS = {
    "wkv4": {},
    "wkv6": {"add_up_kernel": True, "output_kernel": False, "gradient_kernel": False},
    "wkv7": {
        "prepare_kernel": True,
        "scan_kernel": True,
        "output_kernel": False,
        "value_gradient_kernel": False,
        "key_gradient_kernel": False,
    },
    "rwkv7_fused": {},
}
# What the default tests compile, so that they take two minutes: every kernel for every architecture, and each dtype
# and packed sequences for one of them. The slow tests compile the rest.
LARGE = Case(128, torch.float32)
QUICK = {
    "sm_80": [Case(64, torch.float32)],
    "sm_90": [Case(64, torch.bfloat16)],
    "sm_100": [Case(64, torch.float16, packed=True)],
    "gfx942": [Case(64, torch.bfloat16)],
}
every_op = pytest.mark.parametrize("op", table.CALLS)


def on_tensor_cores(op: str, arch: str, kernel: str, case: str, found: Counter) -> bool:
    if kernel not in PRODUCTS[op]:
        return not found
    large = PRODUCTS[op][kernel] and case.startswith("N = 64")
    return len(found) > 0 and found.keys() <= set(TENSOR_CORES[arch]) and (not large or TENSOR_CORES[arch][-1] in found)


def check(op: str, arch: str, cases: Iterable[Case]) -> None:
    wrong = []
    for launch, case in table.named_launches(op, arch, cases).items():
        found, spilled = table.measure(launch, arch), SPILLED[op][arch][case.startswith("N = 128")]
        if found.shared > LIMITS[arch]:
            wrong.append(f"{launch}, {case}: {found}: more than {LIMITS[arch]} bytes of shared memory")
        if found.spilled > spilled:
            wrong.append(f"{launch}, {case}: {found}: more than {spilled} bytes spilled")
        if not on_tensor_cores(op, arch, launch.kernel.__name__, case, found.tensor_cores):
            wrong.append(f"{launch}, {case}: {found}: instructions of tensor cores")
    assert not wrong, "\n".join([f"{op} on {arch}", *wrong])


@pytest.mark.parametrize("arch", table.ARCHITECTURES)
@every_op
def test_every_kernel(op, arch):
    check(op, arch, QUICK[arch])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", table.ARCHITECTURES)
@every_op
def test_every_kernel_and_configuration(op, arch):
    check(op, arch, [case for case in CASES if case not in QUICK[arch]])


def check_shared_memory(op: str, arch: str, cases: Iterable[Case]) -> None:
    found = {launch: table.shared_memory(launch, arch)[0] for launch in table.named_launches(op, arch, cases)}
    wrong = [f"{launch}: {shared} bytes of shared memory" for launch, shared in found.items() if shared > LIMITS[arch]]
    assert not wrong, "\n".join([f"{op} on {arch} has {LIMITS[arch]}", *wrong])


@pytest.mark.parametrize("arch", ["sm_120", "gfx942"])
@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_large_heads_find_room(op, arch):
    """Where there is least shared memory."""
    check_shared_memory(op, arch, [LARGE])


@pytest.mark.slow
@pytest.mark.parametrize("arch", table.CONSUMER)
@every_op
def test_everything_finds_room_on_consumer_cards(op, arch):
    check_shared_memory(op, arch, CASES)


def test_shared_memory_is_what_compiling_says():
    """And the code for sm_86 and sm_89 is the code for sm_80."""
    launch = next(launch for launch in table.named_launches("wkv7", "sm_80", QUICK["sm_80"]) if "scan" in str(launch))
    shared, code = table.shared_memory(launch, "sm_80")
    assert shared == table.measure(launch, "sm_80").shared > 0
    for arch in ("sm_86", "sm_89"):
        assert table.shared_memory(launch, arch) == (shared, code)
    assert table.shared_memory(launch, "sm_90")[1] != code


def test_every_kernel_is_compiled():
    """A kernel that no call of the table launches would go unproven."""
    for op in table.CALLS:
        for arch in table.ARCHITECTURES:
            found = {launch.kernel.__name__ for launch in table.named_launches(op, arch, QUICK[arch])}
            assert found == table.kernels_of(op), (op, arch)


def test_recorded_table_names_every_kernel():
    rest = README.read_text(encoding="utf-8").partition(table.MARKS[0])[2]
    recorded, mark, _ = rest.partition(table.MARKS[1])
    assert mark, "kernels/README.md has no table"
    assert re.search(r"^Triton \d+\.\d+\.\d+, `python kernels/triton_table.py ", recorded, re.MULTILINE)
    assert all(arch in recorded for arch in table.ARCHITECTURES)
    found = set(re.findall(r"^\| (\w+) \| `([^`]+)` \|", recorded, re.MULTILINE))
    for op in table.CALLS:
        assert {kernel for name, kernel in found if name == op} == {
            str(launch) for launch in table.named_launches(op, "sm_90", QUICK["sm_90"])
        }, op


def test_table_is_written_between_its_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- triton -->\nold\n<!-- /triton -->\nafter\n")
    table.write("new", file)
    assert file.read_text() == "before\n<!-- triton -->\nnew\n<!-- /triton -->\nafter\n"
    file.write_text("before\n")
    with pytest.raises(SystemExit, match="has no <!-- triton -->"):
        table.write("new", file)
