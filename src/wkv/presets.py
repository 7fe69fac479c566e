"""The settings that the official programs sample with; light to import, for the command line shows them."""

from typing import NamedTuple


class Preset(NamedTuple):
    """Settings of the official sampler; `wkv.sampling` makes arguments of `generate` and GenerationConfigs of them.

    `presence` and `frequency` are the penalties, whose counts fade by `decay` a token; with `free_digits`, repeated
    blanks and digits count nothing. With `forbids_end`, id 0 never comes.
    """

    temperature: float
    top_p: float
    presence: float
    frequency: float
    decay: float = 0.996
    free_digits: bool = False
    forbids_end: bool = True


PRESETS = {
    # The `rwkv` package's own defaults for free text.
    "text": Preset(1.0, 0.85, 0.2, 0.2, free_digits=True, forbids_end=False),
    # World and G1 models.
    "chat": Preset(1.0, 0.3, 0.5, 0.5),
    # RWKV-4 Raven.
    "raven": Preset(1.2, 0.5, 0.4, 0.4),
    # Behind a tuned initial state.
    "tuned": Preset(1.0, 0.2, 0.3, 0.3),
    # G0 and G1 models on mathematics and logic; repetition is no fault there, and the end is the model's to set.
    "reasoning": Preset(0.3, 0.3, 0.0, 0.0, forbids_end=False),
}
