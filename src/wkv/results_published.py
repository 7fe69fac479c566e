"""Figures that others published (`eval/published.yaml`) beside ours."""

import difflib
import re
from collections.abc import Sequence

from .eval_tasks import published_figures
from .results import cell, model_name
from .results_tables import TextTable, cell_text, number

# A size (1.5b, 169m), a word or a number: rwkv7-goose-world3-1.5B holds all of RWKV-7 World 1.5B.
TOKEN = re.compile(r"\d+(?:\.\d+)?[mb](?![a-z])|[a-z]+|\d+(?:\.\d+)?")


def _by_model() -> dict[str, list[dict]]:
    models: dict[str, list[dict]] = {}
    for figure in published_figures():
        models.setdefault(figure["model"], []).append(figure)
    return models


def find_published(name: str) -> list[dict]:
    """The published figures of a model; `ValueError` if there are none."""
    models = _by_model()
    for known, figures in models.items():
        if known.casefold() == name.casefold():
            return figures
    near = difflib.get_close_matches(name, models, n=3) or sorted(models)
    raise ValueError(f"--published {name}: no figures of such a model; there are those of {', '.join(near)}")


def published_of(name: str) -> list[dict]:
    """The published figures of the one model whose every word, number and size are in `name`; none in doubt."""
    found = set(TOKEN.findall(name.casefold()))
    matches = [figures for known, figures in _by_model().items() if set(TOKEN.findall(known.casefold())) <= found]
    return matches[0] if len(matches) == 1 else []


def published_table(results: dict, figures: Sequence[dict]) -> TextTable | None:
    """Ours, published and their difference, for what both have; None if there is nothing.

    With other few-shot examples than ours, or nobody knows which, a figure is shown, but not subtracted.
    """
    lines = []
    for figure in figures:
        task, metric, source = figure["task"], figure["metric"], figure["source"]
        if (ours := cell(results, task, metric)) is None:
            continue
        shots, examples = results["n-shot"].get(task), figure.get("num_fewshot", 0)
        difference = f"{ours.value - figure['value']:+.4f}" if shots == examples else ""
        if not difference:
            source += f"; with {'an unknown number of' if examples is None else examples} examples, ours with {shots}"
        if figure["status"] != "read":
            source += " (quoted)"
        label = metric.removesuffix(",none")
        lines.append([task, label, cell_text(ours), number(figure["value"]), difference, source])
    if not lines:
        return None
    title = f"{model_name(results)} beside the published figures of {figures[0]['model']}"
    limit = results.get("config", {}).get("limit")
    if limit is not None:
        title += f" (ours: --limit {limit}, so not all of their documents)"
    return TextTable(title, ["task", "metric", "ours", "published", "difference", "source"], lines)
