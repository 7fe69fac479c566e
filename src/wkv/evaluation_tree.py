"""What texts have in common, as a tree: each stretch of tokens that several texts begin with stands in it once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# A stretch is shared only where that saves so many tokens: reading it apart from what follows is a forward of its own.
LEAST_SAVING = 16


@dataclass(eq=False, slots=True)
class Stretch:
    """The tokens `begin` to `end` of a text, and of all texts that go on from there.

    `wanted` are the positions whose predictions are asked for, (request, first, last) with both ends included; `ends`
    the texts whose last token is in this stretch.
    """

    text: int
    begin: int
    end: int
    parent: "Stretch | None" = None
    children: list["Stretch"] = field(default_factory=list)
    wanted: list[tuple[int, int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.end - self.begin


def prefix_tree(texts: Sequence[np.ndarray], stop_at_ends: bool = False) -> Stretch:
    """The root, an empty stretch, of the tree of the texts, each of at least one token; equal texts end together.

    With `stop_at_ends` a stretch ends wherever a text does, so that the state there can be had.
    """
    # Big-endian bytes are ordered as the tokens are.
    keys = [text.astype(">u4").tobytes() for text in texts]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    root = Stretch(0, 0, 0)
    path, before = [root], None
    for index in order:
        text = texts[index]
        if before is not None and keys[index] == keys[before]:
            path[-1].ends.append(index)
            continue
        common = 0 if before is None else _common(texts[before], text)
        below = None
        while path[-1].end > common:
            below = path.pop()
        if path[-1].end < common:
            middle = Stretch(below.text, path[-1].end, common, children=[below])
            path[-1].children[-1] = middle
            below.begin = common
            path.append(middle)
        leaf = Stretch(index, common, len(text), ends=[index])
        path[-1].children.append(leaf)
        path.append(leaf)
        before = index
    _dissolve(root, stop_at_ends)
    return root


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def _dissolve(root: Stretch, stop_at_ends: bool) -> None:
    """Prepend stretches that save too little to each of those that follow, from the root on, and name the parents."""
    todo = [root]
    while todo:
        stretch = todo.pop()
        undecided, stretch.children = stretch.children, []
        while undecided:
            child = undecided.pop()
            following = child.children
            saving = len(child) * (len(following) - 1)
            if not following or saving >= LEAST_SAVING or (stop_at_ends and child.ends):
                child.parent = stretch
                stretch.children.append(child)
                todo.append(child)
                continue
            for grandchild in following:
                grandchild.begin = child.begin
            following[0].ends += child.ends
            undecided += following


def want(root: Stretch, firsts: Sequence[int], lengths: Sequence[int]) -> None:
    """Ask for the predictions of the texts' tokens from `firsts` on, text i being request i."""
    todo = [root]
    while todo:
        last = todo.pop()
        todo += last.children
        for index in last.ends:
            stretch, end = last, lengths[index]
            while stretch is not None and end > firsts[index]:
                begin = max(stretch.begin, firsts[index])
                if begin < end:
                    stretch.wanted.append((index, begin, end - 1))
                end, stretch = min(end, stretch.begin), stretch.parent
