"""The official RWKV sampler as a logits processor of transformers.

transformers divides logits by the temperature before it cuts the tail; RWKV's own programs cut first, at temperature 1,
and sharpen what is left. Settings that people quote for RWKV models mean the second order.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

# Settings of the official demos for chat with a World or G1 model.
CHAT = {"temperature": 1.0, "top_p": 0.3, "presence": 0.5, "frequency": 0.5}
PENALTY_DECAY = 0.996
# Repetitions of a token whose text is a part of this are not counted.
UNCOUNTED = " \t0123456789"


class RwkvSampling(LogitsProcessor):
    """Repetition penalties, then the top-p cut at temperature 1, then the temperature.

    Every token generated so far loses `presence` plus `frequency` times its count, where an occurrence counts
    `decay` less with each later token; ids in `uncounted` lose `presence` only. Tokens less likely than the one with
    which the sum of the descending probabilities first reaches `top_p` are dropped. `temperature` must be positive.
    Source: the pipeline of the `rwkv` package.
    """

    def __init__(
        self,
        prompt_length: int,
        temperature: float,
        top_p: float,
        presence: float = 0.0,
        frequency: float = 0.0,
        decay: float = PENALTY_DECAY,
        uncounted: Sequence[int] = (),
    ):
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}: it must be positive (greedy text is do_sample=False)")
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p is {top_p}: it must lie between 0 and 1")
        self.prompt_length, self.temperature, self.top_p = prompt_length, temperature, top_p
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self.uncounted = list(uncounted)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits (B, V) after the ids (B, T), prompt included, to logits to sample from."""
        scores = scores.float()
        generated = input_ids[:, self.prompt_length :]
        age = torch.arange(generated.shape[1] - 1, -1, -1, device=scores.device)
        counts = torch.zeros_like(scores).scatter_add(1, generated, (self.decay**age).expand(generated.shape))
        penalties = self.presence * (counts > 0)
        counts[:, self.uncounted] = 0
        scores = scores - penalties - self.frequency * counts
        probabilities = scores.softmax(-1)
        descending = probabilities.sort(descending=True).values
        # The first position where the sum reaches top_p; rounding may keep the whole sum just below 1.
        last = (descending.cumsum(-1) < self.top_p).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
        cut = probabilities < descending.gather(1, last)
        return scores.masked_fill(cut, float("-inf")) / self.temperature


def generate_arguments(
    tokenizer: PreTrainedTokenizerBase, prompt_length: int, temperature: float, top_p: float, **settings
) -> dict:
    """Arguments of `generate` for the official sampler; temperature 0 or top_p 0 is greedy, as officially.

    `settings` are the penalties of `RwkvSampling`.
    """
    if temperature == 0 or top_p == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    texts = {UNCOUNTED[i:j] for i in range(len(UNCOUNTED)) for j in range(i + 1, len(UNCOUNTED) + 1)}
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    uncounted = [ids[0] for ids in encoded if len(ids) == 1]
    sampler = RwkvSampling(prompt_length, temperature, top_p, uncounted=uncounted, **settings)
    # The sampler stands for transformers' own temperature and cuts, which are switched off.
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "logits_processor": LogitsProcessorList([sampler]),
    }
