"""Whose names the tensors of a checkpoint have, and the official ones behind those of other programs."""

import re
from collections.abc import Iterable

from .layouts import RWKV6, Generation, Shapes, generation_of
from .tensor_files import CheckpointError

# What training frameworks and forks of transformers put before an official name, and their names of its pieces.
_PREFIXES = re.compile(
    r"^(?:(?:_forward_module|_orig_mod|model|rwkv7?)\.)+"
    r"(?=(?:emb|embeddings|embed_tokens|embedding_norm|blocks|layers|ln_out|norm|head)\.)"
)
_TOPS = {
    "embeddings": "emb",
    "embed_tokens": "emb",
    "embedding_norm": "blocks.0.ln0",
    "norm": "ln_out",
    "lm_head": "head",
}
_PARTS = {
    "pre_ln": "ln0",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "attention": "att",
    "linear_attn": "att",
    "feed_forward": "ffn",
    "mlp": "ffn",
}
_LEAVES = {
    "r_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "g_norm": "ln_x",
    "up_proj": "key",
    "down_proj": "value",
}
_LINEAR = re.compile(r"\.[wavg][12]\.weight$")
# The programs that read safetensors mirrors of RWKV-6 renamed these.
_MIRROR = (".att.time_mix_w1", {".time_mix_": ".time_maa_", ".att.time_first": ".att.time_faaaa"})


def official_name(name: str) -> str:
    """The official name behind the prefixes and spellings of training frameworks and forks of transformers."""
    top, dot, rest = _PREFIXES.sub("", name).partition(".")
    if top not in ("blocks", "layers") or rest.count(".") < 2:
        return _TOPS.get(top, top) + dot + rest
    block, part, leaf = rest.removesuffix(".weight" if is_linear(name) else "").split(".", 2)
    first, dot, last = leaf.partition(".")
    return f"blocks.{block}.{_PARTS.get(part, part)}.{_LEAVES.get(first, first)}{dot}{last}"


def is_linear(name: str) -> bool:
    """Whether this is a low-rank matrix of RWKV-7 that a fork keeps as a Linear module: transposed."""
    return _LINEAR.search(name) is not None


def official_names(names: Iterable[str]) -> dict[str, str]:
    """Official name -> name in the file. Raises on a clash."""
    stored = list(names)
    mirror = any(name.endswith(_MIRROR[0]) for name in stored)
    found = {}
    for name in stored:
        official = official_name(name)
        for theirs, ours in _MIRROR[1].items() if mirror else ():
            official = official.replace(theirs, ours)
        if official in found:
            raise CheckpointError(f"holds the tensor {official} twice, as {found[official]} and as {name}")
        found[official] = name
    return found


def layout_of(names: Iterable[str]) -> str:
    """Whose names these are: "fla" (of RWKV-6), "hf" (ours) or, for everything else, "official"."""
    layout = "official"
    for name in names:
        if re.match(r"(?:model\.)?layers\.\d+\.attn\.(?:x_proj|x_bias|bonus)", name):
            return "fla"
        if re.match(r"(?:(?:model\.)?layers\.\d+\.attn\.|(?:rwkv\.)?blocks\.\d+\.attention\.time_)", name):
            layout = "hf"
    return layout


def generation_of_layout(layout: str, shapes: Shapes) -> Generation:
    """The generation of names of a layout, which `layout_of` tells, and their shapes."""
    if layout == "fla":
        return RWKV6
    if layout == "hf":
        shapes = {
            re.sub(r"\.(?:attn|attention)\.", ".att.", name.removeprefix("rwkv.")): shape
            for name, shape in shapes.items()
        }
    return generation_of(shapes)
