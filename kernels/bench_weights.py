"""Random weights of the measured shapes, written once to the cache folder.

Letters: D residual width, L blocks, V vocabulary rows, F feed-forward width.
"""

import dataclasses
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The share of zeros among the feed-forward activations, as in trained models, that the weights are written for.
ZEROS = 0.86


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model: D, L, V, F, F of the Llama with as many parameters, the ranks of w, a, v, g; its dtype on disk.

    `official` keeps the weights as an official `.pth` as well, for the `rwkv` package; `version` is that of RWKV.
    """

    name: str
    width: int
    layers: int
    vocabulary: int
    feed_forward: int
    llama_feed_forward: int
    ranks: tuple[int, int, int, int] = (64, 64, 32, 128)
    dtype: str = "float32"
    official: bool = True
    version: str = "7"

    @property
    def value(self) -> int:
        """Weights of the feed-forward's second matrix: the rows that a zero activation spares."""
        return self.layers * self.width * self.feed_forward

    @property
    def blocks(self) -> int:
        """Weights of all matrices between embedding and head."""
        D, L = self.width, self.layers
        return L * (4 * D * D + 2 * D * sum(self.ranks)) - 2 * D * self.ranks[2] + 2 * self.value

    @property
    def head(self) -> int:
        return self.width * self.vocabulary


SHAPES = {
    "191m": Shape("191m", 768, 12, 65536, 3072, 2240),
    "1.5b": Shape("1.5b", 2048, 24, 65536, 8192, 0, (96, 96, 64, 256), "bfloat16", official=False),
    "tiny": Shape("tiny", 128, 2, 1024, 512, 448),
}
# The other generations at the width and depth of 191m, and of tiny.
FEED_FORWARD = {"4": 4.0, "5.2": 3.5, "6": 3.5}


def other_generations(shape: Shape) -> list[Shape]:
    """RWKV-4, 5.2 and 6 of the same width, depth and vocabulary."""
    return [
        dataclasses.replace(
            shape, name=f"L{shape.layers}-D{shape.width}", feed_forward=int(factor * shape.width), version=version
        )
        for version, factor in FEED_FORWARD.items()
    ]


def checkpoint_paths(shape: Shape, cache: Path) -> tuple[Path, Path]:
    """Where the weights of a shape lie: an official `.pth`, and a folder converted from it."""
    name = f"rwkv{shape.version}-{shape.name}"
    return cache / "weights" / f"{name}.pth", cache / "weights" / name


def is_written(shape: Shape, cache: Path) -> bool:
    """Whether the weights of a shape are there."""
    official, folder = checkpoint_paths(shape, cache)
    return folder.exists() and (official.exists() or not shape.official)


def write_checkpoint(shape: Shape, cache: Path) -> None:
    """Write the random weights of a shape."""
    import torch

    from wkv.checkpoints import convert

    official, folder = checkpoint_paths(shape, cache)
    official.parent.mkdir(parents=True, exist_ok=True)
    # What an interrupted run left.
    for leftover in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = official.with_suffix(".partial")
    torch.save(random_weights(shape), partial)
    partial.rename(official)
    convert(official, folder, tokenizer=False)
    if not shape.official:
        official.unlink()


def random_weights(shape: Shape) -> dict:
    """Weights with official names for which a share ZEROS of the feed-forward activations relu(x)^2 is zero.

    With 1 added to the bias of the norm before the feed-forward, a constant taken from a row of `ffn.key` lowers that
    hidden unit by D times the constant, whatever the token. Only in RWKV-7: before it, half of them are zero.
    """
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from oracle.official import random_official

    D, F, V, dtype = shape.width, shape.feed_forward, shape.vocabulary, getattr(torch, shape.dtype)
    ranks = {"6": (32, 64), "7": shape.ranks}.get(shape.version)
    weights = random_official(shape.version, L=shape.layers, C=D, N=64, V=V, F=F, ranks=ranks, dtype=dtype)
    if shape.version != "7":
        return weights
    deviations = statistics.NormalDist().inv_cdf(ZEROS)
    for layer in range(shape.layers):
        block = f"blocks.{layer}."
        key, mix = weights[block + "ffn.key.weight"].float(), weights[block + "ffn.x_k"].float().flatten()
        # A token's share 1 - mix and the share mix of the one before it; in such weights the two correlate by 1/4.
        variance = mix**2 + (1 - mix) ** 2 + 0.5 * mix * (1 - mix)
        spread = (key * weights[block + "ln2.weight"].float() * variance.sqrt()).norm(dim=1)
        weights[block + "ln2.bias"] = torch.ones(D, dtype=dtype)
        lowered = key - (key.mean(dim=1) + deviations * spread / D)[:, None]
        weights[block + "ffn.key.weight"] = lowered.to(dtype)
    return weights
