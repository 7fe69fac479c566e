"""Configuration of RWKV-7 ("Goose"), in the keys that the rest of the ecosystem reads."""

from huggingface_hub.dataclasses import strict

from .rwkv_configuration import FLA_FIXED, FLA_WITHOUT_EFFECT, GenericRwkvConfig

GROUP_NORM_EPS = 64e-5


@strict
class Rwkv7Config(GenericRwkvConfig):
    """The sizes of an RWKV-7 model.

    `hidden_size` C is the residual width, `num_heads * head_dim` the attention width A (`attention_hidden_size`, C when
    not given), `intermediate_size` the inner width of the channel-mix (4 C when not given). The four `*_low_rank_dim`
    default to the official rule `max(32, 32 * round(c * C^p / 32))`. `group_norm_eps` is 64e-5 in every official model,
    whatever the head size. `max_position_embeddings` is the trained context length; nothing in the model depends on it.

    Raises `ValueError` for sizes that do not fit together and for options of other implementations that would change
    the result.
    """

    model_type = "rwkv7"
    attribute_map = {"num_attention_heads": "num_heads"}
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }
    base_model_tp_plan = {
        "embeddings": "embedding_rowwise",
        "layers.*.attn": "rwkv_heads",
        "layers.*.attn.r_proj": "colwise",
        "layers.*.attn.k_proj": "colwise",
        "layers.*.attn.v_proj": "colwise",
        "layers.*.attn.o_proj": "rowwise",
        "layers.*.attn.w_lora": "rwkv_low_rank",
        "layers.*.attn.a_lora": "rwkv_low_rank",
        "layers.*.attn.v_lora": "rwkv_low_rank",
        "layers.*.attn.g_lora": "rwkv_low_rank",
        "layers.*.attn.k_k": "colwise",
        "layers.*.attn.k_a": "colwise",
        "layers.*.attn.r_k": "colwise",
        "layers.*.attn.g_norm.weight": "colwise",
        "layers.*.attn.g_norm.bias": "colwise",
        "layers.*.ffn.key": "colwise",
        "layers.*.ffn.value": "rowwise",
    }
    _sizes = ("head_dim", "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
    _epsilons = ("norm_eps", "group_norm_eps")
    _without_effect = FLA_WITHOUT_EFFECT
    _fixed = FLA_FIXED | {"embedding_layer_norm_fused": False, "head_size_divisor": 8}
    _renamed = {
        "context_length": "max_position_embeddings",
        "group_norm_epsilon": "group_norm_eps",
        "head_size": "head_dim",
        "layer_norm_epsilon": "norm_eps",
        "lora_rank_decay": "decay_low_rank_dim",
        "lora_rank_gate": "gate_low_rank_dim",
        "lora_rank_iclr": "a_low_rank_dim",
        "lora_rank_value_residual_mix": "v_low_rank_dim",
    }

    head_dim: int = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    norm_eps: float = 1e-5
    group_norm_eps: float | None = None
    max_position_embeddings: int = 4096

    def __post_init__(self, **kwargs):
        self._read_foreign_keys(kwargs)
        if self.attention_hidden_size is None:
            self.attention_hidden_size = self.num_heads * self.head_dim if self.num_heads else self.hidden_size
        if self.num_heads is None:
            self.num_heads = self.attention_hidden_size // max(1, self.head_dim)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.decay_low_rank_dim = self.decay_low_rank_dim or self._low_rank(1.8, 0.5)
        self.a_low_rank_dim = self.a_low_rank_dim or self._low_rank(1.8, 0.5)
        self.v_low_rank_dim = self.v_low_rank_dim or self._low_rank(1.3, 0.5)
        self.gate_low_rank_dim = self.gate_low_rank_dim or self._low_rank(0.6, 0.8)
        if self.group_norm_eps is None:
            self.group_norm_eps = GROUP_NORM_EPS
        super().__post_init__(**kwargs)

    def _low_rank(self, factor: float, power: float) -> int:
        return max(32, 32 * round(factor * self.hidden_size**power / 32))

    def _read_foreign_keys(self, kwargs: dict) -> None:
        """Take what other implementations write into config.json: translate it, drop it, or refuse it."""
        widths = kwargs.pop("value_dim", None)
        width = self.attention_hidden_size or self.hidden_size
        if widths is not None and set(widths if isinstance(widths, list) else [widths]) != {width}:
            raise ValueError(f"config field `value_dim` is {widths}; every layer must have the attention width {width}")
        # Flash-linear-attention and its readers scale the epsilon with the head size; they write no group_norm_eps.
        if self.group_norm_eps is None and "fuse_norm" in kwargs:
            self.group_norm_eps = self.head_dim * self.norm_eps
        if "hidden_ratio" in kwargs and self.intermediate_size is None:
            self.intermediate_size = round(self.hidden_size * kwargs["hidden_ratio"])

    def validate_architecture(self) -> None:
        """Part of the checks that run after construction."""
        super().validate_architecture()
        if self.num_heads * self.head_dim != self.attention_hidden_size:
            raise ValueError(
                f"num_heads ({self.num_heads}) x head_dim ({self.head_dim}) must equal "
                f"attention_hidden_size ({self.attention_hidden_size})"
            )

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of the WKV state of one layer and one sequence: (H, K, V)."""
        return self.num_heads, self.head_dim, self.head_dim
