"""Configuration of RWKV-5 ("Eagle"), in the keys of the `rwkv5` repositories on the Hub."""

from huggingface_hub.dataclasses import strict

from .rwkv_configuration import HeadedRwkvConfig


@strict
class Rwkv5Config(HeadedRwkvConfig):
    """The sizes of an RWKV-5 model, and what the versions 5.0, 5.1 and 5.2 differ in.

    `use_gate` is False in 5.0. With `decay_per_head`, in 5.0 and 5.1, decay and bonus have one value a head instead of
    one a channel. With `bonus_is_log` the bonus is stored as its logarithm, `time_first`, instead of `time_faaaa`.
    """

    model_type = "rwkv5"

    use_gate: bool = True
    decay_per_head: bool = False
    bonus_is_log: bool = False

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """By heads, as far as this version has the parameters."""
        names = ["time_decay", "time_first" if self.bonus_is_log else "time_faaaa", "ln_x.weight", "ln_x.bias"]
        if self.use_gate:
            names.append("gate")
        return super().base_model_tp_plan | {f"blocks.*.attention.{name}": "colwise" for name in names}
