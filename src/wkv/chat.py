"""Text as it comes, and a conversation whose whole history is the state of the model.

Letters: B batch, T tokens.
"""

import copy
import re
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .sampling import CHAT, generate_arguments

# A character of UTF-8 has four bytes at most, and so many tokens.
LONGEST_CHARACTER = 4


class TextStream(BaseStreamer, StoppingCriteria):
    """Hands text to `write` while `generate` runs: whole characters only, and nothing from the first stop string on.

    Pass it to `generate` as `streamer`, and as a stopping criterion where there are stop strings. `stopped` tells
    whether one came; `prompt_tokens`, `tokens`, `prefill_seconds` and `decode_seconds` what it took. One row only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], stop: Sequence[str] = ()):
        self.tokenizer, self.write, self.stop = tokenizer, write, [s for s in stop if s]
        self.pending, self.held, self.stopped = [], "", False
        self.prompt_tokens = self.tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.clock = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take ids: those of the prompt first, (1, T), then one by one, (1,)."""
        if not self.prompt_tokens:
            self.prompt_tokens = value.numel()
            self.clock = time.perf_counter()
            return
        seconds = time.perf_counter() - self.clock
        if self.tokens:
            self.decode_seconds = seconds - self.prefill_seconds
        else:
            self.prefill_seconds = seconds
        self.tokens += 1
        if self.stopped:
            return
        self.pending += value.flatten().tolist()
        text = self._decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) < LONGEST_CHARACTER:
            return
        self.pending = []
        self._emit(text)

    def end(self) -> None:
        """Write what was held back."""
        if not self.stopped:
            self._emit(self._decode(self.pending))
            self.write(self.held)
        self.pending, self.held = [], ""

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """Whether each row (B,) is done."""
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)

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


class Chat:
    """A conversation in the format of the RWKV World and G1 models; the history lives in the state alone.

    `settings` are those of `wkv.sampling.RwkvSampling`, by default the official ones for chat. The answer ends at a
    blank line; id 0 never comes. Source: the chat programs of RWKV-LM and the `rwkv` package.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str = "", **settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, {**CHAT, **settings}
        self.system = one_paragraph(system)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.cache = None
        self.unread = self._encode(f"System: {self.system}\n\n") if self.system else []

    def reply(self, message: str, write: Callable[[str], object], max_new_tokens: int = 500) -> TextStream:
        """Answer a message: text goes to `write` as it comes; returns the stream with its counts and times."""
        ids = self.unread + self._encode(f"User: {one_paragraph(message)}\n\nAssistant:")
        seen = self.cache.get_seq_length() if self.cache is not None else 0
        tokens = torch.tensor([ids], device=self.model.device)
        stream = TextStream(self.tokenizer, write, ["\n\n"])
        before = copy.deepcopy(self.cache)
        try:
            output = self._generate(tokens, seen, stream, max_new_tokens)
        # An interrupt as well: what was read of this turn must not stay in the state.
        except BaseException:
            self.cache = before
            raise
        self.cache = output.past_key_values
        # The last token was sampled but not read yet.
        self.unread = output.sequences[0, -1:].tolist()
        if not stream.stopped:
            self.unread += self._encode("\n\n")
        return stream

    def _generate(self, tokens: torch.Tensor, seen: int, stream: TextStream, max_new_tokens: int):
        return self.model.generate(
            tokens,
            attention_mask=tokens.new_ones(1, seen + tokens.shape[1]),
            past_key_values=self.cache,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([stream]),
            max_new_tokens=max_new_tokens,
            suppress_tokens=[0],
            return_dict_in_generate=True,
            **generate_arguments(self.tokenizer, tokens.shape[1], **self.settings),
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def one_paragraph(text: str) -> str:
    """A message without blank lines: in the training text a blank line ends a turn."""
    return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n")).strip()
