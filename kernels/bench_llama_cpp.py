"""llama.cpp for `bench.py`, built from the source package of `llama-cpp-python`; its own converter reads our weights.

Source package, build and GGUF files lie in the cache folder; each is made once. The program is driven through that
package's own ctypes declarations.
"""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llama-cpp-python"
OUTPUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# The library alone, for this processor, without what needs a network or another program.
OPTIONS = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_NATIVE=ON", "LLAMA_OPENSSL=OFF"] + [
    f"LLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")
]


class MissingError(Exception):
    """What keeps llama.cpp from being measured, in a few words."""


def version() -> str:
    """The version of the source package that the constraints pin."""
    return re.search(rf"^{PACKAGE}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def home(cache: Path) -> Path:
    """The folder of source and build."""
    return cache / f"llama.cpp-{version()}"


def library(cache: Path) -> Path | None:
    """The built library, if it is there; this name, a link to the file, comes last in a build."""
    names = (home(cache) / "build" / "bin" / f"libllama{suffix}" for suffix in (".so", ".dylib"))
    return next((name for name in names if name.exists()), None)


def gguf_path(folder: Path, dtype: str) -> Path:
    """The GGUF file beside a saved folder."""
    return folder.with_name(f"{folder.name}-{OUTPUT_TYPES[dtype]}.gguf")


def build(cache: Path, say) -> None:
    """Fetch and compile llama.cpp, unless it is there; an interrupted build goes on where it stopped.

    Raises `MissingError`.
    """
    if library(cache):
        return
    if not shutil.which("cmake"):
        raise MissingError("not built: needs cmake")
    source, folder = home(cache) / "source", home(cache) / "build"
    if not source.exists():
        say(f"llama.cpp: fetching {PACKAGE} {version()}")
        _fetch(source)
    say(f"llama.cpp: compiling in {folder} (once, about two minutes on two cores)")
    options = [f"-D{option}" for option in OPTIONS]
    _run("cmake", "-S", source / "vendor" / "llama.cpp", "-B", folder, *options)
    _run("cmake", "--build", folder, "--target", "llama", "--parallel", str(os.cpu_count()))


def _fetch(source: Path) -> None:
    partial = source.with_name("source.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", PACKAGE)
    _run(*pip, "--constraint", ROOT / "constraints.txt", "--dest", partial, PACKAGE)
    (archive,) = partial.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    archive.unlink()
    (unpacked,) = partial.iterdir()
    unpacked.rename(source)
    partial.rmdir()


def convert(cache: Path, folder: Path, dtype: str, vocabulary: int, say) -> None:
    """Write the GGUF file of a saved folder with llama.cpp's own converter, unless it is there.

    The converter wants a vocabulary beside the weights; random weights get the numbers 1, 2, 3 ... as words.
    Raises `MissingError`.
    """
    file = gguf_path(folder, dtype)
    if file.exists():
        return
    say(f"llama.cpp: converting {folder.name} to {file.name}")
    words = folder / "rwkv_vocab_v20230424.txt"
    words.write_text("".join(f"{i} '{i}' {len(str(i))}\n" for i in range(1, vocabulary)))
    converter = home(cache) / "source" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    partial = file.with_suffix(".partial")
    _run(sys.executable, converter, folder, "--outtype", OUTPUT_TYPES[dtype], "--outfile", partial)
    partial.rename(file)


def _run(*command) -> None:
    """Run a program; its output goes to standard error when it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        print(result.stdout[-4000:], result.stderr[-4000:], sep="\n", file=sys.stderr)
        step = " ".join(Path(command[0]).name.split() + [str(part) for part in command[1:4]])
        raise MissingError(f"failed: `{step}`, exit code {result.returncode}")


class LlamaCpp:
    """A GGUF model run by llama.cpp, prompt and tokens as `llama-bench` submits them."""

    def __init__(self, cache: Path, gguf: Path, vocabulary: int, threads: int):
        self.vocabulary = vocabulary
        self.llama = llama = load(cache)
        self.quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self.quiet, None)
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(str(gguf).encode(), llama.llama_model_default_params())
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 4096, 512, 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama.llama_init_from_model(model, parameters) if model else None
        if not self.context:
            raise RuntimeError(f"{gguf}: llama.cpp cannot load it")
        self.next = None

    def prefill(self, ids: list[int]) -> float:
        """Run a prompt of T tokens; logits of its last position only."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        return self._forward(ids)

    def decode(self, count: int) -> float:
        """Continue greedily by `count` tokens from where the last call stopped."""
        return sum(self._forward([int(self.next.argmax())]) for _ in range(count))

    def logits(self, ids: list[int]) -> list[float]:
        """The first logits after a prompt."""
        self.prefill(ids)
        return self.next[:512].tolist()

    def _forward(self, ids: list[int]) -> float:
        import numpy

        tokens = (self.llama.llama_token * len(ids))(*ids)
        start = time.perf_counter()
        status = self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(tokens, len(ids)))
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        self.next = numpy.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))
        return seconds


def load(cache: Path):
    """The module `llama_cpp.llama_cpp` of the source package, on our build and without the rest of its package."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library(cache).parent)
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(home(cache) / "source" / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")
