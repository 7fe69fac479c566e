"""What the configurations of all RWKV generations share."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of flash-linear-attention's configurations: keys that select speed or training options there and change nothing here,
# and keys with the only value that these architectures have.
FLA_WITHOUT_EFFECT = (
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "hidden_ratio",
    "initializer_range",
    "use_l2warp",
)
FLA_FIXED = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None}


def correct_world_tokens(config, vocab_size: int) -> None:
    """Correct bos 1 and eos 2 in a (generation) config of the World vocabulary, where they are the bytes 0x00 and 0x01.

    Some published folders name them, and generation with them never stops: the vocabulary ends texts with id 0.
    """
    if vocab_size == 65536 and (config.bos_token_id == 1 or config.eos_token_id == 2):
        logger.info("config names the bytes 0x00/0x01 as bos/eos; the World vocabulary ends texts with id 0")
        config.bos_token_id, config.eos_token_id = 0, 0 if config.eos_token_id == 2 else config.eos_token_id


@strict
class GenericRwkvConfig(PreTrainedConfig):
    """Sizes and special tokens of any generation.

    `hidden_size` C is the residual width, `attention_hidden_size` A the width of the time-mix (C when not given),
    `intermediate_size` the inner width of the channel-mix. Raises `ValueError` for sizes that do not fit together and
    for options of other implementations that would change the result.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "blocks.*": "free_full_weight",
        "ln_out": "keep_full_weight",
    }
    # Sizes and epsilons that a generation adds.
    _sizes = ()
    _epsilons = ()
    # Keys of other implementations that select speed or training options there and change nothing here.
    _without_effect = ()
    # Keys of other implementations with the only value this architecture has.
    _fixed = {}
    # Keys of other implementations by their names here.
    _renamed = {}

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    attention_hidden_size: int | None = None
    intermediate_size: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    auto_map: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As transformers', from a config.json of any implementation."""
        return super().from_dict({cls._renamed.get(key, key): value for key, value in config_dict.items()}, **kwargs)

    def __post_init__(self, **kwargs):
        for key, only in self._fixed.items():
            if (value := kwargs.pop(key, only)) != only:
                raise ValueError(
                    f"config field `{key}` is {value!r}; {type(self).__name__} is defined for {only!r} only"
                )
        for key in self._without_effect:
            kwargs.pop(key, None)
        if self.auto_map.get("AutoConfig", "").rpartition(".")[2] != type(self).__name__:
            self.auto_map = {}
        correct_world_tokens(self, self.vocab_size)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the checks that run after construction."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "attention_hidden_size", "intermediate_size")
        for name in (*sizes, *self._sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"config field `{name}` must be at least 1, got {getattr(self, name)}")
        for name in self._epsilons:
            if getattr(self, name) < 0:
                raise ValueError(f"config field `{name}` must not be negative, got {getattr(self, name)}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: RWKV has separate embeddings and head")

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of every block, by transformers' naming."""
        return ["rwkv"] * self.num_hidden_layers

    @property
    def local_state_shape(self) -> tuple[int, ...]:
        """`state_shape` of the heads, in RWKV-4 channels, that this process has: under tensor parallelism a part.

        Raises `ValueError` where they cannot be shared out evenly.
        """
        size = getattr(getattr(self, "distributed_config", None), "tp_size", 1)
        heads, *rest = self.state_shape
        if heads % size:
            raise ValueError(f"tp_size={size} does not divide the {heads} heads (RWKV-4: channels) of the time-mix")
        return heads // size, *rest

    def validate_layer_type(self) -> None:
        """`rwkv` is our own layer type, registered in rwkv_cache; transformers' list does not know it."""


@strict
class BlocksConfig(GenericRwkvConfig):
    """What RWKV-4, 5 and 6 share.

    In float16, and only there, the residual stream is halved after every `rescale_every` blocks (0 or less: never) to
    stay in range; the result does not depend on it. `context_length` is the trained length; nothing depends on it.
    """

    attribute_map = {"max_position_embeddings": "context_length"}
    base_model_tp_plan = {
        "embeddings": "embedding_rowwise",
        "blocks.*.attention": "rwkv_heads",
        "blocks.*.attention.key": "colwise",
        "blocks.*.attention.value": "colwise",
        "blocks.*.attention.receptance": "colwise",
        "blocks.*.attention.output": "rowwise",
        "blocks.*.feed_forward.key": "colwise",
        "blocks.*.feed_forward.value": "rowwise",
        "blocks.*.feed_forward.receptance": "colwise_gather_output",
    }
    _epsilons = ("layer_norm_epsilon",)

    context_length: int = 4096
    layer_norm_epsilon: float = 1e-5
    rescale_every: int = 6

    def __post_init__(self, **kwargs):
        if self.attention_hidden_size is None:
            self.attention_hidden_size = self.hidden_size
        super().__post_init__(**kwargs)


@strict
class HeadedRwkvConfig(BlocksConfig):
    """What RWKV-5 and RWKV-6 share.

    `attention_hidden_size` A, C when not given, is made of heads of `head_size`; `intermediate_size` defaults to 3.5 C
    rounded down to a multiple of 32. The group norm has the epsilon 1e-5 `head_size_divisor`^2, whatever the head size.
    """

    _sizes = ("head_size", "head_size_divisor")
    # Some folders write the head size under this name, so it tells nothing.
    _without_effect = ("num_attention_heads",)

    head_size: int = 64
    head_size_divisor: int = 8

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = max(1, int(3.5 * self.hidden_size) // 32) * 32
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the checks that run after construction."""
        super().validate_architecture()
        if self.attention_hidden_size % self.head_size:
            raise ValueError(
                f"attention_hidden_size ({self.attention_hidden_size}) must be a multiple of "
                f"head_size ({self.head_size})"
            )

    @property
    def num_heads(self) -> int:
        """Heads of the time-mix, H."""
        return self.attention_hidden_size // self.head_size

    @property
    def group_norm_eps(self) -> float:
        """Epsilon of the group norm over the channels of a head."""
        return 1e-5 * self.head_size_divisor**2

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of the WKV state of one layer and one sequence: (H, K, V)."""
        return self.num_heads, self.head_size, self.head_size
