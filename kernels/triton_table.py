"""What the Triton kernels compile to, without a GPU: python kernels/triton_table.py [--arch sm_90 ...] [--op wkv7 ...]

A line for every kernel and configuration: registers and spilled bytes of a thread, shared memory, and how many
instructions of tensor cores stand in the code. `--output FILE` puts the table between the marks of that file:

    python kernels/triton_table.py --of "N = 64, bf16" --output kernels/README.md
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton._C.libtriton import ir, llvm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

sys.path.insert(0, str(Path(__file__).parent))
from triton_launches import CALLS, CASES, Launch, kernels_of, launches, named_launches  # noqa: F401

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
}
# Those of data centres, and GeForce RTX 30, 40 and 50.
ARCHITECTURES, CONSUMER = list(TARGETS)[:4], list(TARGETS)[4:]
# Bytes that a program may use.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SHARED_MEMORY |= dict.fromkeys(CONSUMER, 99 << 10)
TENSOR_CORES = r"\b(wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)\b|\bv_(mfma)_"
MARKS = "<!-- triton -->", "<!-- /triton -->"


@dataclass(frozen=True)
class Compiled:
    """Registers of a thread, `spilled` and `shared` in bytes, instructions of tensor cores by their kind."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: Counter

    def __str__(self) -> str:
        cores = "+".join(f"{n} {kind}" for kind, n in sorted(self.tensor_cores.items())) or "-"
        return f"{self.registers} / {self.spilled} / {self.shared / 1024:.3g} / {cores}"


def source_of(launch: Launch) -> ASTSource:
    attributes = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    return ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)


def compile_launch(launch: Launch, arch: str):
    """Triton's compiled kernel, made anew."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return triton.compile(source_of(launch), target=TARGETS[arch], options=dict(launch.options))


def measure(launch: Launch, arch: str) -> Compiled:
    kernel = compile_launch(launch, arch)
    # PTX is written by Triton; registers and spills are known once ptxas has made machine code of it.
    code = kernel.asm["ptx" if arch.startswith("sm_") else "amdgcn"]
    cores = Counter("".join(found) for found in re.findall(TENSOR_CORES, code))
    if arch.startswith("sm_"):
        return Compiled(*_resources(kernel.asm["cubin"]), kernel.metadata.shared, cores)
    vector, accumulators, spilled = (
        max(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)), default=0)
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count")
    )
    return Compiled(max(vector, accumulators), 4 * spilled, kernel.metadata.shared, cores)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def shared_memory(launch: Launch, arch: str) -> tuple[int, str]:
    """Bytes, known long before there is machine code, and Triton's code for the GPU without the name of the GPU."""
    source, backend, context = source_of(launch), make_backend(TARGETS[arch]), ir.context()
    options = backend.parse_options(dict(launch.options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(TARGETS[arch], options, *functions, context)
    stages, metadata = {}, dict(vars(options))
    backend.add_stages(stages, options, source.language)
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, metadata)
    code = re.sub(r'"cuda:\d+"', "", str(module))
    with mock.patch.object(llvm, "optimize_module"):
        stages["llir"](module, metadata)
    return metadata["shared"], code


def lines(op: str, archs: list[str], of: str) -> Iterator[str]:
    """A line for every kernel and case that has this in its name: the most of each that any variant of it takes."""
    found, cases = {}, [case for case in CASES if of in str(case)]
    for arch in archs:
        for launch, case in named_launches(op, arch, cases).items():
            cells = found.setdefault((str(launch), case), {})
            cells[arch] = largest(filter(None, [cells.get(arch), measure(launch, arch)]))
    for (kernel, case), cells in found.items():
        yield f"| {op} | `{kernel}` | {case} | " + " | ".join(str(cells.get(arch, "")) for arch in archs) + " |"


def largest(variants: Iterable[Compiled]) -> Compiled:
    registers, spilled, shared, cores = zip(*(vars(x).values() for x in variants), strict=True)
    total = Counter()
    for kinds in cores:
        total |= kinds
    return Compiled(max(registers), max(spilled), max(shared), total)


def heading(archs: list[str]) -> str:
    command = shlex.join(["python", "kernels/triton_table.py", *sys.argv[1:]])
    return f"""Triton {triton.__version__}, `{command}`:
registers / spilled bytes of a thread / KiB of shared memory / instructions of tensor cores.

| operator | kernel | case | {" | ".join(archs)} |
|{"---|" * (3 + len(archs))}"""


def write(table: str, file: Path) -> None:
    """Puts the table between the marks of a file."""
    text = file.read_text(encoding="utf-8")
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"{file} has no {MARKS[0]} and {MARKS[1]}")
    file.write_text(f"{before}{mark}\n{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--of", default="", metavar="TEXT", help="only cases with this in their name: 64, bf16, packed")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=ARCHITECTURES)
    parser.add_argument("--output", type=Path, metavar="FILE", help="rewrite the table between its marks in this file")
    given = parser.parse_args()
    table = "\n".join([heading(given.arch), *(line for op in given.op for line in lines(op, given.arch, given.of))])
    if given.output is None:
        print(table)
    else:
        write(table, given.output)


if __name__ == "__main__":
    sys.exit(main())
