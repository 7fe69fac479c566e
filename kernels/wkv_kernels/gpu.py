"""Which operators Triton's kernels serve, and what they need on a machine: a GPU, Triton, a C compiler."""

import importlib.util
import logging
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Operators with a module in triton/, for devices that torch calls cuda: NVIDIA's and, through ROCm, AMD's.
OPS = ("wkv4", "wkv6", "wkv7", "rwkv7_fused")
# Key channels of a head, which lie in registers side by side.
MAX_HEAD_SIZE = {"wkv6": 128, "wkv7": 128}
# NVIDIA's from Ampere on.
OLDEST_CAPABILITY = (8, 0)
# The oldest that the kernels have run on.
OLDEST_TRITON = (3, 6)

_runs: dict[int | None, bool] = {}
_said: set[str] = set()


def runs(index: int | None) -> bool:
    """Whether Triton's kernels run on a GPU; says once what is missing. Without any GPU: whether Triton is there."""
    if index not in _runs:
        if not torch.cuda.is_available():
            return _is_installed()
        missing = _missing(index)
        if missing and missing not in _said:
            _said.add(missing)
            logger.warning(
                "RWKV runs without compiled kernels on the GPU: %s. Plain PyTorch is used, same results but slower.",
                missing,
            )
        _runs[index] = missing is None
    return _runs[index]


# What torch.compiler.assume_constant_result does, which would import torch's compiler here.
runs._dynamo_marked_constant = True


def _is_installed() -> bool:
    try:
        spec = importlib.util.find_spec("triton")
    except ValueError:
        return False
    # Any folder of that name can be imported, but has no file.
    return spec is not None and spec.origin is not None


def _missing(index: int | None) -> str | None:
    """What keeps Triton's kernels from running on a GPU, and what to do about it."""
    if not torch.version.hip:
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            needed, found = (".".join(map(str, x)) for x in (OLDEST_CAPABILITY, capability))
            return f"they need compute capability {needed}, {torch.cuda.get_device_name(index)} has {found}"
    return _missing_triton() or _missing_compiler()


def _missing_triton() -> str | None:
    oldest = ".".join(map(str, OLDEST_TRITON))
    try:
        # Distributions of Triton have several names; the module has one.
        from triton import __version__ as version
    except ImportError as error:
        return f"they need Triton {oldest} or later, which cannot be imported ({error}); `pip install triton` brings it"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TRITON:
        return f"they need Triton {oldest} or later, this is {version}; a later PyTorch brings a later Triton"
    return None


def _missing_compiler() -> str | None:
    """Of what Triton builds the launchers of kernels with, as it looks for it itself."""
    if os.name == "nt":
        # Triton for Windows has a compiler of its own.
        return None
    chosen = os.environ.get("CC")
    if not any(map(shutil.which, ["gcc", "clang"] if chosen is None else [chosen])):
        what = "neither gcc nor clang is on the path" if chosen is None else f"CC is {chosen!r}, which is none"
        return f"Triton needs a C compiler, and {what}; `apt install gcc` or the like brings one"
    if os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH"):
        return None
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not header.exists():
        return (
            f"Triton needs Python's headers, and {header} does not exist; `apt install python3-dev` or the like helps"
        )
    return None
