"""Results side by side: one table for the terminal and for markdown."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from .results import labels, rows

MARKDOWN_SPECIAL = re.compile(r"([|*_])")


class TextTable(NamedTuple):
    """A table of strings: a title, a header, and lines of as many cells."""

    title: str
    header: list[str]
    lines: list[list[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            # Figures are never cut short; the names of tasks and metrics may go on in the next line.
            table.add_column(name, justify="left" if number < 2 else "right", no_wrap=number >= 2, overflow="fold")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        marks = ["---", "---", *["---:"] * (len(self.header) - 2)]
        lines = [self.header, marks, *([MARKDOWN_SPECIAL.sub(r"\\\1", cell) for cell in line] for line in self.lines)]
        return f"**{self.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Four decimals, fewer for what is large."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"


def comparison_table(all_results: Sequence[dict]) -> TextTable:
    """Every metric of every task, then what it cost, one column a model."""
    lines = []
    for row in rows(all_results):
        arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
        counts = list(dict.fromkeys(str(c.documents) for c in row.cells if c and c.documents is not None))
        lines.append([row.task, row.metric + arrow, " / ".join(counts), *map(cell_text, row.cells)])
    facts = [results.get("wkv", {}) for results in all_results]
    for label, key, shown in (
        ("tokens asked for", "tokens_asked", "{:,}".format),
        ("tokens computed", "tokens_computed", "{:,}".format),
        ("seconds", "seconds", "{:,.1f}".format),
        ("tokens asked for a second", "tokens_per_second", "{:,.0f}".format),
        ("peak memory of the process", "peak_memory_bytes", size),
    ):
        lines.append(["", label, "", *("" if fact.get(key) is None else shown(fact[key]) for fact in facts)])
    contexts = [fact.get("memory_by_context") or {} for fact in facts]
    for length in sorted({length for context in contexts for length in context}, key=int):
        found = [context.get(length, {}) for context in contexts]
        cells = [f"{size(m['cache_bytes'])}, {size(m['process_bytes'])}" if m else "" for m in found]
        lines.append(["", f"state or cache, process: {int(length):,} tokens", "", *cells])
    return TextTable("Comparison", ["task", "metric", "documents", *labels(all_results)], lines)


def cell_text(cell) -> str:
    if cell is None:
        return ""
    return number(cell.value) if cell.interval is None else f"{number(cell.value)} ± {number(cell.interval)}"


def notes(all_results: Sequence[dict]) -> list[str]:
    """What a reader must know to read the table."""
    found = ["± is half of the 95 % confidence interval, 1.96 standard errors by lm-eval."]
    for name, results in zip(labels(all_results), all_results, strict=True):
        facts = results.get("wkv", {})
        if results.get("config", {}).get("limit") is not None:
            found.append(f"{name}: not every document; --limit {results['config']['limit']}.")
        shots = facts.get("settings", {}).get("num_fewshot")
        if fixed := [task for task, used in results["n-shot"].items() if shots is not None and used != shots]:
            found.append(f"{name}: not with --num-fewshot {shots}, for their own number is fixed: {', '.join(fixed)}.")
        if facts.get("settings", {}).get("leading_token") and results.get("config", {}).get("model") == "hf":
            found.append(f"{name}: without --leading-token, which is for RWKV models alone.")
        if facts.get("resumed"):
            found.append(f"{name}: an interrupted run went on; tokens, seconds and memory are of its last part.")
    return found
