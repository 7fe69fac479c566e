"""A model over two devices, without a GPU: what a layer gets, keeps and gives is on its device (device_cases.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

pytest.importorskip("wkv_kernels")


def test_what_a_layer_keeps_is_on_its_device():
    """Every generation in one process, for starting it takes longer than they do."""
    cases = Path(__file__).with_name("device_cases.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, cases, *sorted(TINY)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
