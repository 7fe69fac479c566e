"""Numbers of `bench.py` as markdown."""

import platform
import statistics
from importlib import metadata
from pathlib import Path

import bench_llama_cpp

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def number(value: float) -> str:
    """Two significant digits or so."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes in megabytes or gigabytes."""
    return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def ratio(theirs: list[float], ours: list[float]) -> str:
    """How many times longer they take than we do, turn by turn: the median, smallest and largest."""
    values = [t / o for t, o in zip(theirs, ours, strict=False)]
    spread = f" ({number(min(values))}-{number(max(values))})" if len(values) > 1 else ""
    return f"{number(statistics.median(values))}x{spread}"


def share(limit: list[float], ours: list[float]) -> str:
    """Which share of the machine's own speed ours reaches, turn by turn: the median."""
    return f", {statistics.median(x / o for x, o in zip(limit, ours, strict=False)):.0%}"


def line(*cells: str) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def heading(*cells: str) -> str:
    """The first two lines of a table."""
    return f"{line(*cells)}\n{line(*['---'] * len(cells))}"


def speed(tokens: int, theirs: list[float], ours: list[float] | None) -> str:
    """Tokens per second of the median turn, and how many times faster ours is."""
    text = number(tokens / statistics.median(theirs))
    return f"{text}: {ratio(theirs, ours)}" if ours else text


def column(name: str) -> str:
    """The head of a contender's column, with its version."""
    if name == "llama.cpp":
        return f"llama.cpp of `{bench_llama_cpp.PACKAGE}` {bench_llama_cpp.version()}"
    if name in ("Llama", "native RWKV-4"):
        return f"{name} in {_version('transformers')}"
    return _version(name)


def _version(name: str) -> str:
    """An installed distribution with its version."""
    try:
        return f"`{name}` {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"`{name}`"


def processor() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(text.split(":", 1)[1].strip() for text in lines if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
