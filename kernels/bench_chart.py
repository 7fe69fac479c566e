"""The chart of `bench.py`: decode speed and memory against the length of the context."""

from pathlib import Path

import bench_tables as tables

COLOURS = {"wkv": ("RWKV-7 in wkv", "#0b6e4f", "o"), "Llama": ("Llama in transformers", "#c1440e", "s")}


def draw(path: Path, contexts: tuple[int, ...], points: dict[tuple[str, int], tuple[float, int]]) -> None:
    """Write a PNG; `points` holds (model, context) -> (tokens per second, resident bytes)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=150, facecolor="white")
    ticks = [f"{length // 1024}k" if length >= 1024 else str(length) for length in contexts]
    titles = ("Decoding, tokens per second", "Resident memory of the process, GB")
    for panel, title, values in zip(panels, titles, (lambda p: p[0], lambda p: p[1] / 1e9), strict=True):
        for name, (label, colour, marker) in COLOURS.items():
            heights = [values(points[name, length]) for length in contexts]
            panel.plot(ticks, heights, color=colour, marker=marker, linewidth=2, label=label)
            # The curves of memory meet at the left, where numbers would cover each other.
            for x in range(0 if panel is panels[0] else len(heights) - 1, len(heights)):
                text, place = tables.number(heights[x]), {"xytext": (0, 7), "textcoords": "offset points"}
                panel.annotate(text, (x, heights[x]), ha="center", color=colour, **place)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("tokens of context")
        panel.margins(x=0.1, y=0.2)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="center left")
    figure.tight_layout()
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial)
    partial.rename(path)
    pyplot.close(figure)
