"""The official RWKV sampler as a logits processor of transformers.

transformers divides logits by the temperature before it cuts the tail; RWKV's own programs cut first, at temperature 1,
and sharpen what is left. Settings that people quote for RWKV models mean the second order.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

# Settings of the official demos: free continuation, and chat with a World or G1 model.
CONTINUATION = {"temperature": 1.0, "top_p": 0.85, "presence": 0.2, "frequency": 0.2}
CHAT = {"temperature": 1.0, "top_p": 0.3, "presence": 0.5, "frequency": 0.5}
PENALTY_DECAY = 0.996


class RwkvSampling(LogitsProcessor):
    """Repetition penalties, then the top-p cut at temperature 1, then the temperature.

    Every token generated so far loses `presence` plus `frequency` times its count, where an occurrence counts
    `decay` less with each later token. Tokens less likely than the one with which the sum of the descending
    probabilities first reaches `top_p` are dropped. `temperature` must be positive; ids in
    `unpenalized` may repeat. Source: the pipeline and chat programs of the `rwkv` package and RWKV-LM.
    """

    def __init__(
        self,
        prompt_length: int,
        temperature: float,
        top_p: float,
        presence: float = 0.0,
        frequency: float = 0.0,
        decay: float = PENALTY_DECAY,
        unpenalized: tuple[int, ...] = (),
    ):
        if temperature <= 0:
            raise ValueError(
                f"temperature is {temperature}: it must be positive (for greedy text pass do_sample=False)"
            )
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p is {top_p}: it must lie between 0 and 1")
        self.prompt_length, self.temperature, self.top_p = prompt_length, temperature, top_p
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self.unpenalized = list(unpenalized)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits (B, V) after the ids (B, T), prompt included, to logits to sample from."""
        scores = scores.float()
        generated = input_ids[:, self.prompt_length :]
        if generated.shape[1] and (self.presence or self.frequency):
            age = torch.arange(generated.shape[1] - 1, -1, -1, device=scores.device)
            counts = torch.zeros_like(scores).scatter_add(1, generated, (self.decay**age).expand(generated.shape))
            penalty = self.presence * (counts > 0) + self.frequency * counts
            penalty[:, self.unpenalized] = 0
            scores = scores - penalty
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

    The official programs let spaces, tabs and digits repeat without a penalty; so does this.
    """
    if temperature == 0 or top_p == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    free = (tokenizer.encode(text) for text in " \t0123456789")
    sampler = RwkvSampling(
        prompt_length, temperature, top_p, unpenalized=tuple(ids[0] for ids in free if len(ids) == 1), **settings
    )
    # The sampler stands for transformers' own temperature and cuts, which are switched off.
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "logits_processor": LogitsProcessorList([sampler]),
    }
