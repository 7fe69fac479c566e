"""One token of a whole RWKV-4, 5, 6 or 7 model in one call: weights are read in place, states are overwritten.

Letters: B sequences, C residual width, H heads of K channels, A = H K (RWKV-4: K = 1), F hidden units of the
feed-forward, L layers, S the WKV state.
"""

import array
import ctypes
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

# The tensors of a layer by generation, as rwkv_step_layer of wkv.h orders them; None for what a generation lacks.
_FEED_FORWARD = tuple(f"feed_forward.{name}.weight" for name in ("key", "receptance", "value"))
_NORMS_AND_OUTPUT = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "attention.output.weight")
_OF_CURRENT = (*_NORMS_AND_OUTPUT, "feed_forward.time_mix_key", "feed_forward.time_mix_receptance", *_FEED_FORWARD)
LAYER_TENSORS = {
    4: _OF_CURRENT,
    5: _OF_CURRENT,
    6: (*_NORMS_AND_OUTPUT, "feed_forward.time_maa_k", "feed_forward.time_maa_r", *_FEED_FORWARD),
    7: (
        *("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias", "attn.o_proj.weight"),
        *("ffn.x_k", None, "ffn.key.weight", None, "ffn.value.weight"),
    ),
}

# The same for rwkv4_time_mix, rwkv6_time_mix and rwkv7_time_mix, all from this module on.
TIME_MIX = {4: "attention", 5: "attention", 6: "attention", 7: "attn"}
_PROJECTIONS = ("receptance.weight", "key.weight", "value.weight")
TIME_MIX_TENSORS = {
    4: (
        *("time_mix_receptance", "time_mix_key", "time_mix_value"),
        *(*_PROJECTIONS, "time_decay", "time_first"),
    ),
    5: (
        *("time_mix_receptance", "time_mix_key", "time_mix_value", "time_mix_gate"),
        *(*_PROJECTIONS, "gate.weight", "time_decay", "time_faaaa", "ln_x.weight", "ln_x.bias"),
        *(None, None, None, None, None, None),
    ),
    6: (
        *("time_maa_r", "time_maa_k", "time_maa_v", "time_maa_g"),
        *(*_PROJECTIONS, "gate.weight", "time_decay", "time_faaaa", "ln_x.weight", "ln_x.bias"),
        *("time_maa_x", "time_maa_w", "time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"),
    ),
    7: (
        *("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"),
        *("k_k", "k_a", "r_k", "g_norm.weight", "g_norm.bias"),
        *("r_proj.weight", "k_proj.weight", "v_proj.weight"),
        *("w_lora.lora.0.weight", "w_lora.lora.2.weight", "w_lora.lora.2.bias"),
        *("a_lora.lora.0.weight", "a_lora.lora.2.weight", "a_lora.lora.2.bias"),
        *("v_lora.lora.0.weight", "v_lora.lora.2.weight", "v_lora.lora.2.bias"),
        *("g_lora.lora.0.weight", "g_lora.lora.2.weight"),
    ),
}

# The matrices that adapters can add to, numbered as in wkv.h.
_OWN_LOW_RANK = [f"attn.{kind}_lora.lora.{i}.weight" for i in (0, 2) for kind in "wavg"]
_FIRST_MATRICES = [f"attention.{name}.weight" for name in ("receptance", "key", "value", "gate")]
_MATRICES = {4: (*_FIRST_MATRICES, *(8 * [None]), "attention.output.weight", *_FEED_FORWARD)}
_MATRICES[5] = _MATRICES[6] = _MATRICES[4]
_MATRICES[7] = (
    *("attn.r_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", None),
    *(*_OWN_LOW_RANK, "attn.o_proj.weight", "ffn.key.weight", None, "ffn.value.weight"),
)

# wkv_low_rank and rwkv_step_args of wkv.h.
_LOW_RANK = struct.Struct("2qd4q")
_ARGUMENTS = struct.Struct("15q2d9q")

_step = LIBRARY.rwkv_step
_step.argtypes = [ctypes.c_char_p]
_step.restype = ctypes.c_int


class Sizes(NamedTuple):
    """The shape of a model, and the epsilons of its norms.

    `ranks` are those of w, a, v and g in RWKV-7; in RWKV-6 those of the mixes and of the decay. In RWKV-5, `per_head`
    says that decay and bonus have one value a head, `bonus_is_log` that the bonus is exp(time_first).
    """

    generation: int
    C: int
    H: int
    K: int
    F: int
    L: int
    norm_eps: float
    group_norm_eps: float = 0.0
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)
    per_head: bool = False
    bonus_is_log: bool = False


class Weights:
    """Where the weights of a model are. Holds addresses only: whoever calls keeps the tensors alive, and in place.

    `layers` holds the tensors of each layer by name, `norms` weight and bias of the first and of the last norm. All are
    of one dtype and contiguous, but the feed-forward's value, (C, F), may have the strides (1, C): then the hidden
    units whose activation is zero are not read. `terms` holds what adapters add, for each layer by the matrix's name:
    (down, up, scale) for scale * up (down x), of any dtype, contiguous.
    """

    def __init__(
        self,
        sizes: Sizes,
        layers: Iterable[Mapping[str, Tensor]],
        norms: Sequence[Tensor],
        terms: Iterable[Mapping[str, Sequence[tuple[Tensor, Tensor, float]]]],
    ):
        self.sizes = sizes
        self.dtype = norms[0].dtype
        self.norms = [x.data_ptr() for x in norms]
        self.layers, self.time_mixes = array.array("q"), array.array("q")
        names, path = LAYER_TENSORS[sizes.generation], TIME_MIX[sizes.generation]
        of_time_mix = [name and f"{path}.{name}" for name in TIME_MIX_TENSORS[sizes.generation]]
        if sizes.bonus_is_log:
            of_time_mix[of_time_mix.index(f"{path}.time_faaaa")] = f"{path}.time_first"
        self.terms = [_pack_terms(_MATRICES[sizes.generation], of_layer) for of_layer in terms]
        for layer, packed in zip(layers, self.terms, strict=True):
            self.layers.extend(map(_address, map(layer.get, names)))
            self.layers.append(not layer[names[-1]].is_contiguous())
            self.layers.extend((packed.buffer_info()[0], len(packed) // _LOW_RANK.size))
            self.time_mixes.extend(map(_address, map(layer.get, of_time_mix)))


def _pack_terms(matrices: Sequence[str | None], terms: Mapping[str, Sequence[tuple]]) -> array.array:
    packed = array.array("b")
    for name in sorted(terms, key=matrices.index):
        for down, up, scale in terms[name]:
            addresses, dtypes = (down.data_ptr(), up.data_ptr()), (DTYPES[down.dtype], DTYPES[up.dtype])
            packed.frombytes(_LOW_RANK.pack(matrices.index(name), down.shape[0], scale, *addresses, *dtypes))
    return packed


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rwkv_step(weights: Weights, x: Tensor, states: Sequence[Tensor]) -> Tensor:
    """One token for each of B sequences; returns the last hidden state after the final norm, (B, C).

    x (B, C) are the tokens' embeddings. `states` holds three tensors a layer, overwritten in place: the carried token
    of both token shifts, each B C values, and the WKV state in float32, (B, H, K, K), or (B, A, 3) in RWKV-4. All but
    the last are of the weights' dtype, and all are contiguous. Activations and sums are float32 whatever the dtype.
    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), "Eagle and Finch" (2024), RWKV-7
    "Goose" (2025).
    """
    sizes = weights.sizes
    addresses = array.array("q", map(Tensor.data_ptr, states))
    out = torch.empty_like(x)
    check(
        _step(
            _ARGUMENTS.pack(
                sizes.generation,
                x.shape[0],
                *sizes[1:6],
                *sizes.ranks,
                sizes.per_head,
                sizes.bonus_is_log,
                DTYPES[weights.dtype],
                torch.get_num_threads(),
                sizes.norm_eps,
                sizes.group_norm_eps,
                *weights.norms,
                weights.layers.buffer_info()[0],
                weights.time_mixes.buffer_info()[0],
                addresses.buffer_info()[0],
                x.data_ptr(),
                out.data_ptr(),
            )
        )
    )
    return out
