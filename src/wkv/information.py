"""What `wkv info` and the reports of the other commands say about this installation."""

import platform
import resource
import sys
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Column, Table

from .activation import active
from .demo import demo_model_path

try:
    import wkv_kernels
except ImportError:
    wkv_kernels = None

OPS = ("wkv4", "wkv6", "wkv7", "rwkv7_fused", "rwkv_step", "few_rows_linear", "cross_entropy")


def kernel() -> str:
    """The implementation that runs the operators on this machine's CPU."""
    return f"compiled, {wkv_kernels.info()['isa']}" if wkv_kernels else "plain PyTorch"


def peak_memory() -> float:
    """Largest resident memory of this process so far, in bytes."""
    # macOS counts bytes, every other Unix kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_information() -> None:
    """Print the table of `wkv info`."""
    table = Table("", Column(overflow="fold"), show_header=False, box=None)
    for name in ("wkv", "torch", "transformers", "tokenizers", "safetensors"):
        table.add_row(name, metadata.version(name))
    table.add_row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("kernels", kernel())
    compiled = wkv_kernels.info()["ops"] if wkv_kernels else {}
    for op in OPS:
        backends = ", ".join(f"{device}: {backend}" for device, backend in compiled.get(op, {}).items())
        table.add_row(f"op {op}", "; ".join(filter(None, [backends, "otherwise plain PyTorch"])))
    activation = ", ".join(map(str, active()))
    table.add_row("activated", activation or "no")
    folder = demo_model_path()
    table.add_row("demo model", str(folder) if folder.is_dir() else "not part of this build")
    Console(soft_wrap=True).print(table)
