"""The Triton kernels compiled for GPUs that are not here: they fit, they spill little, they use tensor cores.

`python kernels/triton_table.py` prints what is checked.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_table as table

# Bytes of a thread: a kernel that holds several tiles of float32 and splits each into parts runs out of registers
# for moments, in the first-level cache.
SPILLED = 3328
# What compiles in a second or two; the rest takes up to half a minute a kernel.
QUICK = {
    "wkv4": ("forward_kernel", "backward_kernel"),
    "wkv6": ("recurrent_kernel", "scan_kernel"),
    "wkv7": ("recurrent_kernel", "scan_kernel"),
    "rwkv7_fused": ("add_parts_kernel", "out_stage_backward_kernel"),
}
ON_TENSOR_CORES = {
    "wkv4": (),
    "wkv6": ("add_up_kernel", "output_kernel", "gradient_kernel"),
    "wkv7": ("prepare_kernel", "scan_kernel", "output_kernel", "value_gradient_kernel", "key_gradient_kernel"),
}


def check(launch: table.Launch, op: str, arch: str) -> None:
    found, kernel = table.measure(launch, arch), launch.kernel.__name__
    assert found.shared <= table.SHARED_MEMORY[arch], (kernel, found)
    assert found.spilled <= SPILLED, (kernel, found)
    assert (found.mma > 0) == (kernel in ON_TENSOR_CORES.get(op, ())), (kernel, found)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op", QUICK)
def test_small_kernels(op, arch):
    small = [launch for launch in table.launches_of(op, arch, "64, bf16") if launch.kernel.__name__ in QUICK[op]]
    assert {launch.kernel.__name__ for launch in small} == set(QUICK[op])
    for launch in small:
        check(launch, op, arch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", table.TARGETS)
@pytest.mark.parametrize("op", table.CALLS)
def test_every_kernel_and_configuration(op, arch):
    for launch in table.launches_of(op, arch):
        check(launch, op, arch)


def test_every_kernel_is_in_the_table():
    """A kernel that no call of the table launches would go unproven."""
    for op in table.CALLS:
        assert {launch.kernel.__name__ for launch in table.launches_of(op, "sm_90")} == table.kernels_of(op)
