"""Text as it comes, and a conversation whose whole history is the state of the model.

Letters: B batch, T tokens.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .models.rwkv_chat_templates import CHAT_TEMPLATES
from .sampling import generate_arguments, named_preset
from .states import read_text

# A character of UTF-8 has four bytes at most, and so many tokens.
LONGEST_CHARACTER = 4


class TextStream(BaseStreamer, StoppingCriteria):
    """Hands text to `write` while `generate` runs: whole characters only, and nothing from the first stop string on.

    Pass it to `generate` twice, as streamer, for beginning and end, and as stopping criterion, for the tokens: a
    streamer hears of a token only when it is too late to stop. `stopped` tells whether a stop string came;
    `prompt_tokens`, `tokens`, `prefill_seconds` and `decode_seconds` what it took. One row only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], stop: Sequence[str] = ()):
        self.tokenizer, self.write, self.stop = tokenizer, write, [s for s in stop if s]
        self.pending, self.held, self.stopped = [], "", False
        self.prompt_tokens = self.tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.clock = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the ids of the prompt, (1, T); those that follow, (1,), are known already."""
        if not self.prompt_tokens:
            self.prompt_tokens = value.numel()
            self.clock = time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """Take the last of the ids (1, T); whether the row is done, (1,)."""
        seconds = time.perf_counter() - self.clock
        if self.tokens:
            self.decode_seconds = seconds - self.prefill_seconds
        else:
            self.prefill_seconds = seconds
        self.tokens += 1
        self.pending += input_ids[0, -1:].tolist()
        text = self._decode(self.pending)
        if not text.endswith("\ufffd") or len(self.pending) >= LONGEST_CHARACTER:
            self.pending = []
            self._emit(text)
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)

    def end(self) -> None:
        """Write what was held back."""
        if not self.stopped:
            self._emit(self._decode(self.pending))
            self.write(self.held)
        self.pending, self.held = [], ""

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _emit(self, text: str) -> None:
        text = self.held + text
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            self.write(text[: min(found)])
            return
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        self.write(text[: len(text) - keep])


class Format(NamedTuple):
    """How a conversation is written: by which template, what ends an answer, and the settings to sample it with."""

    user: str
    stop: str
    preset: str
    system: str = ""


# Of all but G1, id 0 never comes. A G1 answer may hold blank lines: there the next turn ends it, or id 0.
FORMATS = {
    "world": Format("User", "\n\n", "chat"),
    "g1": Format("User", "\n\nUser:", "chat"),
    "raven": Format(
        "Bob",
        "\n\n",
        "raven",
        "The following is a coherent verbose detailed conversation between a girl named Alice and her friend Bob. "
        "Alice is very intelligent, creative and friendly. Alice is unlikely to disagree with Bob, and Alice doesn't "
        "like to ask Bob questions. Alice likes to tell Bob a lot about herself and her opinions. Alice usually gives "
        "Bob kind, helpful and informative advices.",
    ),
}


def format_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The format whose template the tokenizer has; for another template raven with the 20B tokenizer, else world."""
    named = {template: name for name, template in CHAT_TEMPLATES.items()}
    return named.get(tokenizer.chat_template) or ("raven" if splits_blank_lines(tokenizer) else "world")


def splits_blank_lines(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a blank line is two tokens before a letter and one at the end, as in the 20B tokenizer alone."""
    inside, at_the_end = (len(tokenizer.encode(text, add_special_tokens=False)) for text in ("\n\na", "\n\n"))
    return (inside, at_the_end) == (3, 1)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that goes on. Models of the 20B tokenizer know a blank line before more text as two tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    newline, blank_line = (tokenizer.encode(one, add_special_tokens=False) for one in ("\n", "\n\n"))
    if ids[-1:] == blank_line and splits_blank_lines(tokenizer):
        ids[-1:] = 2 * newline
    return ids


class Chat:
    """A conversation in a format of FORMATS, by default the tokenizer's; the history lives in the state alone.

    `thinking` makes a G1 model think, or with False think an empty thought. `start` is a state to begin with, for
    instance a tuned one; it stays as it is. `settings` replace those of the preset, by default the format's. Every turn
    reads its own tokens only. Source: the chat programs of RWKV-LM and ChatRWKV.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        format: str | None = None,
        thinking: bool | None = None,
        start: Cache | None = None,
        preset: str | None = None,
        **settings,
    ):
        self.model, self.tokenizer, self.start = model, tokenizer, start
        name = format or format_of(tokenizer)
        if name not in FORMATS:
            raise ValueError(f"chat format {name!r}: one of {', '.join(FORMATS)} is expected")
        self.template, self.format = CHAT_TEMPLATES[name], FORMATS[name]
        if thinking is not None and name != "g1":
            raise ValueError(f"the format {name} has no thinking, g1 has")
        self.options = {} if thinking is None else {"enable_thinking": thinking}
        self.settings = named_preset(preset or self.format.preset)._replace(forbids_end=name != "g1", **settings)
        # A state to begin with stands for the system message.
        default = self.format.system if start is None else ""
        self.system = default if system is None else system
        self.reset()
        # What stands before an answer: "Assistant:", and the beginning of a thought.
        self.opening = self._turn("x").rpartition("\n\n")[2]

    def reset(self) -> None:
        """Forget the conversation."""
        self.resume(self.start)
        self.new = True

    def resume(self, cache: Cache | None) -> None:
        """Go on from a state between two turns, which stays as it is."""
        self.cache, self.unread, self.last, self.new = copy.deepcopy(cache), [], None, False

    def state(self) -> Cache | None:
        """The state after all that was said, to be saved; None when nothing was."""
        if self.unread:
            tokens = torch.tensor([self.unread], device=self.model.device)
            self.cache, self.unread = read_text(self.model, tokens, self.cache), []
        return self.cache

    def reply(self, message: str, write: Callable[[str], object], max_new_tokens: int = 500) -> TextStream:
        """Answer a message: text goes to `write` as it comes; returns the stream with its counts and times.

        An interrupted answer leaves the conversation as it was.
        """
        ids = self.unread + encode_prompt(self.tokenizer, self._turn(message))
        return self._answer(self.cache, ids, write, max_new_tokens)

    def retry(self, write: Callable[[str], object], max_new_tokens: int = 500) -> TextStream:
        """Answer the last message once more, from the state before it. Raises ValueError when there is none."""
        if self.last is None:
            raise ValueError("there is no answer to give again")
        return self._answer(*self.last, write, max_new_tokens)

    def _turn(self, message: str) -> str:
        messages = [{"role": "user", "content": message}]
        if self.new and self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=True, tokenize=False, **self.options
        )

    def _answer(self, before: Cache | None, ids: list[int], write: Callable, max_new_tokens: int) -> TextStream:
        """Read the ids behind the state `before`, which stays as it is, and write an answer."""
        written = []

        def show(text: str) -> None:
            written.append(text)
            write(text)

        stream = TextStream(self.tokenizer, show, [self.format.stop])
        cache = copy.deepcopy(before) if before is not None else DynamicCache(config=self.model.config)
        tokens = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            tokens,
            attention_mask=tokens.new_ones(1, int(cache.get_seq_length()) + len(ids)),
            past_key_values=cache,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([stream]),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **generate_arguments(self.tokenizer, len(ids), self.settings),
        )
        self.cache, self.last, self.new = output.past_key_values, (before, ids), False
        self._close_turn(int(output.sequences[0, -1]), "".join(written), stream.stopped)
        return stream

    def _close_turn(self, last: int, text: str, stopped: bool) -> None:
        """Set what the next turn reads first, so that the state then stands behind a blank line.

        `last`, the last token of the answer, was sampled, but not read yet.
        """
        blank_line = encode_prompt(self.tokenizer, "\n\n")
        if not stopped:
            self.unread = blank_line if last == 0 else [last, *blank_line]
        elif self.format.stop == "\n\n":
            self.unread = [last]
        else:
            # The state has begun the next turn already: this one is read again, as far as it goes.
            before, ids = self.last
            self.cache, self.unread = before, ids + encode_prompt(self.tokenizer, text + "\n\n")
            self.state()
