"""Configuration of RWKV-6 ("Finch"), in the keys of the `rwkv6` repositories on the Hub."""

from huggingface_hub.dataclasses import strict

from .rwkv_configuration import FLA_FIXED, FLA_WITHOUT_EFFECT, HeadedRwkvConfig


@strict
class Rwkv6Config(HeadedRwkvConfig):
    """The sizes of an RWKV-6 model.

    `time_mix_extra_dim` and `time_decay_extra_dim` are the ranks of the token shift's and of the decay's dependence on
    the token: 32 and 64 when not given, twice that from a `hidden_size` of 4096 on.
    """

    model_type = "rwkv6"
    base_model_tp_plan = HeadedRwkvConfig.base_model_tp_plan | {
        "blocks.*.attention.gate": "colwise",
        "blocks.*.attention.decay_rank": "rwkv_copied_to_heads",
        "blocks.*.attention.time_decay": "rowwise",
        "blocks.*.attention.time_decay_w2": "rowwise",
        "blocks.*.attention.time_faaaa": "colwise",
        "blocks.*.attention.ln_x.weight": "colwise",
        "blocks.*.attention.ln_x.bias": "colwise",
    }
    _sizes = (*HeadedRwkvConfig._sizes, "time_mix_extra_dim", "time_decay_extra_dim")
    _without_effect = (*HeadedRwkvConfig._without_effect, *FLA_WITHOUT_EFFECT)
    _fixed = FLA_FIXED | {"expand_k": 1, "expand_v": 1}
    _renamed = {
        "gate_low_rank_dim": "time_decay_extra_dim",
        "norm_eps": "layer_norm_epsilon",
        "proj_low_rank_dim": "time_mix_extra_dim",
    }

    time_mix_extra_dim: int | None = None
    time_decay_extra_dim: int | None = None

    def __post_init__(self, **kwargs):
        factor = 2 if self.hidden_size >= 4096 else 1
        self.time_mix_extra_dim = self.time_mix_extra_dim or 32 * factor
        self.time_decay_extra_dim = self.time_decay_extra_dim or 64 * factor
        # Flash-linear-attention tells the heads' number instead of their size.
        if heads := kwargs.pop("num_heads", None):
            self.head_size = (self.attention_hidden_size or self.hidden_size) // heads
        super().__post_init__(**kwargs)
