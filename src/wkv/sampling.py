"""The official RWKV sampler as a logits processor of transformers.

transformers divides logits by the temperature before it cuts the tail; RWKV's own programs cut first, at temperature 1,
and sharpen what is left. Settings that people quote for RWKV models mean the second order.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from .presets import PRESETS, Preset

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
        decay: float = PRESETS["text"].decay,
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


def preset(name: str, tokenizer: PreTrainedTokenizerBase, prompt_length: int, **changes) -> dict:
    """Arguments of `generate` for a row of PRESETS: `model.generate(**inputs, **preset("chat", tokenizer, length))`.

    `prompt_length` is the width of `input_ids`; `changes` replace single settings. The penalties are counted from there
    on, so a call of `generate` needs arguments of its own. Raises ValueError for another name.
    """
    return generate_arguments(tokenizer, prompt_length, named_preset(name)._replace(**changes))


def named_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: one of {', '.join(PRESETS)} is expected")
    return PRESETS[name]


def generation_config(name: str, **fields) -> GenerationConfig:
    """What of a row of PRESETS transformers can do by itself, for the `generation_config.json` of a model's folder.

    Temperature and top-p, in the order of transformers, and the forbidden id 0; penalties that fade need `preset`.
    """
    row = named_preset(name)
    more = {"suppress_tokens": [0]} if row.forbids_end else {}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sampling = {"do_sample": True, "temperature": row.temperature, "top_p": row.top_p, "top_k": 0}
    return GenerationConfig(**{**ids, **sampling, **more, **fields})


def generate_arguments(tokenizer: PreTrainedTokenizerBase, prompt_length: int, settings: Preset) -> dict:
    """Arguments of `generate` for the official sampler; temperature 0 or top_p 0 is greedy, as officially."""
    forbidden = {"suppress_tokens": [0] if settings.forbids_end else None}
    if settings.temperature == 0 or settings.top_p == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **forbidden}
    uncounted = _blanks_and_digits(tokenizer) if settings.free_digits else []
    sampler = RwkvSampling(prompt_length, *settings[:5], uncounted=uncounted)
    # The sampler stands for transformers' own temperature and cuts, which are switched off.
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "logits_processor": LogitsProcessorList([sampler]),
        **forbidden,
    }


def _blanks_and_digits(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = {UNCOUNTED[i:j] for i in range(len(UNCOUNTED)) for j in range(i + 1, len(UNCOUNTED) + 1)}
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return [ids[0] for ids in encoded if len(ids) == 1]
