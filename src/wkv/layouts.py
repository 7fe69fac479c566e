"""The names and shapes of tensors on disk: one table a generation, used in both directions.

"Official" is the flat layout of the files that the RWKV project publishes, "ours" the layout of a Hub folder, "fla"
that of flash-linear-attention, which for RWKV-7 is ours. Letters of axes: V vocabulary rows, C residual width,
A attention width, H heads of size N (A = H*N), F channel-mix width, L blocks, R* ranks of low-rank pairs (7: decay w,
in-context rate a, value residual v, gate g; 6: token shift R, decay Rd), 1 a singleton axis. An axis in small letters
lists its entries in their order, `wkvrg*R` is a list times a rank.
"""

from typing import NamedTuple

from .tensor_files import CheckpointError

Shapes = dict[str, tuple[int, ...]]


class Row(NamedTuple):
    """A tensor in two layouts; `*` in a name is the block, `blocks` tells which have it ("all", "first", "later")."""

    official: str
    official_axes: str
    ours: str
    our_axes: str
    blocks: str = "all"


class Generation(NamedTuple):
    """A version of RWKV: its tables, and what its configuration says.

    `fields` are the configuration's names of the letters, `constants` its other fields. `fla` is the table of
    flash-linear-attention; a file of theirs has each key of `stacked` instead of the tensors that it lists, and an
    early one each key of `once_stacked`.
    """

    name: str
    model_type: str
    rows: tuple[Row, ...]
    fields: dict[str, str]
    constants: dict[str, bool] = {}
    fla: tuple[Row, ...] = ()
    stacked: dict[str, tuple[str, ...]] = {}
    once_stacked: dict[str, tuple[str, ...]] = {}


def _row(official: str, axes: str, ours: str, our_axes: str = "", blocks: str = "all") -> Row:
    return Row(official, axes, ours, our_axes or axes, blocks)


def _affine(official: str, ours: str, axis: str, blocks: str = "all") -> tuple[Row, Row]:
    return tuple(_row(f"{official}.{leaf}", axis, f"{ours}.{leaf}", blocks=blocks) for leaf in ("weight", "bias"))


_SIZES = {
    "L": "num_hidden_layers",
    "V": "vocab_size",
    "C": "hidden_size",
    "A": "attention_hidden_size",
    "F": "intermediate_size",
}

# RWKV-4, 5 and 6 have the names of transformers' `rwkv`.
_MIX = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
_RWKV456 = (
    _row("emb.weight", "V C", "rwkv.embeddings.weight"),
    *_affine("blocks.*.ln0", "rwkv.blocks.*.pre_ln", "C", "first"),
    *_affine("blocks.*.ln1", "rwkv.blocks.*.ln1", "C"),
    *_affine("blocks.*.ln2", "rwkv.blocks.*.ln2", "C"),
    *(
        _row(f"blocks.*.att.{name}.weight", axes, f"rwkv.blocks.*.attention.{name}.weight")
        for name, axes in {"receptance": "A C", "key": "A C", "value": "A C", "output": "C A"}.items()
    ),
    *(
        _row(f"blocks.*.ffn.{name}.weight", axes, f"rwkv.blocks.*.feed_forward.{name}.weight")
        for name, axes in {"key": "F C", "receptance": "C C", "value": "C F"}.items()
    ),
    *_affine("ln_out", "rwkv.ln_out", "C"),
    _row("head.weight", "V C", "head.weight"),
)


def _attention(name: str, axes: str) -> Row:
    return _row(f"blocks.*.att.{name}", axes, f"rwkv.blocks.*.attention.{name}")


def _mixes(attention: str) -> tuple[Row, ...]:
    att = (
        _row(f"blocks.*.att.time_mix_{x}", "1 1 C", f"rwkv.blocks.*.attention.time_mix_{_MIX[x]}") for x in attention
    )
    ffn = (_row(f"blocks.*.ffn.time_mix_{x}", "1 1 C", f"rwkv.blocks.*.feed_forward.time_mix_{_MIX[x]}") for x in "kr")
    return *att, *ffn


RWKV4 = Generation(
    "RWKV-4",
    "rwkv",
    (*_RWKV456, *_mixes("kvr"), _attention("time_decay", "A"), _attention("time_first", "A")),
    _SIZES,
)


def rwkv5(gate: bool = True, per_head: bool = False, bonus_is_log: bool = False) -> Generation:
    """The variants of RWKV-5: with or without gate, decay and bonus per head or per channel, two names of the bonus."""
    vector = "H" if per_head else "H N"
    return Generation(
        "RWKV-5",
        "rwkv5",
        (
            *_RWKV456,
            *_mixes("kvrg" if gate else "kvr"),
            *([_attention("gate.weight", "A C")] if gate else []),
            _attention("time_decay", vector),
            _attention("time_first" if bonus_is_log else "time_faaaa", vector),
            *_affine("blocks.*.att.ln_x", "rwkv.blocks.*.attention.ln_x", "A"),
        ),
        _SIZES | {"N": "head_size"},
        {"use_gate": gate, "decay_per_head": per_head, "bonus_is_log": bonus_is_log},
    )


_FLA_NORMS = (
    *_affine("blocks.*.ln0", "model.layers.*.pre_norm", "C", "first"),
    *_affine("blocks.*.ln1", "model.layers.*.attn_norm", "C"),
    *_affine("blocks.*.ln2", "model.layers.*.ffn_norm", "C"),
    *_affine("ln_out", "model.norm", "C"),
    *_affine("blocks.*.att.ln_x", "model.layers.*.attn.g_norm", "A"),
)
_FLA_PROJECTIONS = {"r": "receptance", "k": "key", "v": "value", "g": "gate"}

RWKV6 = Generation(
    "RWKV-6",
    "rwkv6",
    (
        *_RWKV456,
        *(_attention(f"time_maa_{x}", "1 1 C") for x in "xwkvrg"),
        _attention("time_maa_w1", "C wkvrg*R"),
        _attention("time_maa_w2", "wkvrg R C"),
        _attention("time_decay", "1 1 A"),
        _attention("time_decay_w1", "C Rd"),
        _attention("time_decay_w2", "Rd A"),
        _attention("time_faaaa", "H N"),
        _attention("gate.weight", "A C"),
        *_affine("blocks.*.att.ln_x", "rwkv.blocks.*.attention.ln_x", "A"),
        *(_row(f"blocks.*.ffn.time_maa_{x}", "1 1 C", f"rwkv.blocks.*.feed_forward.time_maa_{x}") for x in "kr"),
    ),
    _SIZES | {"N": "head_size", "R": "time_mix_extra_dim", "Rd": "time_decay_extra_dim"},
    fla=(
        _row("emb.weight", "V C", "model.embeddings.weight"),
        *_FLA_NORMS,
        _row("blocks.*.att.time_maa_x", "1 1 C", "model.layers.*.attn.x_proj.0.mu", "C"),
        _row("blocks.*.att.time_maa_w1", "C wkvrg*R", "model.layers.*.attn.x_proj.0.linear.weight", "rwkvg*R C"),
        _row("blocks.*.att.time_maa_w2", "wkvrg R C", "model.layers.*.attn.x_proj.2.weight", "C rwkvg*R"),
        *(_row(f"blocks.*.att.time_maa_{x}", "1 1 C", f"model.layers.*.attn.x_bias.{x}", "C") for x in "rwkvg"),
        _row("blocks.*.att.time_decay", "1 1 A", "model.layers.*.attn.w_proj.linear.lora.2.bias", "A"),
        _row("blocks.*.att.time_decay_w1", "C Rd", "model.layers.*.attn.w_proj.linear.lora.0.weight", "Rd C"),
        _row("blocks.*.att.time_decay_w2", "Rd A", "model.layers.*.attn.w_proj.linear.lora.2.weight", "A Rd"),
        _row("blocks.*.att.time_faaaa", "H N", "model.layers.*.attn.bonus"),
        *(
            _row(f"blocks.*.att.{name}.weight", "A C", f"model.layers.*.attn.{x}_proj.linear.weight")
            for x, name in _FLA_PROJECTIONS.items()
        ),
        _row("blocks.*.att.output.weight", "C A", "model.layers.*.attn.o_proj.weight"),
        _row("blocks.*.ffn.time_maa_k", "1 1 C", "model.layers.*.ffn.key.mu", "C"),
        _row("blocks.*.ffn.time_maa_r", "1 1 C", "model.layers.*.ffn.receptance.mu", "C"),
        _row("blocks.*.ffn.key.weight", "F C", "model.layers.*.ffn.key.linear.weight"),
        _row("blocks.*.ffn.receptance.weight", "C C", "model.layers.*.ffn.receptance.linear.weight"),
        _row("blocks.*.ffn.value.weight", "C F", "model.layers.*.ffn.value.weight"),
        _row("head.weight", "V C", "lm_head.weight"),
    ),
    stacked={"model.layers.*.attn.x_bias": tuple(f"model.layers.*.attn.x_bias.{x}" for x in "rwkvg")},
)


def _low_rank(x: str, blocks: str = "all") -> tuple[Row, ...]:
    ours = f"model.layers.*.attn.{x}_lora.lora"
    bias = [_row(f"blocks.*.att.{x}0", "1 1 A", f"{ours}.2.bias", "A", blocks)]
    return (
        *(bias if x != "g" else []),
        _row(f"blocks.*.att.{x}1", f"C R{x}", f"{ours}.0.weight", f"R{x} C", blocks),
        _row(f"blocks.*.att.{x}2", f"R{x} A", f"{ours}.2.weight", f"A R{x}", blocks),
    )


_RWKV7_ROWS = (
    _row("emb.weight", "V C", "model.embeddings.weight"),
    *_FLA_NORMS,
    *(_row(f"blocks.*.att.x_{x}", "1 1 C", f"model.layers.*.attn.x_{x}") for x in "rwkvag"),
    *_low_rank("w"),
    *_low_rank("a"),
    *_low_rank("v", "later"),
    *_low_rank("g"),
    _row("blocks.*.att.k_k", "1 1 A", "model.layers.*.attn.k_k", "A"),
    _row("blocks.*.att.k_a", "1 1 A", "model.layers.*.attn.k_a", "A"),
    _row("blocks.*.att.r_k", "H N", "model.layers.*.attn.r_k"),
    _row("blocks.*.att.receptance.weight", "A C", "model.layers.*.attn.r_proj.weight"),
    _row("blocks.*.att.key.weight", "A C", "model.layers.*.attn.k_proj.weight"),
    _row("blocks.*.att.value.weight", "A C", "model.layers.*.attn.v_proj.weight"),
    _row("blocks.*.att.output.weight", "C A", "model.layers.*.attn.o_proj.weight"),
    _row("blocks.*.ffn.x_k", "1 1 C", "model.layers.*.ffn.x_k", "C"),
    _row("blocks.*.ffn.key.weight", "F C", "model.layers.*.ffn.key.weight"),
    _row("blocks.*.ffn.value.weight", "C F", "model.layers.*.ffn.value.weight"),
    _row("head.weight", "V C", "lm_head.weight"),
)
RWKV7 = Generation(
    "RWKV-7",
    "rwkv7",
    _RWKV7_ROWS,
    _SIZES
    | {
        "H": "num_heads",
        "N": "head_dim",
        "Rw": "decay_low_rank_dim",
        "Ra": "a_low_rank_dim",
        "Rv": "v_low_rank_dim",
        "Rg": "gate_low_rank_dim",
    },
    fla=_RWKV7_ROWS,
    once_stacked={"model.layers.*.attn.x_x": tuple(f"model.layers.*.attn.x_{x}" for x in "rwkvag")},
)

GENERATIONS = {
    "4": RWKV4,
    "5.0": rwkv5(gate=False, per_head=True, bonus_is_log=True),
    "5.1": rwkv5(per_head=True),
    "5.2": rwkv5(),
    "6": RWKV6,
    "7": RWKV7,
}


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


def generation_of(shapes: Shapes) -> Generation:
    """The generation of official names and shapes; `CheckpointError` names a version that has no table."""
    version = detect_version(shapes)
    if version not in GENERATIONS:
        raise CheckpointError(f"this is RWKV-{version}; `wkv` supports RWKV-4, 5, 6 and 7 so far")
    if not version.startswith("5"):
        return GENERATIONS[version]
    leaves = {name.partition(".att.")[2] for name in shapes}
    return rwkv5("gate.weight" in leaves, version != "5.2", "time_first" in leaves)
