"""The compiled library as built from source: under sanitizers, and without symbols that its builds could share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from wkv_kernels.library import available_isas

KERNELS = Path(__file__).parents[1] / "kernels"
# A word of 0xff bytes is NaN.
ASAN_OPTIONS = "max_malloc_fill_size=1000000000:malloc_fill_byte=255:detect_leaks=1"


def run(*command, **environment) -> str:
    result = subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    # The virtual environment's ninja need not be on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run("cmake", "-G", "Ninja", "-S", KERNELS, "-B", folder, "-DWKV_SANITIZE=ON", PATH=path)
    run("cmake", "--build", folder, PATH=path)
    return folder


@pytest.mark.parametrize("driver", ["driver", "step_driver"])
@pytest.mark.parametrize("isa", available_isas())
def test_sanitizers(build, isa, driver):
    output = run(build / driver, WKV_ISA=isa, ASAN_OPTIONS=ASAN_OPTIONS, UBSAN_OPTIONS="print_stacktrace=1")
    assert output.split()[0] == isa


def test_builds_share_no_symbols(build):
    objects = sorted(build.rglob("*_simd.cpp.o"))
    assert objects
    for path in objects:
        symbols = [line.split() for line in run("nm", "--defined-only", path).splitlines()]
        # Weak code is what the linker merges across builds; strong symbols must carry the build's namespace.
        assert not [name for *_, kind, name in symbols if kind in "Ww"], path
        isa = path.parts[len(build.parts) + 1].removeprefix("wkv_").removesuffix(".dir")
        assert all(isa in name for *_, kind, name in symbols if kind in "TDBR"), path
