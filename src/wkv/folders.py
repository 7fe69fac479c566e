"""What is in a folder: tensors and configuration in our layout, and in that of flash-linear-attention."""

from collections import Counter

import torch
from transformers import AutoConfig

from .auto import architecture
from .layouts import Row
from .sources import Source, rearranged
from .tensor_files import CheckpointError, LazyTensor


def folder_tensors(source: Source, rows: tuple[Row, ...]) -> dict[str, LazyTensor]:
    """The tensors of a source by the names, and in the axes, of a table's other column; mixes still apart."""
    by_official = {row.official: row for row in rows}
    tensors = {}
    for name, tensor in source.tensors.items():
        parts = name.split(".")
        block = parts[1] if parts[0] == "blocks" else ""
        row = by_official[name.replace(f".{block}.", ".*.", 1) if block else name]
        tensors[row.ours.replace("*", block)] = rearranged(tensor, row.official_axes, row.our_axes, source.sizes)
    return tensors


def most_common_dtype(tensors: dict[str, LazyTensor]) -> torch.dtype:
    """The dtype of most of the data."""
    weight = Counter()
    for tensor in tensors.values():
        weight[tensor.dtype] += tensor.nbytes
    return weight.most_common(1)[0][0]


def hub_config(source: Source):
    """The configuration of a source in our keys."""
    generation = source.generation
    fields = {field: source.sizes[letter] for letter, field in generation.fields.items() if letter in source.sizes}
    config = AutoConfig.for_model(generation.model_type, **fields, **generation.constants)
    config.architectures = [architecture(generation.model_type)]
    config.dtype = most_common_dtype(source.tensors)
    return config


def fla_tensors(source: Source) -> dict[str, LazyTensor]:
    """The tensors of a source in the layout of flash-linear-attention, whose stacks have one dtype each."""
    tensors = folder_tensors(source, source.generation.fla)
    for stacked, parts in source.generation.stacked.items():
        for block in range(source.sizes["L"]):
            together = [tensors.pop(part.replace("*", str(block))) for part in parts]
            dtypes = {tensor.dtype for tensor in together}
            if len(dtypes) > 1:
                raise CheckpointError(f"{source.path}: {stacked} would mix {', '.join(map(str, dtypes))}")
            read = lambda together=together: torch.stack([tensor.read() for tensor in together])  # noqa: E731
            shape = len(parts), *together[0].shape
            tensors[stacked.replace("*", str(block))] = LazyTensor(shape, together[0].dtype, read)
    return tensors


def fla_config(source: Source) -> dict:
    """The config.json of a source for flash-linear-attention.

    Raises `CheckpointError` for generations that it lacks, and for an RWKV-7 whose heads are not of 64 channels: the
    epsilon of its group norm would be another one there. Their RWKV-6 uses 1e-5 whatever the file says, where the model
    was trained with 64e-5.
    """
    sizes, model_type = source.sizes, source.generation.model_type
    if not source.generation.fla:
        raise CheckpointError(
            f"{source.path}: flash-linear-attention has RWKV-6 and RWKV-7, not {source.generation.name}"
        )
    if model_type == "rwkv7" and sizes["N"] != 64:
        raise CheckpointError(
            f"{source.path}: its heads have {sizes['N']} channels; flash-linear-attention scales the epsilon of the "
            "group norm with them, which is right for 64 only"
        )
    if model_type == "rwkv6" and sizes["A"] != sizes["C"]:
        raise CheckpointError(f"{source.path}: attention width {sizes['A']} beside {sizes['C']} cannot be expressed")
    config = {
        "architectures": ["RWKV7ForCausalLM" if model_type == "rwkv7" else "RWKV6ForCausalLM"],
        "model_type": model_type,
        "attn": None,
        "attn_mode": "chunk",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "fuse_cross_entropy": True,
        "fuse_norm": False,
        "hidden_act": "sqrelu",
        "hidden_ratio": sizes["F"] / sizes["C"],
        "hidden_size": sizes["C"],
        "initializer_range": 0.006,
        "intermediate_size": sizes["F"],
        "max_position_embeddings": 2048,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "norm_first": True,
        "num_heads": sizes["H"],
        "num_hidden_layers": sizes["L"],
        "tie_word_embeddings": False,
        "torch_dtype": str(most_common_dtype(source.tensors)).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": sizes["V"],
    }
    if model_type == "rwkv6":
        ranks = {"proj_low_rank_dim": sizes["R"], "gate_low_rank_dim": sizes["Rd"]}
        return config | {"expand_k": 1, "expand_v": 1} | ranks
    ranks = {source.generation.fields[letter]: size for letter, size in sizes.items() if letter.startswith("R")}
    widths = {"attention_hidden_size": sizes["A"], "value_dim": [sizes["A"]] * sizes["L"]}
    return config | {"head_dim": sizes["N"]} | widths | ranks
