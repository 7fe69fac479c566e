"""How `from_pretrained` reads folders in other layouts than ours: transforms for transformers, made from the tables."""

import re
from collections import defaultdict
from copy import copy
from itertools import groupby

from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .layouts import GENERATIONS, Generation, rwkv5
from .matching import axis_factors, rearrange, sizes_of
from .names import is_linear, official_name

# Stands behind the name of a tensor on its way from a file to the transform that turns it.
_TURNED = ".turned"
_BLOCK = re.compile(r"\.(\d+)\.")


class _AsParameter(ConversionOps):
    """Gives a tensor the singleton axes of the parameter it is loaded into."""

    def convert(self, input_dict, *, full_layer_name, model, **kwargs):
        ((tensor,),) = input_dict.values()
        shape = model.get_parameter(full_layer_name).shape
        # Another number of elements is left for transformers to report.
        return {full_layer_name: tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor}


class _Turn(ConversionOps):
    """Brings a tensor from the axes of its file to those of the parameter it is loaded into.

    `axes` has both by the name of the parameter in its block.
    """

    def __init__(self, axes: dict[str, tuple[str, str]]):
        self.axes = axes

    def convert(self, input_dict, *, full_layer_name, model, **kwargs):
        ((tensor,),) = input_dict.values()
        shape = model.get_parameter(full_layer_name).shape
        if tensor.numel() != shape.numel():
            return {full_layer_name: tensor}
        source, target = self.axes[_in_block(full_layer_name)]
        return {full_layer_name: rearrange(tensor, source, target, sizes_of(target, shape))}


def _in_block(name: str) -> str:
    return re.split(r"\.(?:\d+|\*)\.", name, maxsplit=1)[1]


class _SplitMixes(ConversionOps):
    """Takes apart the token-shift mixes that flash-linear-attention keeps in one tensor (n, C)."""

    def convert(self, input_dict, *, target_patterns, **kwargs):
        ((stacked,),) = input_dict.values()
        return {name: mix.reshape(1, 1, -1).clone() for name, mix in zip(target_patterns, stacked, strict=True)}


class OnlyRead:
    """For transforms: they act on loading alone, and are cheap to copy, as is done for every tensor."""

    # A model is saved by transforms in reverse, also one of another package's class for the same model type.
    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "")

    def __deepcopy__(self, memo):
        fresh = copy(self)
        fresh.collected_tensors, fresh.layer_targets = defaultdict(list), defaultdict(set)
        return fresh


class _ReadConverter(OnlyRead, WeightConverter):
    pass


class _ReadNames(OnlyRead, WeightRenaming):
    """Renames by looking up the whole name, `*` for the block: a transform a name would be tried on every tensor."""

    def __init__(self, names: dict[str, str]):
        super().__init__(r"^(.+)$", r"\1")
        self.names = names

    def rename_source_key(self, source_key):
        name, pattern = super().rename_source_key(source_key)
        if pattern is None:
            return source_key, None
        for spelling in (name, official_name(name)):
            block = _BLOCK.search(spelling)
            ours = self.names.get(_BLOCK.sub(".*.", spelling, count=1))
            if ours:
                ours = ours.removesuffix(_TURNED if is_linear(name) else "")
                return ours.replace("*", block[1] if block else ""), pattern
        return source_key, None


def conversion_mapping() -> dict[str, list[WeightRenaming | WeightConverter]]:
    """For each model type, the transforms with which `from_pretrained` reads folders in other layouts than ours.

    They cover official names in the spellings of forks of transformers (also with low-rank pairs as Linear modules),
    the layout of flash-linear-attention with its stacked mixes, and vectors with more or fewer singleton axes. They act
    on loading.
    """
    # The variants of RWKV-5 are one model type.
    everything = [*GENERATIONS.values(), rwkv5(bonus_is_log=True)]
    everything.sort(key=lambda generation: generation.model_type)
    return {model_type: _transforms(list(tables)) for model_type, tables in groupby(everything, lambda g: g.model_type)}


def _transforms(generations: list[Generation]) -> list[WeightRenaming | WeightConverter]:
    names, turned, vectors, stacks = {}, {}, set(), []

    def read(theirs: str, their_axes: str, ours: str, our_axes: str) -> None:
        names[theirs] = ours
        if axis_factors(their_axes) != axis_factors(our_axes):
            names[theirs] += _TURNED
            turned[_in_block(ours)] = their_axes, our_axes
        elif "1" in their_axes.split() + our_axes.split():
            vectors.add(re.escape(_in_block(ours)))

    for generation in generations:
        ours = {row.official: row for row in generation.rows}
        for row in generation.rows:
            read(row.official, row.official_axes, row.ours, row.our_axes)
        theirs = {row.ours: ours[row.official] for row in generation.fla}
        for row in generation.fla:
            if row.ours != (own := theirs[row.ours]).ours:
                read(row.ours, row.our_axes, own.ours, own.our_axes)
        for stacked, parts in (generation.stacked | generation.once_stacked).items():
            own = [theirs[part].ours for part in parts]
            names[stacked] = own[0].rpartition(".")[0] + "." + stacked.rpartition(".")[2]
            mixes = [_in_block(name) for name in own]
            stacks.append(_ReadConverter(re.escape(_in_block(names[stacked])) + "$", mixes, [_SplitMixes()]))
    return [
        _ReadNames(names),
        _ReadConverter(re.escape(_TURNED) + "$", "", [_Turn(turned)]),
        *stacks,
        _ReadConverter(rf"({'|'.join(sorted(vectors))})$", r"\1", [_AsParameter()]),
    ]
