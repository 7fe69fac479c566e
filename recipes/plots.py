"""The curves of a training run: every logged number by step, training and evaluation in one panel."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Of a log entry's numbers, those that are no curve.
NOT_CURVES = (
    "step",
    "epoch",
    "runtime",
    "preparation_time",
    "total_flos",
    "samples_per_second",
    "steps_per_second",
    "num_tokens",
)
COLUMNS = 2


def curves(log_history: list[dict], path: Path, title: str, names: tuple[str, ...] = ()) -> None:
    """Write a PNG of a Trainer's `log_history`: a panel for the loss and each other number, or for `names` alone.

    `x` (training) and `eval_x` share the panel x. The file appears complete or not at all.
    """
    lines = {}
    for entry in log_history:
        for key, value in entry.items():
            if isinstance(value, int | float) and not key.endswith(NOT_CURVES) and not key.startswith("train_"):
                panel = lines.setdefault(key.removeprefix("eval_"), {})
                panel.setdefault("held out" if key.startswith("eval_") else "training", []).append(
                    (entry["step"], value)
                )
    names = names or tuple(sorted(lines, key=lambda name: (name != "loss", name)))
    names = [name for name in names if name in lines] or ["loss"]
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(5 * columns, 2.3 * rows), dpi=90)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        draw(axis, name, lines.get(name, {}))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    plt.close(figure)
    temporary.replace(path)


def draw(axis, name: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    colours = {"training": "#7f9fc6", "held out": "#c0504d"}
    for label, points in lines.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, colours[label], label=label, marker="o" if len(points) < 60 else None, markersize=3)
        axis.annotate(
            f"{values[-1]:.4g}", points[-1], xytext=(0, 5), textcoords="offset points", ha="right", fontsize=8
        )
    axis.set_title(name.replace("_", " "), fontsize=9)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axis.legend(fontsize=7, frameon=False)
