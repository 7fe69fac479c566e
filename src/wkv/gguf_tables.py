"""RWKV-6 and RWKV-7 in the names of llama.cpp: one table a generation, used in both directions.

Letters of axes are those of `layouts`. Block 0 of a file of RWKV-7 has unused v0, v1 and v2, which llama.cpp asks for
with the rank of the in-context rate.
"""

import re
from typing import NamedTuple

import torch

from .gguf_format import Metadata
from .layouts import GENERATIONS, Generation, Row
from .matching import axis_factors, rearrange
from .tensor_files import CheckpointError


class Table(NamedTuple):
    """A generation in GGUF: the rows from official names, by name in the file, and what else a file has.

    The mixes of a block are `stacked`, name and parts in their order; old files do without. `keys` are the fields of
    the configuration by their key in the metadata.
    """

    generation: Generation
    rows: dict[str, Row]
    stacked: tuple[str, tuple[str, ...]]
    keys: dict[str, str]

    def find(self, name: str) -> tuple[list[Row], str]:
        """What a tensor of a file holds, several rows where it is a stack, and its block; no rows if it is unknown."""
        digits = re.match(r"blk\.(\d+)\.", name)
        starred = re.sub(r"^blk\.\d+\.", "blk.*.", name)
        stack, parts = self.stacked
        rows = [self.rows[one] for one in (parts if starred == stack else [starred]) if one in self.rows]
        return rows, digits[1] if digits else "0"

    def sizes(self, fields: dict) -> dict[str, int]:
        """The sizes of all letters, from the fields of a configuration."""
        sizes = {letter: fields[field] for letter, field in self.generation.fields.items() if field in fields}
        # There is no attention width of its own in these files.
        return sizes | {"A": sizes["C"], "H": sizes["C"] // sizes["N"]}


_NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.*.ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "head.weight": "output.weight",
    "blocks.*.ln1": "blk.*.attn_norm",
    "blocks.*.ln2": "blk.*.attn_norm_2",
    "blocks.*.att.ln_x": "blk.*.time_mix_ln",
    "blocks.*.att.time_faaaa": "blk.*.time_mix_first",
    "blocks.*.att.time_maa_w1": "blk.*.time_mix_w1",
    "blocks.*.att.time_maa_w2": "blk.*.time_mix_w2",
    "blocks.*.att.time_maa_": "blk.*.time_mix_lerp_",
    "blocks.*.att.time_": "blk.*.time_mix_",
    "blocks.*.att.x_": "blk.*.time_mix_lerp_",
    "blocks.*.att.": "blk.*.time_mix_",
    "blocks.*.ffn.time_maa_": "blk.*.channel_mix_lerp_",
    "blocks.*.ffn.x_": "blk.*.channel_mix_lerp_",
    "blocks.*.ffn.": "blk.*.channel_mix_",
}
# Low-rank matrices are turned; the mixes lose their singleton axes, and `r_k` its heads.
_AXES = {"C wkvrg*R": "wkvrg*R C", "wkvrg R C": "wkvrg C R", "blocks.*.att.r_k": "H*N"}
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
}


def _row(row: Row) -> Row:
    start = next(start for start in _NAMES if row.official.startswith(start))
    name = row.official.replace(start, _NAMES[start])
    letters = axis_factors(row.official_axes)
    turned = " ".join(reversed(letters)) if any(letter.startswith("R") for letter in letters) else " ".join(letters)
    axes = _AXES.get(row.official) or _AXES.get(row.official_axes) or turned
    leaf = "" if name.endswith((".weight", ".bias")) else ".weight"
    return Row(row.official, row.official_axes, name + leaf, axes, row.blocks)


def _table(version: str, mixes: str, keys: dict[str, str]) -> Table:
    generation = GENERATIONS[version]
    parts = tuple(f"blk.*.time_mix_lerp_{x}.weight" for x in mixes)
    rows = {row.ours: row for row in map(_row, generation.rows)}
    return Table(generation, rows, ("blk.*.time_mix_lerp_fused.weight", parts), _KEYS | keys)


TABLES = {
    "rwkv6": _table(
        "6",
        "wkvrg",
        {
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "wkv.head_size": "head_size",
            "time_mix_extra_dim": "time_mix_extra_dim",
            "time_decay_extra_dim": "time_decay_extra_dim",
        },
    ),
    "rwkv7": _table(
        "7",
        "rwkvag",
        {
            "attention.layer_norm_epsilon": "norm_eps",
            "wkv.head_size": "head_dim",
            "attention.decay_lora_rank": "decay_low_rank_dim",
            "attention.iclr_lora_rank": "a_low_rank_dim",
            "attention.value_residual_mix_lora_rank": "v_low_rank_dim",
            "attention.gate_lora_rank": "gate_low_rank_dim",
        },
    ),
}


def table_of(metadata: Metadata) -> Table:
    """The table of a file; `CheckpointError` for a model that is no RWKV-6 or RWKV-7."""
    architecture = metadata.get("general.architecture")
    if architecture not in TABLES:
        raise CheckpointError(f"is a GGUF file of {architecture!r}; read are {' and '.join(TABLES)}")
    return TABLES[architecture]


def fields_of(metadata: Metadata) -> dict[str, int | float]:
    """The configuration's fields that a file states."""
    table, architecture = table_of(metadata), metadata["general.architecture"]
    tokens = metadata.get("tokenizer.ggml.tokens", metadata.get(f"{architecture}.vocab_size", 0))
    try:
        fields = {field: metadata[f"{architecture}.{key}"] for key, field in table.keys.items()}
    except KeyError as error:
        raise CheckpointError(f"lacks the metadata {error.args[0]}") from None
    # Epsilons are float32 in the file.
    fields = {field: float(f"{value:.6g}") if isinstance(value, float) else value for field, value in fields.items()}
    return fields | {"vocab_size": len(tokens) if isinstance(tokens, list) else tokens}


def scale_of(metadata: Metadata, row: Row, block: str) -> int:
    """What a tensor is to be multiplied with: files of RWKV-6 may have two matrices halved in every so many blocks."""
    every = metadata.get(f"{metadata['general.architecture']}.rescale_every_n_layers", 0)
    halved = every and row.official in ("blocks.*.att.output.weight", "blocks.*.ffn.value.weight")
    return 2 ** (int(block) // every) if halved else 1


def take_apart(tensor: torch.Tensor, rows: list[Row], axes: list[str], sizes: dict[str, int]) -> list[torch.Tensor]:
    """The tensors that one of a file holds, in the `axes` of another layout; those of a stack do not share memory."""
    parts = [tensor] if len(rows) == 1 else [part.clone() for part in tensor.reshape(len(rows), -1)]
    return [rearrange(part, row.our_axes, target, sizes) for part, row, target in zip(parts, rows, axes, strict=True)]
