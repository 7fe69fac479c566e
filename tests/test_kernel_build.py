"""The compiled library as built from source, against loops in double precision, for every instruction set.

The programs are `kernels/tests/*_driver.cpp`. They run natively under sanitizers, and emulated as built for Arm.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import OPERATOR_TOLERANCE
from wkv_kernels.library import available_isas

KERNELS = Path(__file__).parents[1] / "kernels"
DRIVERS = sorted(path.stem for path in KERNELS.glob("tests/*_driver.cpp"))
TOLERANCES = [OPERATOR_TOLERANCE[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)]
# New memory is full of NaN, a word of 0xff bytes; where there is no sanitizer, of numbers near -10^38.
ASAN_OPTIONS = "max_malloc_fill_size=1000000000:malloc_fill_byte=255:detect_leaks=1"
MALLOC_PERTURB = "1"
# Where `make test-arm` puts the compiler.
ARM = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wkv-arm" / "usr"
# The virtual environment's ninja need not be on the path.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(ARM / "bin")])


def run(*command, **environment) -> str:
    result = subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def compile_kernels(folder: Path, *options: str, **environment) -> None:
    run("cmake", "-G", "Ninja", "-S", KERNELS, "-B", folder, *options, PATH=PATH, **environment)
    run("cmake", "--build", folder, PATH=PATH, **environment)


def test_under_sanitizers(tmp_path):
    compile_kernels(tmp_path, "-DWKV_SANITIZE=ON")
    options = {"ASAN_OPTIONS": ASAN_OPTIONS, "UBSAN_OPTIONS": "print_stacktrace=1"}
    for isa, driver in itertools.product(available_isas(), DRIVERS):
        output = run(tmp_path / driver, *TOLERANCES, WKV_ISA=isa, **options)
        assert output.split()[0] == isa
    assert_builds_share_no_symbols(tmp_path)


def assert_builds_share_no_symbols(build: Path) -> None:
    objects = sorted(build.rglob("*_simd.cpp.o"))
    assert objects
    for path in objects:
        symbols = [line.split() for line in run("nm", "--defined-only", path).splitlines()]
        # Weak code is what the linker merges across builds; strong symbols must carry the build's namespace.
        assert not [name for *_, kind, name in symbols if kind in "Ww"], path
        isa = path.parts[len(build.parts) + 1].removeprefix("wkv_").removesuffix(".dir")
        assert all(isa in name for *_, kind, name in symbols if kind in "TDBR"), path


def test_arm(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++", path=PATH)
    emulator = shutil.which("qemu-aarch64", path=PATH) or shutil.which("qemu-aarch64-static", path=PATH)
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64 here; `make test-arm` fetches them from Debian")
    # Compiler and assembler have libraries beside them.
    installed = Path(compiler).parents[1]
    libraries = os.pathsep.join(str(path) for path in sorted(installed.glob("lib/*-linux-gnu")))
    options = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": compiler}
    compile_kernels(tmp_path, *(f"-D{key}={value}" for key, value in options.items()), LD_LIBRARY_PATH=libraries)
    for driver in DRIVERS:
        command = [emulator, "-L", installed / "aarch64-linux-gnu", tmp_path / driver, *TOLERANCES]
        assert run(*command, MALLOC_PERTURB_=MALLOC_PERTURB).split()[0] == "neon"
