"""How transformers' own loader of GGUF files, `from_pretrained(..., gguf_file=...)`, reads RWKV-6 and RWKV-7.

It looks up functions in three dictionaries: from metadata to a configuration, from a configuration to transforms of
tensors, from a list of tokens to a tokenizer. Each is filled when the module that has it is loaded.
"""

from functools import partial
from pathlib import Path

import torch
from transformers.core_model_loading import WeightConverter, _IdentityOp
from transformers.integrations.gguf.dequant import dequantize

from . import gguf_format
from .auto import architecture
from .gguf_tables import TABLES, Table, fields_of, scale_of, table_of, take_apart
from .loading import OnlyRead


def register(part: str) -> None:
    """Fill one of the dictionaries: that of the "config", "conversion" or "tokenizer" mapping."""
    if part == "config":
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

        GGUF_CONFIG_ARCHS.update(dict.fromkeys(TABLES, _config))
    elif part == "conversion":
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

        GGUF_ARCHS.update({name: partial(_transforms, table) for name, table in TABLES.items()})
    else:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES

        from .models.gguf_vocabulary import world_tokenizer

        GGUF_TOKENIZER_TYPES["rwkv"] = world_tokenizer


def _config(metadata: dict, tensor_names: tuple[str, ...]) -> dict:
    model_type = table_of(metadata).generation.model_type
    return {"model_type": model_type, "architectures": [architecture(model_type)]} | fields_of(metadata)


def _transforms(table: Table, config) -> list[WeightConverter]:
    return [_FromGguf(table, config)]


class _FromGguf(OnlyRead, WeightConverter):
    """Renames any tensor of a file, and makes of it the parameters that it holds.

    Dequantising and casting, which transformers adds to a converter as operations, happen in `convert` as well: as
    operations they can deal with one parameter a tensor, and with the causal language model's names only.
    """

    def __init__(self, table: Table, config):
        super().__init__(r"^(.+)$", r"\1", [_IdentityOp()])
        self.table, self.sizes = table, table.sizes(config.to_dict())
        self.ours = {row.official: row for row in table.generation.rows}
        # Of the file, read with its first tensor; shared by the copies of this transform, one a tensor.
        self.metadata = {}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        rows, block = self.table.find(source_key)
        if not rows:
            return source_key, None
        return self.ours[rows[0].official].ours.replace("*", block), self.source_patterns[0]

    def convert(self, layer_name: str, hf_quantizer=None, **kwargs) -> dict[str, torch.Tensor]:
        (((tensor,),), ((source,),)) = self.materialize_tensors().values(), self.layer_targets.values()
        rows, block = self.table.find(source)
        if not self.metadata:
            self.metadata |= gguf_format.read(Path(hf_quantizer.header.path)).metadata
        if tensor.dtype == torch.uint8:
            tensor = dequantize(tensor, hf_quantizer.header.ggml_types[source]).unflatten(0, (tensor.shape[0], -1))
        if (scale := scale_of(self.metadata, rows[0], block)) > 1:
            tensor = tensor * scale
        ours = [self.ours[row.official] for row in rows]
        parts = take_apart(tensor.to(hf_quantizer.dtype), rows, [row.our_axes for row in ours], self.sizes)
        names = [row.ours.replace("*", block) for row in ours]
        # In the base model parameters go without its name.
        prefix = len(names[0]) - len(layer_name)
        return {name[prefix:]: part for name, part in zip(names, parts, strict=True)}
