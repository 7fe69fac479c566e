"""What the Triton kernels compile to, without a GPU: python kernels/triton_table.py [--arch sm_90 ...] [--op wkv7 ...]

For every kernel and configuration: shared memory, registers and spilled bytes of a thread, and how many instructions
of tensor cores stand in the code. Kernels and their arguments are those that calls of the operators launch; a call on
meta tensors tells them.
"""

import argparse
import functools
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that a program may use.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b|\bv_mfma_"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched: types and constants of its arguments, and its options.

    Arguments that are tuples have a tuple of types; constants and what is a multiple of 16 are told by their path.
    """

    kernel: JITFunction
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """`shared` and `spilled` in bytes; `registers` of a thread; `mma` instructions of tensor cores."""

    shared: int
    registers: int
    spilled: int
    mma: int


def launches(call: Callable, arch: str) -> list[Launch]:
    """What a call of kernels would launch on a device of this architecture."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants, aligned = [], []

        def kind(path: tuple[int, ...], value, parameter):
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                constants.append((path, value))
                return "constexpr"
            if isinstance(value, tuple):
                return tuple(kind((*path, i), x, parameter) for i, x in enumerate(value))
            if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
                aligned.append(path)
            if isinstance(value, torch.Tensor):
                return "*" + TYPES[value.dtype]
            return "i32" if isinstance(value, int) else "fp32"

        signature = [(p.name, kind((i,), given[p.name], p)) for i, p in enumerate(kernel.params)]
        launch = Launch(kernel, *map(tuple, (signature, constants, aligned, sorted(options.items()))))
        if launch not in found:
            found.append(launch)

    rocm = None if arch.startswith("sm_") else "any version"
    with mock.patch.object(JITFunction, "run", record), mock.patch.object(torch.version, "hip", rocm):
        call()
    return found


def compile_launch(launch: Launch, arch: str):
    """Triton's compiled kernel."""
    attributes = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    return triton.compile(source, target=TARGETS[arch], options=dict(launch.options))


def measure(launch: Launch, arch: str) -> Compiled:
    kernel = compile_launch(launch, arch)
    shared = kernel.metadata.shared
    if arch.startswith("sm_"):
        # PTX is written by Triton; registers and spills are known once ptxas has made machine code of it.
        mma = len(re.findall(TENSOR_CORES, kernel.asm["ptx"]))
        return Compiled(shared, *_resources(kernel.asm["cubin"]), mma)
    code = kernel.asm["amdgcn"]
    vector, accumulators, spilled = (
        max(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)), default=0)
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count")
    )
    return Compiled(shared, max(vector, accumulators), 4 * spilled, len(re.findall(TENSOR_CORES, code)))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def rows_of(dtype: torch.dtype, B: int, T: int, H: int, N: int, names: int) -> list[torch.Tensor]:
    """Meta tensors (B, T, H, N), of which the second is log_w."""
    return [torch.empty(B, T, H, N, dtype=torch.float32 if i == 1 else dtype, device="meta") for i in range(names)]


def wkv7_calls() -> Iterator[tuple[str, Callable]]:
    """A forward call, a backward call and a step for every head size, by what the table calls them."""
    module = importlib.import_module("wkv_kernels.triton.wkv7")
    for N, dtype in ((64, torch.bfloat16), (64, torch.float32), (32, torch.bfloat16), (128, torch.bfloat16)):
        name = f"N = {N}, {TYPES[dtype]}"
        rows = rows_of(dtype, 1, 4096, 32, N, 6)
        state = torch.empty(1, 32, N, N, device="meta")
        yield name, functools.partial(module.forward, *rows, state, None)
        yield name, functools.partial(module.backward, rows[3], state, *rows, state, None)
        yield name, functools.partial(module.forward, *(x[:, :1] for x in rows), state, None)
    rows, packing = rows_of(torch.bfloat16, 1, 4096, 32, 64, 6), torch.empty(3, dtype=torch.int64, device="meta")
    yield "packed", functools.partial(module.forward, *rows, None, packing)


def wkv6_calls() -> Iterator[tuple[str, Callable]]:
    """The same of wkv6."""
    module = importlib.import_module("wkv_kernels.triton.wkv6")
    for N in (32, 64, 128):
        u, state = torch.empty(32, N, device="meta"), torch.empty(1, 32, N, N, device="meta")
        for dtype in (torch.float32, torch.bfloat16):
            name = f"N = {N}, {TYPES[dtype]}"
            r, log_w, k, v = rows_of(dtype, 1, 4096, 32, N, 4)
            first = [x[:, :1] for x in (r, log_w, k, v)]
            yield name, functools.partial(module.forward, r, log_w, u, k, v, state, None)
            yield name, functools.partial(module.backward, v, state, r, log_w, u, k, v, state, None)
            yield name, functools.partial(module.forward, *first[:2], u, *first[2:], state, None)
        packing = torch.empty(3, dtype=torch.int64, device="meta")
        yield f"N = {N}, bf16, packed", functools.partial(module.forward, r, log_w, u, k, v, None, packing)


def wkv4_calls() -> Iterator[tuple[str, Callable]]:
    """A forward and a backward call for every dtype, with a state and packed."""
    module = importlib.import_module("wkv_kernels.triton.wkv4")
    log_w, u = torch.empty(1, 1, 2048, device="meta"), torch.empty(2048, device="meta")
    state, packing = torch.empty(1, 2048, 3, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        k = torch.empty(1, 4096, 2048, dtype=dtype, device="meta")
        for name, rest in (("", (state, None)), (", packed", (None, packing))):
            name = f"H N = 32 x 64, {TYPES[dtype]}{name}"
            yield name, functools.partial(module.forward, log_w, u, k, k, *rest)
            yield name, functools.partial(module.backward, k, None, log_w, u, k, k, *rest)


def fused_calls() -> Iterator[tuple[str, Callable]]:
    """Each piece, forwards and backwards, as a model of 2048 channels calls it."""
    module = importlib.import_module("wkv_kernels.triton.rwkv7_fused")
    for dtype in (torch.float32, torch.bfloat16):
        x, h, p = (torch.empty(*s, dtype=dtype, device="meta") for s in ((1, 4096, 2048), (1, 4096, 32, 64), (2048,)))
        log_w, before = torch.empty(1, 4096, 32, 64, device="meta"), x[:, 0]
        calls = [
            ("key_stage", (x, x, x, p, p, 32), [log_w, h, h, h], [x, x, x, p, p]),
            ("value_residual", (x, x, x), [x], [x, x, x]),
            ("out_stage", (h, h, h, h, x, p, p, p, 64e-5), [x], [h, h, h, h, x, p, p, p]),
            ("relu_squared", (x,), [x], [x]),
        ]
        for mixes, shifted in ((6, []), (6, [before]), (1, [before]), (1, [x])):
            inputs = x, *(shifted or [None]), [p] * mixes, dtype
            calls.append(("shift_mix", inputs, [x] * mixes, [x, *shifted, *[p] * mixes]))
        for piece, inputs, outputs, gradients in calls:
            name = f"{piece}, N = 64, {TYPES[dtype]}"
            yield name, functools.partial(getattr(module, f"rwkv7_{piece}"), inputs, outputs)
            yield name, functools.partial(getattr(module, f"rwkv7_{piece}_backward"), inputs, outputs, gradients)


# A row per operator: calls that between them launch each of its kernels in each configuration.
CALLS = {"wkv4": wkv4_calls, "wkv6": wkv6_calls, "wkv7": wkv7_calls, "rwkv7_fused": fused_calls}


def named_launches(op: str, arch: str) -> dict[Launch, str]:
    """Each launch of an operator's calls, and the first call that makes it."""
    found = {}
    for name, call in CALLS[op]():
        for launch in launches(call, arch):
            found.setdefault(launch, name)
    return found


def launches_of(op: str, arch: str, name: str = "") -> list[Launch]:
    """Those of the calls with this in their name."""
    return [launch for launch, call in named_launches(op, arch).items() if name in call]


def kernels_of(op: str) -> set[str]:
    """Names of all kernels that an operator's module has."""
    module = importlib.import_module(f"wkv_kernels.triton.{op}")
    return {name for name, x in vars(module).items() if isinstance(x, JITFunction) and name.endswith("_kernel")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--of", default="", metavar="TEXT", help="only calls with this in their name: 64, bf16")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args()
    print("| operator | kernel | of | for | shared KiB | registers | spilled bytes | tensor core instructions |")
    print("|---|---|---|---|---|---|---|---|")
    for op, arch in itertools.product(given.op, given.arch):
        for launch, name in named_launches(op, arch).items():
            if given.of in name:
                found = measure(launch, arch)
                cells = [op, launch.kernel.__name__, name, arch, f"{found.shared / 1024:.0f}", found.registers]
                print("|", " | ".join(map(str, [*cells, found.spilled, found.mma])), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
