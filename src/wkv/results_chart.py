"""The chart of `wkv eval`: accuracy, bits per byte, tokens per second, and memory against context length."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .results import Cell, Row, labels, rows

MOST_BARS = 24


class Series(NamedTuple):
    """What is drawn, by model: {label: cell} of accuracies and bits per byte, tokens a second, {tokens: bytes}."""

    accuracy: dict[str, dict[str, Cell]]
    bits_per_byte: dict[str, dict[str, Cell]]
    tokens_per_second: dict[str, float]
    cache: dict[str, dict[int, int]]
    process: dict[str, dict[int, int]]


def chart_series(all_results: Sequence[dict]) -> Series:
    """The figures that `draw_chart` draws."""
    names = labels(all_results)
    table = rows(all_results)
    accuracy = [row for row in table if row.is_share()]
    if len(accuracy) > MOST_BARS:
        # A group's own figure stands for its parts.
        measured = {row.task for row in accuracy}
        groups = [pair for results in all_results for pair in results.get("group_subtasks", {}).items()]
        inner = {part for group, parts in groups if group in measured for part in parts}
        accuracy = [row for row in accuracy if row.task not in inner]

    def by_model(chosen: list[Row]) -> dict[str, dict[str, Cell]]:
        return {
            name: {f"{row.task} {row.metric}": row.cells[i] for row in chosen if row.cells[i]}
            for i, name in enumerate(names)
        }

    facts = {name: results.get("wkv", {}) for name, results in zip(names, all_results, strict=True)}
    memory = {name: fact.get("memory_by_context") or {} for name, fact in facts.items()}
    return Series(
        by_model(accuracy),
        by_model([row for row in table if row.metric == "bits_per_byte"]),
        {name: fact["tokens_per_second"] for name, fact in facts.items() if fact.get("tokens_per_second")},
        {name: {int(n): m["cache_bytes"] for n, m in lengths.items()} for name, lengths in memory.items()},
        {name: {int(n): m["process_bytes"] for n, m in lengths.items()} for name, lengths in memory.items()},
    )


def draw_chart(series: Series, path: Path) -> None:
    """Write the PNG, complete or not at all."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    (accuracy, bits), (speed, memory) = figure.subplots(2, 2, width_ratios=(3, 2))
    colours = {name: f"C{number % 10}" for number, name in enumerate(series.accuracy)}
    _bars(accuracy, series.accuracy, colours, "accuracy, with 95 % confidence interval")
    accuracy.set_xlim(0, 1)
    _bars(bits, series.bits_per_byte, colours, "bits per byte (less is better)")
    names = list(series.tokens_per_second)
    bars = speed.barh(names, series.tokens_per_second.values(), 0.5, color=[colours[name] for name in names])
    speed.bar_label(bars, fmt="{:,.0f}", padding=3)
    speed.margins(x=0.15)
    speed.invert_yaxis()
    speed.set_title("tokens asked for a second")
    _draw_memory(memory, series, colours)
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=max(len(patches), 1))
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)


def _bars(axes, series: dict[str, dict[str, Cell]], colours: dict[str, str], title: str) -> None:
    """Horizontal bars: a group a label, a bar a model, a line for the interval."""
    labels = list(dict.fromkeys(label for cells in series.values() for label in cells))
    height = 0.8 / max(len(series), 1)
    for number, (name, cells) in enumerate(series.items()):
        places = [labels.index(label) + number * height for label in cells]
        axes.barh(places, [cell.value for cell in cells.values()], 0.9 * height, color=colours[name])
        known = [(at, cell) for at, cell in zip(places, cells.values(), strict=True) if cell.interval]
        axes.errorbar(
            [cell.value for _, cell in known],
            [at for at, _ in known],
            xerr=[cell.interval for _, cell in known],
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
    axes.set_yticks([at + 0.4 - 0.4 / max(len(series), 1) for at in range(len(labels))], labels, fontsize=8)
    axes.set_ylim(-0.6, max(len(labels), 3) - 0.2)
    axes.invert_yaxis()
    axes.set_title(title)


def _draw_memory(axes, series: Series, colours: dict[str, str]) -> None:
    axes.set_title("memory: process (line), state or cache (dashes)", fontsize=11)
    lengths = sorted({length for found in series.process.values() for length in found})
    if not lengths:
        axes.text(0.5, 0.5, "not measured", ha="center")
        return
    for name, colour in colours.items():
        for found, style in ((series.process[name], "o-"), (series.cache[name], "s--")):
            axes.plot(found.keys(), [nbytes / 1e6 for nbytes in found.values()], style, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="MB")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
