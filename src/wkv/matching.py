"""Laying the tensors of a checkpoint over the table of its generation, and bringing each into the axes of another."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .layouts import Row, Shapes
from .tensor_files import CheckpointError


class Match(NamedTuple):
    """A checkpoint laid over a table: the size of every letter, the row of every tensor, and the unused tensors."""

    sizes: dict[str, int]
    rows: dict[str, tuple[Row, str]]
    unused: list[str]


def match(name: str, rows: tuple[Row, ...], shapes: Shapes, official: bool) -> Match:
    """Lay the tensors of a checkpoint, in official names or in those of the other column, over a table.

    Singleton axes may be missing, and low-rank matrices may be transposed, as in some safetensors mirrors. `rows` of
    the result maps each name to its row and block, in the order of blocks and table. `CheckpointError` names tensors
    that are unknown, missing or of the wrong shape.
    """
    table = {row.official if official else row.ours: row for row in rows}
    place = {row: number for number, row in enumerate(rows)}
    found, unused, unknown = {}, [], []
    for tensor in shapes:
        block = digits[1] if (digits := re.search(r"\.(\d+)\.", tensor)) else ""
        row = table.get(re.sub(r"\.\d+\.", ".*.", tensor, count=1))
        if row is None or (row.blocks == "first" and block != "0"):
            unknown.append(tensor)
        elif row.blocks == "later" and block == "0":
            unused.append(tensor)
        else:
            found[tensor] = row, block
    if unknown:
        raise CheckpointError(f"has tensors that {name} does not know: {_few(unknown)}")
    blocks = {int(block) for _, block in found.values() if block}
    L = len(blocks)
    if gaps := sorted(set(range(L)) - blocks):
        raise CheckpointError(f"has {L} blocks but none with the number {gaps[0]}")
    expected = _expected_names(table, L)
    if missing := sorted(expected - found.keys()):
        raise CheckpointError(f"lacks tensors of {name}: {_few(missing)}")
    axes = {tensor: (row.official_axes if official else row.our_axes).split() for tensor, (row, _) in found.items()}
    sizes = {"L": L} | _solve(axes, shapes)
    _check_shapes(axes, shapes, sizes)
    ordered = sorted(found.items(), key=lambda item: (int(item[1][1] or -1), place[item[1][0]]))
    return Match(sizes, dict(ordered), unused)


def _expected_names(table: dict[str, Row], L: int) -> set[str]:
    first_block = {"all": 0, "first": 0, "later": 1}
    return {
        name.replace("*", str(block))
        for name, row in table.items()
        for block in range(first_block[row.blocks], 1 if row.blocks == "first" or "*" not in name else L)
    }


def _check_shapes(axes: dict[str, list[str]], shapes: Shapes, sizes: dict[str, int]) -> None:
    for name, letters in axes.items():
        if not _fits(letters, shapes[name], sizes):
            wanted = tuple(_size(letter, sizes) for letter in letters)
            raise CheckpointError(
                f"tensor {name} has shape {shapes[name]}; the other tensors ask for ({', '.join(letters)}) = {wanted}"
            )
    if "H" in sizes:
        N = sizes.setdefault("N", sizes["A"] // sizes["H"])
        if sizes["A"] != sizes["H"] * N:
            raise CheckpointError(f"has {sizes['H']} heads of size {N}, the attention width is {sizes['A']}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _size(axis: str, sizes: dict[str, int]) -> int:
    """The size of an axis: 1, a letter, the length of a list of entries, or a product of these."""
    return math.prod(len(factor) if factor.islower() else sizes.get(factor, 1) for factor in axis.split("*"))


def _solve(axes: dict[str, list[str]], shapes: Shapes) -> dict[str, int]:
    """The size of each letter by majority, so that one misshapen tensor does not put the blame on the others."""
    votes = defaultdict(Counter)
    ranked = [name for name, letters in axes.items() if _rank(letters)]
    for name, letters in axes.items():
        if not _rank(letters):
            for letter, size in zip(*_aligned(letters, shapes[name]), strict=True):
                votes[letter][size] += 1
    sizes = {letter: _winner(counter) for letter, counter in votes.items()}
    for name in ranked:
        letters, shape = _aligned(axes[name], shapes[name])
        if letters:
            axis = _rank(letters)
            straight = all(_size(other, sizes) == n for other, n in zip(letters, shape, strict=True) if other != axis)
            found = (shape if straight else _turned(shape))[letters.index(axis)]
            votes[axis_factors(axis)[-1]][found // _size(axis, {})] += 1
    return {letter: _winner(counter) for letter, counter in votes.items()}


def _winner(votes: Counter) -> int:
    return votes.most_common(1)[0][0]


def _rank(letters: list[str]) -> str | None:
    """The axis of a low-rank matrix that is its rank, or a multiple of it."""
    return next((letter for letter in letters if letter.rpartition("*")[2].startswith("R")), None)


def _aligned(letters: list[str], shape: tuple[int, ...]) -> tuple[list[str], list[int]]:
    """The named axes with their sizes, singleton axes left out; nothing where the shape has another number of axes."""
    if len(shape) == len(letters):
        pairs = [pair for pair in zip(letters, shape, strict=True) if pair[0] != "1"]
        return [letter for letter, _ in pairs], [size for _, size in pairs]
    named, kept = [letter for letter in letters if letter != "1"], [size for size in shape if size != 1]
    return (named, kept) if len(named) == len(kept) else ([], [])


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _turned(shape: Iterable[int]) -> list[int]:
    """A shape with its last two axes exchanged."""
    shape = list(shape)
    return [*shape[:-2], *shape[:-3:-1]]


def _fits(letters: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    wanted = _squeezed(_size(letter, sizes) for letter in letters)
    return _squeezed(shape) == wanted or (_rank(letters) is not None and _squeezed(_turned(shape)) == wanted)


def axis_factors(axes: str) -> list[str]:
    """The letters and lists of axes in their order, without singleton axes and with products taken apart."""
    return [factor for axis in axes.split() for factor in axis.split("*") if factor != "1"]


def axes_shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape that axes such as "1 1 C" stand for."""
    return tuple(_size(axis, sizes) for axis in axes.split())


def sizes_of(axes: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes of the letters of a tensor's axes."""
    letters = {axis: axis_factors(axis)[-1] for axis in axes.split() if axis != "1"}
    return {
        letters[axis]: size // _size(axis, {}) for axis, size in zip(axes.split(), shape, strict=True) if axis != "1"
    }


def rearrange(tensor: torch.Tensor, source: str, target: str, sizes: dict[str, int]) -> torch.Tensor:
    """Bring a tensor from one order of axes to another, e.g. from "C Rw" to "Rw C" or "wkvrg R C" to "C rwkvg*R"."""
    stored = stored_as(tensor, axes_shape(source, sizes))
    if source == target:
        return stored.contiguous()
    factors, wanted = axis_factors(source), axis_factors(target)
    # A list of entries may be in another order, but it is the same axis.
    keys = ["".join(sorted(factor)) for factor in factors]
    order = [keys.index("".join(sorted(factor))) for factor in wanted]
    stored = stored.reshape(axes_shape(" ".join(factors), sizes)).permute(order)
    for dim, (place, factor) in enumerate(zip(order, wanted, strict=True)):
        if factors[place] != factor:
            stored = stored.index_select(dim, torch.tensor([factors[place].index(entry) for entry in factor]))
    return stored.reshape(axes_shape(target, sizes)).contiguous()


def stored_as(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Reshape where only singleton axes differ, else transpose: the two ways in which files deviate from the table."""
    return (tensor if _squeezed(tensor.shape) == _squeezed(shape) else tensor.transpose(-1, -2)).reshape(shape)
