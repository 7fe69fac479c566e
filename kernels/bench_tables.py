"""Numbers of `bench.py` as markdown."""

import platform
import statistics
from importlib import metadata
from pathlib import Path


def number(value: float) -> str:
    """Two significant digits or so."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def ratio(theirs: list[float], ours: list[float]) -> str:
    """How many times longer they take than we do, turn by turn: the median, smallest and largest."""
    values = [t / o for t, o in zip(theirs, ours, strict=False)]
    return f"{number(statistics.median(values))}x ({number(min(values))}-{number(max(values))})"


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


def version(name: str) -> str:
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
