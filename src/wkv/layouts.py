"""The names and shapes of tensors on disk: one table a generation, used in both directions.

"Official" is the flat layout of the files that the RWKV project publishes, "ours" the layout of a Hub folder.
Letters: V vocabulary rows, C residual width, A attention width, H heads of size N (A = H*N), F channel-mix width,
L blocks, Rw Ra Rv Rg ranks of the low-rank pairs (decay, in-context rate, value residual, gate), 1 a singleton axis.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from copy import copy
from typing import NamedTuple

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .tensor_files import CheckpointError

Shapes = dict[str, tuple[int, ...]]


class Row(NamedTuple):
    """A tensor in both layouts; `*` in a name is the block, `blocks` tells which have it ("all", "first", "later")."""

    official: str
    official_axes: str
    ours: str
    our_axes: str
    blocks: str = "all"


class Generation(NamedTuple):
    """A version of RWKV: its table and the configuration fields of its letters."""

    name: str
    model_type: str
    rows: tuple[Row, ...]
    fields: dict[str, str]


def _affine(official: str, ours: str, axis: str, blocks: str = "all") -> tuple[Row, Row]:
    return tuple(Row(f"{official}.{leaf}", axis, f"{ours}.{leaf}", axis, blocks) for leaf in ("weight", "bias"))


RWKV7 = Generation(
    "RWKV-7",
    "rwkv7",
    (
        Row("emb.weight", "V C", "model.embeddings.weight", "V C"),
        *_affine("blocks.*.ln0", "model.layers.*.pre_norm", "C", "first"),
        *_affine("blocks.*.ln1", "model.layers.*.attn_norm", "C"),
        *_affine("blocks.*.ln2", "model.layers.*.ffn_norm", "C"),
        *(Row(f"blocks.*.att.x_{x}", "1 1 C", f"model.layers.*.attn.x_{x}", "1 1 C") for x in "rwkvag"),
        Row("blocks.*.att.w0", "1 1 A", "model.layers.*.attn.w_lora.lora.2.bias", "A"),
        Row("blocks.*.att.w1", "C Rw", "model.layers.*.attn.w_lora.lora.0.weight", "Rw C"),
        Row("blocks.*.att.w2", "Rw A", "model.layers.*.attn.w_lora.lora.2.weight", "A Rw"),
        Row("blocks.*.att.a0", "1 1 A", "model.layers.*.attn.a_lora.lora.2.bias", "A"),
        Row("blocks.*.att.a1", "C Ra", "model.layers.*.attn.a_lora.lora.0.weight", "Ra C"),
        Row("blocks.*.att.a2", "Ra A", "model.layers.*.attn.a_lora.lora.2.weight", "A Ra"),
        Row("blocks.*.att.v0", "1 1 A", "model.layers.*.attn.v_lora.lora.2.bias", "A", "later"),
        Row("blocks.*.att.v1", "C Rv", "model.layers.*.attn.v_lora.lora.0.weight", "Rv C", "later"),
        Row("blocks.*.att.v2", "Rv A", "model.layers.*.attn.v_lora.lora.2.weight", "A Rv", "later"),
        Row("blocks.*.att.g1", "C Rg", "model.layers.*.attn.g_lora.lora.0.weight", "Rg C"),
        Row("blocks.*.att.g2", "Rg A", "model.layers.*.attn.g_lora.lora.2.weight", "A Rg"),
        Row("blocks.*.att.k_k", "1 1 A", "model.layers.*.attn.k_k", "A"),
        Row("blocks.*.att.k_a", "1 1 A", "model.layers.*.attn.k_a", "A"),
        Row("blocks.*.att.r_k", "H N", "model.layers.*.attn.r_k", "H N"),
        Row("blocks.*.att.receptance.weight", "A C", "model.layers.*.attn.r_proj.weight", "A C"),
        Row("blocks.*.att.key.weight", "A C", "model.layers.*.attn.k_proj.weight", "A C"),
        Row("blocks.*.att.value.weight", "A C", "model.layers.*.attn.v_proj.weight", "A C"),
        Row("blocks.*.att.output.weight", "C A", "model.layers.*.attn.o_proj.weight", "C A"),
        *_affine("blocks.*.att.ln_x", "model.layers.*.attn.g_norm", "A"),
        Row("blocks.*.ffn.x_k", "1 1 C", "model.layers.*.ffn.x_k", "C"),
        Row("blocks.*.ffn.key.weight", "F C", "model.layers.*.ffn.key.weight", "F C"),
        Row("blocks.*.ffn.value.weight", "C F", "model.layers.*.ffn.value.weight", "C F"),
        *_affine("ln_out", "model.norm", "C"),
        Row("head.weight", "V C", "lm_head.weight", "V C"),
    ),
    {
        "L": "num_hidden_layers",
        "V": "vocab_size",
        "C": "hidden_size",
        "A": "attention_hidden_size",
        "H": "num_heads",
        "N": "head_dim",
        "F": "intermediate_size",
        "Rw": "decay_low_rank_dim",
        "Ra": "a_low_rank_dim",
        "Rv": "v_low_rank_dim",
        "Rg": "gate_low_rank_dim",
    },
)

GENERATIONS = {"7": RWKV7}


def official_names(names: Iterable[str]) -> dict[str, str]:
    """Official name -> name in the file, which may carry the prefix of a training framework. Raises on a clash."""
    stripped = {}
    for name in names:
        official = re.sub(r"^(?:_forward_module\.|model\.)+(?=(?:emb|blocks|ln_out|head)\.)", "", name)
        if official in stripped:
            raise CheckpointError(f"holds the tensor {official} twice, as {stripped[official]} and as {name}")
        stripped[official] = name
    return stripped


def detect_version(shapes: Shapes) -> str:
    """Tell the version ("4", "5.0" ... "7", "7a") from official names and shapes; `CheckpointError` if it is none."""

    def has(*pieces: str) -> bool:
        return any(piece in name for name in shapes for piece in pieces)

    if has("att.r_k", "att.x_r"):
        if has(".qkv."):
            return "7b"
        if has("ffn.enn.weight"):
            return "8 (rc00)"
        return "7a" if has("ffn.s_emb") else "7"
    if has("att.time_maa"):
        return "6 (x060a)" if has("gate_w1") else "6 (x060b)" if has("time_maa_rkvw_w1") else "6"
    if has("att.time_decay"):
        if not has("att.ln_x"):
            return "4"
        decay = shapes.get("blocks.0.att.time_decay", ())
        if len(decay) > 1 and decay[1] > 1:
            return "5.2"
        return "5.1" if has("att.gate.weight") else "5.0"
    raise CheckpointError("holds no RWKV model: no tensor named blocks.*.att.r_k, .time_maa_* or .time_decay")


class Match(NamedTuple):
    """A checkpoint laid over a table: the size of every letter, the row of every tensor, and the unused tensors."""

    sizes: dict[str, int]
    rows: dict[str, tuple[Row, str]]
    unused: list[str]


def match(generation: Generation, shapes: Shapes, official: bool) -> Match:
    """Lay the tensors of a checkpoint, in official names or in ours, over the table of its generation.

    Singleton axes may be missing, and low-rank matrices may be transposed, as in some safetensors mirrors. `rows` maps
    each name to its row and block. `CheckpointError` names tensors that are unknown, missing or of the wrong shape.
    """
    table = {row.official if official else row.ours: row for row in generation.rows}
    rows, unused, unknown = {}, [], []
    for name in shapes:
        block = found[1] if (found := re.search(r"\.(\d+)\.", name)) else ""
        row = table.get(re.sub(r"\.\d+\.", ".*.", name, count=1))
        if row is None or (row.blocks == "first" and block != "0"):
            unknown.append(name)
        elif row.blocks == "later" and block == "0":
            unused.append(name)
        else:
            rows[name] = row, block
    if unknown:
        raise CheckpointError(f"has tensors that {generation.name} does not know: {_few(unknown)}")
    blocks = {int(block) for _, block in rows.values() if block}
    L = len(blocks)
    if gaps := sorted(set(range(L)) - blocks):
        raise CheckpointError(f"has {L} blocks but none with the number {gaps[0]}")
    first_block = {"all": 0, "first": 0, "later": 1}
    expected = {
        name.replace("*", str(block))
        for name, row in table.items()
        for block in range(first_block[row.blocks], 1 if row.blocks == "first" or "*" not in name else L)
    }
    if missing := sorted(expected - rows.keys()):
        raise CheckpointError(f"lacks tensors of {generation.name}: {_few(missing)}")
    axes = {name: (row.official_axes if official else row.our_axes).split() for name, (row, _) in rows.items()}
    sizes = {"L": L} | _solve(axes, shapes)
    for name, letters in axes.items():
        if not _fits(letters, shapes[name], sizes):
            wanted = tuple(sizes.get(letter, 1) for letter in letters)
            raise CheckpointError(
                f"tensor {name} has shape {shapes[name]}; the other tensors ask for ({', '.join(letters)}) = {wanted}"
            )
    if sizes["A"] != sizes["H"] * sizes["N"]:
        raise CheckpointError(f"r_k has {sizes['H']} heads of size {sizes['N']}, the attention width is {sizes['A']}")
    return Match(sizes, rows, unused)


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _solve(axes: dict[str, list[str]], shapes: Shapes) -> dict[str, int]:
    """The size of each letter by majority, so that one misshapen tensor does not put the blame on the others."""
    votes = defaultdict(Counter)
    ranked = [name for name, letters in axes.items() if _rank(letters)]
    for name, letters in axes.items():
        if not _rank(letters):
            for letter, size in zip(*_aligned(letters, shapes[name]), strict=True):
                votes[letter][size] += 1
    sizes = {letter: _winner(counter) for letter, counter in votes.items()}
    for name in ranked:
        letters, shape = _aligned(axes[name], shapes[name])
        if len(shape) == 2:
            known = 1 - letters.index(_rank(letters))
            straight = shape[known] == sizes[letters[known]]
            votes[_rank(letters)][shape[1 - known] if straight else shape[known]] += 1
    return {letter: _winner(counter) for letter, counter in votes.items()}


def _winner(votes: Counter) -> int:
    return votes.most_common(1)[0][0]


def _rank(letters: list[str]) -> str | None:
    return next((letter for letter in letters if letter.startswith("R")), None)


def _aligned(letters: list[str], shape: tuple[int, ...]) -> tuple[list[str], list[int]]:
    """The named axes with their sizes, singleton axes left out; nothing where the shape has another number of axes."""
    if len(shape) == len(letters):
        pairs = [pair for pair in zip(letters, shape, strict=True) if pair[0] != "1"]
        return [letter for letter, _ in pairs], [size for _, size in pairs]
    named, kept = [letter for letter in letters if letter != "1"], [size for size in shape if size != 1]
    return (named, kept) if len(named) == len(kept) else ([], [])


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _fits(letters: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    wanted = _squeezed(sizes.get(letter, 1) for letter in letters)
    return _squeezed(shape) == wanted or (_rank(letters) is not None and _squeezed(reversed(shape)) == wanted)


def axes_shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape that axes such as "1 1 C" stand for."""
    return tuple(sizes.get(letter, 1) for letter in axes.split())


def rearrange(tensor: torch.Tensor, source: str, target: str, sizes: dict[str, int]) -> torch.Tensor:
    """Bring a tensor from one order of axes to another, e.g. from "C Rw" to "Rw C" or from "1 1 A" to "A"."""
    named = [letter for letter in source.split() if letter != "1"]
    order = [named.index(letter) for letter in target.split() if letter != "1"]
    stored = stored_as(tensor, axes_shape(" ".join(named), sizes))
    return stored.permute(order).reshape(axes_shape(target, sizes)).contiguous()


def stored_as(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Reshape where only singleton axes differ, else transpose: the two ways in which files deviate from the table."""
    return (tensor if _squeezed(tensor.shape) == _squeezed(shape) else tensor.t()).reshape(shape)


class _AsParameter(ConversionOps):
    """Gives a tensor the singleton axes of the parameter it is loaded into, after transposing it if it is stored so."""

    def __init__(self, transpose: bool = False):
        self.transpose = transpose

    def convert(self, input_dict, *, full_layer_name, model, **kwargs):
        ((tensor,),) = input_dict.values()
        shape = model.get_parameter(full_layer_name).shape
        if self.transpose:
            tensor = tensor.t().contiguous()
        # Another number of elements is left for transformers to report.
        return {full_layer_name: tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor}


class _SplitMixes(ConversionOps):
    """Takes apart the token-shift mixes that early flash-linear-attention files keep in one tensor (6, C)."""

    def convert(self, input_dict, *, target_patterns, **kwargs):
        ((fused,),) = input_dict.values()
        return {name: mix.reshape(1, 1, -1).clone() for name, mix in zip(target_patterns, fused, strict=True)}


class _OnlyRead:
    """For transforms: they act on loading alone, and are cheap to copy, as is done for every tensor."""

    # A model is saved by transforms in reverse, also one of another package's class for the same model type.
    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "")

    def __deepcopy__(self, memo):
        fresh = copy(self)
        fresh.collected_tensors, fresh.layer_targets = defaultdict(list), defaultdict(set)
        return fresh


class _ReadConverter(_OnlyRead, WeightConverter):
    pass


class _ReadNames(_OnlyRead, WeightRenaming):
    """Renames by looking up the whole name, `*` for the block: a transform a name would be tried on every tensor."""

    def __init__(self, names: dict[str, str]):
        super().__init__(r"^(?:rwkv7\.|model\.)?((?:emb|embeddings|blocks|ln_out|head)\..+)$", r"\1")
        self.names = names

    def rename_source_key(self, source_key):
        name, pattern = super().rename_source_key(source_key)
        if pattern is None:
            return source_key, None
        block = re.search(r"\.(\d+)\.", name)
        ours = self.names.get(re.sub(r"\.\d+\.", ".*.", name, count=1))
        return (ours.replace("*", block[1] if block else ""), pattern) if ours else (source_key, None)


def conversion_mapping() -> dict[str, list[WeightRenaming | WeightConverter]]:
    """For each model type, the transforms with which `from_pretrained` reads folders in other layouts than ours.

    They cover official names (also below `model.` or `rwkv7.`, and with low-rank pairs as Linear modules), the fused
    mixes of early flash-linear-attention files, and vectors with more or fewer singleton axes. They act on loading.
    """
    return {generation.model_type: _transforms(generation) for generation in GENERATIONS.values()}


def _transforms(generation: Generation) -> list[WeightRenaming | WeightConverter]:
    names, vectors = {}, []
    for row in generation.rows:
        names[row.official] = names[row.official.replace("emb.", "embeddings.")] = row.ours
        if _rank(row.our_axes.split()):
            names[f"{row.official}.weight"] = row.ours
            names[row.official] = row.ours + _TRANSPOSED
        if "1" in row.official_axes:
            vectors.append(re.escape(row.ours.split("*.")[1]))
    return [
        _ReadNames(names),
        _ReadConverter(re.escape(_TRANSPOSED) + "$", "", [_AsParameter(transpose=True)]),
        _ReadConverter(r"attn\.x_x$", [f"attn.x_{x}" for x in "rwkvag"], [_SplitMixes()]),
        _ReadConverter(rf"({'|'.join(vectors)})$", r"\1", [_AsParameter()]),
    ]


# Stands behind the name of a matrix on its way from a file to the transform that turns it.
_TRANSPOSED = ".transposed"
