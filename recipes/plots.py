"""The curve of a training run: loss by step, and held-out bits per byte where they were measured."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def loss_curve(log_history: list[dict], path: Path, title: str) -> None:
    """Write a PNG of a Trainer's `log_history`: training loss in nats a token, `eval_bits_per_byte` below it."""
    losses = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_bits_per_byte"]) for entry in log_history if "eval_bits_per_byte" in entry]
    panels = [("training loss (nats a token)", losses, "#9db8d9")]
    if held_out:
        panels.append(("held-out bits per byte", held_out, "#c0504d"))
    figure, axes = plt.subplots(len(panels), 1, sharex=True, squeeze=False, figsize=(6, 2.4 * len(panels)), dpi=90)
    for axis, (label, points, colour) in zip(axes[:, 0], panels, strict=True):
        steps, values = zip(*points, strict=True) if points else ((), ())
        axis.plot(steps, values, color=colour, marker="o" if len(points) < 60 else None, markersize=3)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if values:
            axis.annotate(
                f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(0, 6), textcoords="offset points", ha="right"
            )
    if losses:
        ordered = sorted(loss for _, loss in losses)
        axes[0, 0].set_ylim(ordered[0] - 0.2, ordered[int(0.97 * len(ordered))] + 0.2)
    axes[-1, 0].set_xlabel("optimizer step")
    axes[0, 0].set_title(title, fontsize=10)
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    plt.close(figure)
    temporary.replace(path)
