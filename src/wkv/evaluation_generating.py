"""Texts that go on until a stop string, in batches; what their contexts have in common is read once.

Letters: B rows, T tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from .evaluation_reading import Limits, read_tree, take_rows
from .evaluation_tree import prefix_tree

MAX_GEN_TOKS = 256
# Rows of a batch where memory allows more: they wait for the longest.
ROWS = 32


def generate_all(lm, contexts: list[list[int]], options: list[dict], numbers: list[int]) -> Iterator[list]:
    """Batches of (number, text) as they are done, those of equal options together. Raises ValueError for beams."""
    usual = getattr(lm.model.generation_config, "num_beams", None) or 1
    if beams := [n for option in options if (n := option.get("num_beams") or usual) > 1]:
        raise ValueError(f"num_beams={beams[0]}: beams are not searched here; leave it out, or use --model hf")
    groups = {}
    for i, option in enumerate(options):
        groups.setdefault(repr(sorted(option.items())), []).append(i)
    for group in groups.values():
        some = [contexts[i] for i in group]
        for batch, states in _batches(lm, some):
            texts = _generate(lm, [some[i] for i in batch], states, options[group[0]])
            yield [(numbers[group[i]], text) for i, text in zip(batch, texts, strict=True)]


def _batches(lm, contexts: Sequence[list[int]]) -> Iterator[tuple[list[int], Cache | None]]:
    """Numbers of contexts, and the states (B rows) after all their tokens but the last; None before the first."""
    lm.tokens_asked += sum(map(len, contexts)) - len(contexts)
    limits = lm.limits([len(ids) for ids in contexts])
    rows = min(limits.rows, ROWS if lm.batch_size == "auto" else lm.batch_size)
    empty = [i for i, ids in enumerate(contexts) if len(ids) == 1]
    for begin in range(0, len(empty), rows):
        batch = empty[begin : begin + rows]
        yield batch, None if lm.start is None else take_rows(lm.model, [(lm.start, 0)] * len(batch), decode=True)
    which = [i for i, ids in enumerate(contexts) if len(ids) > 1]
    if not which:
        return
    texts = [np.array(contexts[i][:-1]) for i in which]
    root = prefix_tree(texts, stop_at_ends=True)
    for part in read_tree(lm.model, texts, root, Limits(limits.tokens, rows), lm.start, keep_states=True):
        lm.tokens_computed += len(part.hidden)
        if part.cache is None:
            continue
        ending = [(row, which[end]) for row, stretch in enumerate(part.stretches) for end in stretch.ends]
        for begin in range(0, len(ending), rows):
            held, batch = zip(*ending[begin : begin + rows], strict=True)
            yield list(batch), take_rows(lm.model, [(part.cache, row) for row in held], decode=True)


def _generate(lm, contexts: list[list[int]], states: Cache | None, options: dict) -> list[str]:
    kwargs = normalize_gen_kwargs(options, MAX_GEN_TOKS)
    until = handle_stop_sequences(kwargs.pop("until"), eos=lm.tokenizer.decode(lm.eot_token_id))
    if not kwargs["do_sample"]:
        kwargs.pop("temperature", None)
    new = kwargs.pop("max_gen_toks")
    T = max(map(len, contexts))
    # Only the last token of each is read: before it stands what samplers look at.
    ids = torch.zeros(len(contexts), T, dtype=torch.long, device=lm.device)  # (B, T)
    for row, context in enumerate(contexts):
        ids[row, T - len(context) :] = torch.tensor(context)
    if states is not None:
        for layer in states.layers:
            layer.advance(T - 1)
    stop = StopStrings(lm.tokenizer, until, T)
    with torch.no_grad():
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=states,
            max_length=kwargs.pop("max_length", T + new),
            stopping_criteria=StoppingCriteriaList([stop]),
            pad_token_id=lm.eot_token_id,
            **kwargs,
        )
    texts = []
    for row in out[:, T:].tolist():
        # All tokens after the one that ends a text are padding.
        length = row.index(lm.eot_token_id) + 1 if lm.eot_token_id in row else len(row)
        lm.tokens_asked += length
        lm.tokens_computed += length
        texts.append(_text(lm, row, until))
    return texts


def _text(lm, ids: list[int], until: list[str]) -> str:
    """The answer among the generated ids: what follows the end of thinking, up to the first stop string."""
    end = lm.think_end_token
    if isinstance(end, int) and end in ids:
        ids = ids[len(ids) - ids[::-1].index(end) :]
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    if isinstance(end, int):
        return postprocess_generated_text(text.lstrip(), until, None)
    return postprocess_generated_text(text, until, end)


class StopStrings(StoppingCriteria):
    """Ends each row by itself, where its new text holds one of the strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_tokens: int):
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens
        self.strings = [s for s in strings if s]
        # A token is one byte at least: a string that the last one completes is within so many.
        self.tail = max((len(s.encode()) for s in self.strings), default=0)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        new = input_ids[:, max(self.prompt_tokens, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(new.tolist())
        done = [any(s in text for s in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)
