"""Configuration of RWKV-4 ("Dove"), in the keys of transformers' own `rwkv`."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .rwkv_configuration import BlocksConfig


@strict
class RwkvConfig(BlocksConfig):
    """The sizes of an RWKV-4 model.

    `attention_hidden_size` is C when not given, `intermediate_size` 4 C.
    """

    model_type = "rwkv"
    base_model_tp_plan = BlocksConfig.base_model_tp_plan | {
        "blocks.*.attention.time_decay": "colwise",
        "blocks.*.attention.time_first": "colwise",
    }

    vocab_size: int = 50277
    context_length: int = 1024

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As transformers', but where `architecture_version` names another generation, a configuration of that one.

        Two forks of transformers call every generation `rwkv`. Raises `ValueError` for a version that is not known.
        """
        named = str(config_dict.get("architecture_version") or "4")
        version = named.removeprefix("rwkv")[:1]
        if version == "4":
            return super().from_dict(config_dict, **kwargs)
        if f"rwkv{version}" not in CONFIG_MAPPING:
            raise ValueError(f"config field `architecture_version` is {named}; RWKV-4, 5, 6 and 7 are known")
        fields = {key: value for key, value in config_dict.items() if key not in ("architecture_version", "model_type")}
        return CONFIG_MAPPING[f"rwkv{version}"].from_dict(fields, **kwargs)

    @property
    def state_shape(self) -> tuple[int, int]:
        """Shape of the WKV state of one layer and one sequence: (A, 3)."""
        return self.attention_hidden_size, 3
