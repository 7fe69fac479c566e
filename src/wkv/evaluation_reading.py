"""A tree of texts through an RWKV model: every stretch once, from the state that the one before it ended in.

Stretches of a batch stand one after the other in a row, each with a state of its own: none is padded.

Letters: B stretches, N positions, C channels, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .evaluation_tree import Stretch, prefix_tree, want
from .models.rwkv_cache import carried_cache, write_state
from .models.rwkv_linear import linear_of_few_rows
from .models.rwkv_sequences import SLICE_TOKENS, SequencePlan

# Logits that exist at the same time: 64 MiB of them.
LOGITS = 2**24
MAX_ROWS = 512


class Limits(NamedTuple):
    """How many tokens and how many states run through the model at a time."""

    tokens: int
    rows: int


class Part(NamedTuple):
    """Some stretches, or a slice of a long one from its token `offset` on, and the hidden states (N, C) there.

    `cache` is the state at the stretches' ends, a row for each; None before the last part, and where nobody needs it.
    """

    stretches: list[Stretch]
    offset: int
    hidden: torch.Tensor
    cache: Cache | None


def limits_by_memory(model: PreTrainedModel) -> Limits:
    """What fits into a part of the memory that is free."""
    device, config = model.device, model.config
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    # About what a block keeps of a token, in float32.
    token = 4 * (24 * config.hidden_size + 4 * config.intermediate_size)
    state = 4 * config.num_hidden_layers * (2 * config.hidden_size + int(np.prod(config.state_shape)))
    # The states of a batch, of those it came from and of those waiting to be continued.
    return Limits(max(1, min(SLICE_TOKENS, free // 4 // token)), max(1, min(MAX_ROWS, free // 16 // state)))


@dataclass(eq=False)
class Kept:
    """A state of some rows, for as long as stretches wait that go on from it."""

    cache: Cache | None
    rows: int
    waiting: int


class Waiting(NamedTuple):
    """A stretch, and the row of a state that it goes on from."""

    stretch: Stretch
    kept: Kept
    row: int


def read_tree(
    model: PreTrainedModel,
    texts: Sequence[np.ndarray],
    root: Stretch,
    limits: Limits,
    start: Cache | None = None,
    keep_states: bool = False,
) -> Iterator[Part]:
    """Run every stretch of the tree through the model, in batches of stretches that are as deep in the tree.

    `start` is the state (of one row) that all texts begin with; with `keep_states` every last part has its cache. The
    states of at most `limits.rows` rows are kept, and of one batch more.
    """
    tokens, kept_rows = limits.tokens, 0
    first = Kept(start, 0, len(root.children))
    # By depth.
    levels = [[Waiting(child, first, 0) for child in root.children]]
    while any(levels):
        depth = _next_level(levels, tokens, kept_rows >= limits.rows)
        level = levels[depth]
        batch = [level.pop() for _ in range(_batch_size(level, tokens, limits.rows))]
        run = _run(model, texts, batch, tokens, keep_states)
        try:
            part = next(run)
        except torch.OutOfMemoryError:
            if tokens == 1:
                raise
            tokens //= 2
            level += batch
            continue
        yield part
        for part in run:
            yield part
        for _, kept, _ in batch:
            kept.waiting -= 1
            kept_rows -= kept.rows if not kept.waiting else 0
        parents = [row for row, (stretch, *_) in enumerate(batch) if stretch.children]
        if parents:
            cache = part.cache
            if len(parents) < len(batch):
                cache = take_rows(model, [(cache, row) for row in parents])
            kept = Kept(cache, len(parents), sum(len(batch[row].stretch.children) for row in parents))
            kept_rows += kept.rows
            if depth + 1 == len(levels):
                levels.append([])
            levels[depth + 1] += [
                Waiting(s, kept, i) for i, row in enumerate(parents) for s in batch[row].stretch.children
            ]


def _length(waiting: Waiting) -> int:
    return len(waiting.stretch)


def _next_level(levels: list[list[Waiting]], tokens: int, full: bool) -> int:
    """The deepest level with a whole batch, else the first that has any; when memory is full the last that has any."""
    some = [depth for depth, level in enumerate(levels) if level]
    if full:
        return some[-1]
    return next((depth for depth in reversed(some) if sum(map(_length, levels[depth])) >= tokens), some[0])


def _batch_size(level: list[Waiting], tokens: int, rows: int) -> int:
    """How many of the stretches, from the last on, run together: as many as fit, and one of any length."""
    sums = accumulate(map(_length, reversed(level)))
    return max(1, sum(1 for total in islice(sums, rows) if total <= tokens))


def _run(model, texts, batch: list[Waiting], tokens: int, keep_states: bool) -> Iterator[Part]:
    """One forward for several stretches, or for each slice of a single one."""
    stretches = [waiting.stretch for waiting in batch]
    keep_states = keep_states or any(stretch.children for stretch in stretches)
    N = sum(map(len, stretches))
    continues = batch[0].kept.cache is not None
    cache = None
    if continues:
        # A lone token goes through the compiled step, which writes in place.
        cache = take_rows(model, [(kept.cache, row) for _, kept, row in batch], decode=N == 1)
    elif keep_states or tokens < N:
        cache = carried_cache(model.config)
    ids = np.concatenate([texts[s.text][s.begin : s.end] for s in stretches])
    ids = torch.from_numpy(ids).to(model.device)[None]  # (1, N)
    if len(batch) > 1:
        plan = _plan(list(map(len, stretches)), continues, model.device)
        with torch.no_grad():
            hidden = model.base_model.run_blocks(cache, ids, plan)
        yield Part(stretches, 0, hidden[0], cache if keep_states else None)
        return
    for offset in range(0, N, tokens):
        part = ids[:, offset : offset + tokens]
        with torch.no_grad():
            outputs = model.base_model(part, past_key_values=cache, use_cache=cache is not None)
        last = keep_states and offset + tokens >= N
        yield Part(stretches, offset, outputs.last_hidden_state[0], cache if last else None)


def _plan(lengths: list[int], continues: bool, device: torch.device) -> SequencePlan:
    """Of stretches in one row, each of which goes on from a row of the cache, or from zeros."""
    B, bounds = len(lengths), torch.tensor([0, *accumulate(lengths)], device=device)
    # What `source` and `last` index is [a carried token of each stretch or zeros once, zeros, all tokens].
    first = (B if continues else 1) + 1
    source = torch.arange(first - 1, first - 1 + sum(lengths), device=device)
    each = torch.arange(B, device=device)
    source[bounds[:-1]] = each if continues else 0
    return SequencePlan(
        source=source[None], last=bounds[1:] - 1 + first, cu_seqlens=bounds, first=each, final=slice(None)
    )


def take_rows(model: PreTrainedModel, rows: Sequence[tuple[Cache, int]], decode: bool = False) -> Cache:
    """A new cache of rows of others, (cache, row) each, in that order; `decode` makes it one for `generate`.

    The other kind is not written to in place: a forward then copies no state.
    """
    groups = [(cache, [row for _, row in group]) for cache, group in groupby(rows, key=itemgetter(0))]
    taken = DynamicCache(config=model.config) if decode else carried_cache(model.config)
    for index in range(model.config.num_hidden_layers):
        layers = [(cache.layers[index], torch.tensor(held, device=model.device)) for cache, held in groups]
        att_shift, ffn_shift = (_rows([(layer.conv_states[i], held) for layer, held in layers]) for i in range(2))
        S = _rows([(layer.recurrent_states[0], held) for layer, held in layers])
        write_state(taken, index, 0, att_shift[..., -1], S)
        write_state(taken, index, 1, ffn_shift[..., -1])
    return taken


def _rows(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Rows of several tensors, in one; each value is copied once."""
    first, n = parts[0][0], sum(len(rows) for _, rows in parts)
    out = first.new_empty(n, *first.shape[1:])
    begin = 0
    for tensor, rows in parts:
        torch.index_select(tensor, 0, rows, out=out[begin : begin + len(rows)])
        begin += len(rows)
    return out


class Scores:
    """Sums of the log-probabilities of the texts' tokens from `firsts` on, and whether each was the most likely one.

    A text is a request's context and continuation, `firsts` the lengths of the contexts, at least 1.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[np.ndarray], firsts: Sequence[int]):
        self.model, self.texts = model, texts
        # The last token of a text is predicted and not read.
        self.read = [text[:-1] for text in texts]
        self.root = prefix_tree(self.read)
        want(self.root, [first - 1 for first in firsts], list(map(len, self.read)))
        self.sums, self.greedy = np.zeros(len(texts)), np.ones(len(texts), dtype=bool)
        self.tokens_read = 0

    def run(self, limits: Limits, start: Cache | None = None) -> Iterator[list[int]]:
        """Read the texts; yields the numbers of those whose sums are finished, as they are."""
        for part in read_tree(self.model, self.read, self.root, limits, start):
            yield self._score(part)

    def _score(self, part: Part) -> list[int]:
        N = len(part.hidden)
        self.tokens_read += N
        places, targets, owners, finished = [], [], [], []
        where = accumulate(map(len, part.stretches), initial=0)
        for stretch, place in zip(part.stretches, where, strict=False):
            begin = stretch.begin + part.offset
            for text, first, last in stretch.wanted:
                first, end = max(first, begin), min(last + 1, begin + N)
                if first < end:
                    places.append(np.arange(first, end) - begin + place)
                    targets.append(self.texts[text][first + 1 : end + 1])
                    owners.append(np.full(end - first, text))
                    if end == len(self.read[text]):
                        finished.append(text)
        if places:
            log_p, most_likely = predictions(self.model, part.hidden, np.concatenate(places), np.concatenate(targets))
            owners = np.concatenate(owners)
            np.add.at(self.sums, owners, log_p)
            np.logical_and.at(self.greedy, owners, most_likely)
        return finished


def predictions(model, hidden: torch.Tensor, places: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the tokens `targets` (N,) by the hidden states (n, C) at `places` (N,).

    The second result is whether each is the most likely one. Logits are made once for each place.
    """
    places, which = np.unique(places, return_inverse=True)
    log_p, most_likely = np.empty(len(targets)), np.empty(len(targets), dtype=bool)
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS // model.config.vocab_size)
    for begin in range(0, len(places), chunk):
        here = np.flatnonzero((which >= begin) & (which < begin + chunk))
        rows = torch.from_numpy(places[begin : begin + chunk]).to(hidden.device)
        with torch.no_grad():
            logits = linear_of_few_rows(head, hidden[rows]).float()  # (chunk, V)
            row = torch.from_numpy(which[here] - begin).to(logits.device)
            target = torch.from_numpy(targets[here]).to(logits.device)
            log_p[here] = (logits[row, target] - logits.logsumexp(-1)[row]).double().cpu().numpy()
            most_likely[here] = (logits.argmax(-1)[row] == target).cpu().numpy()
    return log_p, most_likely
