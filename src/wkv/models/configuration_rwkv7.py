"""Configuration of RWKV-7 ("Goose"), in the keys that the rest of the ecosystem reads."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

GROUP_NORM_EPS = 64e-5

# Keys of other implementations that select speed or training options there and change nothing here.
_WITHOUT_EFFECT = (
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "hidden_ratio",
    "initializer_range",
    "use_l2warp",
)
# Keys of other implementations with the only value this architecture has.
_FIXED = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None}


def correct_world_tokens(config, vocab_size: int) -> None:
    """Correct bos 1 and eos 2 in a (generation) config of the World vocabulary, where they are the bytes 0x00 and 0x01.

    Some published folders name them, and generation with them never stops: the vocabulary ends texts with id 0.
    """
    if vocab_size == 65536 and (config.bos_token_id == 1 or config.eos_token_id == 2):
        logger.info("config names the bytes 0x00/0x01 as bos/eos; the World vocabulary ends texts with id 0")
        config.bos_token_id, config.eos_token_id = 0, 0 if config.eos_token_id == 2 else config.eos_token_id


@strict
class Rwkv7Config(PreTrainedConfig):
    """The sizes of an RWKV-7 model.

    `hidden_size` C is the residual width, `num_heads * head_dim` the attention width A (`attention_hidden_size`, C when
    not given), `intermediate_size` the inner width of the channel-mix (4 C when not given). The four `*_low_rank_dim`
    default to the official rule `max(32, 32 * round(c * C^p / 32))`. `group_norm_eps` is 64e-5 in every official model,
    whatever the head size. `max_position_embeddings` is the trained context length; nothing in the model depends on it.

    Raises `ValueError` for sizes that do not fit together and for options of other implementations that would change
    the result.
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_attention_heads": "num_heads"}

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_dim: int = 64
    num_heads: int | None = None
    attention_hidden_size: int | None = None
    intermediate_size: int | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    norm_eps: float = 1e-5
    group_norm_eps: float | None = None
    max_position_embeddings: int = 4096
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    auto_map: dict[str, str] = field(default_factory=dict)

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
        for key, only in _FIXED.items():
            if (value := kwargs.pop(key, only)) != only:
                raise ValueError(f"config field `{key}` is {value!r}; RWKV-7 here is defined for {only!r} only")
        widths = kwargs.pop("value_dim", None)
        width = self.attention_hidden_size or self.hidden_size
        if widths is not None and set(widths if isinstance(widths, list) else [widths]) != {width}:
            raise ValueError(f"config field `value_dim` is {widths}; every layer must have the attention width {width}")
        # Flash-linear-attention and its readers scale the epsilon with the head size; they write no group_norm_eps.
        if self.group_norm_eps is None and "fuse_norm" in kwargs:
            self.group_norm_eps = self.head_dim * self.norm_eps
        if "hidden_ratio" in kwargs and self.intermediate_size is None:
            self.intermediate_size = round(self.hidden_size * kwargs["hidden_ratio"])
        for key in _WITHOUT_EFFECT:
            kwargs.pop(key, None)
        if self.auto_map.get("AutoConfig", "").rpartition(".")[2] != type(self).__name__:
            self.auto_map = {}
        correct_world_tokens(self, self.vocab_size)

    def validate_architecture(self) -> None:
        """Part of the checks that run after construction."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")
        ranks = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
        for name in (*sizes, *ranks):
            if getattr(self, name) < 1:
                raise ValueError(f"config field `{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("norm_eps", "group_norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"config field `{name}` must not be negative, got {getattr(self, name)}")
        if self.num_heads * self.head_dim != self.attention_hidden_size:
            raise ValueError(
                f"num_heads ({self.num_heads}) x head_dim ({self.head_dim}) must equal "
                f"attention_hidden_size ({self.attention_hidden_size})"
            )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: RWKV-7 has separate embeddings and head")

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of every block, by transformers' naming."""
        return ["rwkv"] * self.num_hidden_layers

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of the WKV state of one layer and one sequence: (H, K, V)."""
        return self.num_heads, self.head_dim, self.head_dim

    def validate_layer_type(self) -> None:
        """`rwkv` is our own layer type, registered in rwkv_cache; transformers' list does not know it."""
