"""One token of a whole RWKV-7 model in one call: weights are read in place, states are overwritten.

Letters: B sequences, C residual width, H heads of K channels, A = H K, F hidden units of the feed-forward, L layers, S
the WKV state (K, K).
"""

import array
import ctypes
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

# The tensors of a layer, as wkv_rwkv7_layer of wkv.h orders them.
LAYER_TENSORS = (
    *("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias"),
    *("attn.x_r", "attn.x_w", "attn.x_k", "attn.x_v", "attn.x_a", "attn.x_g"),
    *("attn.k_k", "attn.k_a", "attn.r_k", "attn.g_norm.weight", "attn.g_norm.bias"),
    *("attn.r_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", "attn.o_proj.weight"),
    *("attn.w_lora.lora.0.weight", "attn.w_lora.lora.2.weight", "attn.w_lora.lora.2.bias"),
    *("attn.a_lora.lora.0.weight", "attn.a_lora.lora.2.weight", "attn.a_lora.lora.2.bias"),
    *("attn.v_lora.lora.0.weight", "attn.v_lora.lora.2.weight", "attn.v_lora.lora.2.bias"),
    *("attn.g_lora.lora.0.weight", "attn.g_lora.lora.2.weight"),
    *("ffn.x_k", "ffn.key.weight", "ffn.value.weight"),
)

# wkv_rwkv7_step_args of wkv.h.
_ARGUMENTS = struct.Struct("12q2d8q")

_step = LIBRARY.wkv_rwkv7_step
_step.argtypes = [ctypes.c_char_p]
_step.restype = ctypes.c_int


class Sizes(NamedTuple):
    """The shape of a model, and the epsilons of its norms."""

    C: int
    H: int
    K: int
    F: int
    L: int
    w_rank: int
    a_rank: int
    v_rank: int
    g_rank: int
    norm_eps: float
    group_norm_eps: float


class Weights:
    """Where the weights of a model are. Holds addresses only: whoever calls keeps the tensors alive, and in place.

    `layers` holds, for each layer, its tensors in the order of LAYER_TENSORS, None for those that layer 0 lacks;
    `norms` weight and bias of the first and of the last norm. All are of one dtype and contiguous, but `ffn.value`,
    (C, F), may have the strides (1, C): then the hidden units whose activation is zero are not read.
    """

    def __init__(self, sizes: Sizes, layers: Iterable[Sequence[Tensor | None]], norms: Sequence[Tensor]):
        self.sizes = sizes
        self.dtype = norms[0].dtype
        self.norms = [x.data_ptr() for x in norms]
        self.layers = array.array("q")
        for layer in layers:
            value = layer[LAYER_TENSORS.index("ffn.value.weight")]
            self.layers.extend([0 if x is None else x.data_ptr() for x in layer])
            self.layers.append(not value.is_contiguous())


def rwkv7_step(weights: Weights, x: Tensor, states: Sequence[Tensor]) -> Tensor:
    """One token for each of B sequences; returns the last hidden state after the final norm, (B, C).

    x (B, C) are the tokens' embeddings. `states` holds three tensors a layer, overwritten in place: the carried token
    of both token shifts, each B C values, and the WKV state (B, H, K, K) in float32. All but the last are of the
    weights' dtype, and all are contiguous. Activations and sums are float32 whatever the dtype.
    Source: RWKV-7 "Goose" (Peng et al. 2025), section 4.
    """
    sizes = weights.sizes
    addresses = array.array("q", map(Tensor.data_ptr, states))
    out = torch.empty_like(x)
    check(
        _step(
            _ARGUMENTS.pack(
                x.shape[0],
                *sizes[:9],
                DTYPES[weights.dtype],
                torch.get_num_threads(),
                *sizes[9:],
                *weights.norms,
                weights.layers.buffer_info()[0],
                addresses.buffer_info()[0],
                x.data_ptr(),
                out.data_ptr(),
            )
        )
    )
    return out
