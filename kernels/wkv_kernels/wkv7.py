"""The operator wkv7 of RWKV-7: schema, checks, CPU implementation, gradients.

Letters: B batch rows, T tokens, H heads, K key channels of a head, V value channels of a head, n packed sequences,
S the state (K, V), log_w the logarithm of the decay, a and b the rank-one change of the state, o the output.
"""

import ctypes
import struct

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

_INPUTS = "Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, Tensor? cu_seqlens"
torch.library.define("wkv::wkv7", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "wkv::wkv7_backward",
    f"(Tensor? grad_o, Tensor? grad_final_state, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_NAMES = ("r", "log_w", "k", "v", "a", "b")
_OP = torch.ops.wkv.wkv7.default

# wkv7_forward_args and wkv7_backward_args of wkv.h.
_FORWARD = struct.Struct("49q")
_BACKWARD = struct.Struct("82q")

_forward = LIBRARY.wkv7_forward
_backward = LIBRARY.wkv7_backward
for _function in (_forward, _backward):
    _function.argtypes = [ctypes.c_char_p]
    _function.restype = ctypes.c_int


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-7: sa = a S, S = diag(exp(log_w)) S + b^T sa + k^T v, o = r S, in float32.

    r, log_w, k, a, b are (B, T, H, K) and v is (B, T, H, V), each float32, bfloat16 or float16, strided at will. state
    (B, H, K, V) float32 is the state before the first token, None for zeros. cu_seqlens (n + 1,) int32 or int64 says
    that the single row holds n sequences, sequence i at tokens cu_seqlens[i] to cu_seqlens[i + 1]; states then have n
    rows. Returns o (B, T, H, V) in the dtype of v and the state after the last token, float32. Gradients flow to every
    input but cu_seqlens, once. Raises ValueError naming the argument that does not fit. Source: RWKV-7 "Goose" (Peng et
    al. 2025), with the state transposed.
    """
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled()
        and (
            r.requires_grad
            or log_w.requires_grad
            or k.requires_grad
            or v.requires_grad
            or a.requires_grad
            or b.requires_grad
            or (state is not None and state.requires_grad)
        )
    ):
        return _OP(r, log_w, k, v, a, b, state, cu_seqlens)
    # Nothing to differentiate: going past autograd saves a single token five microseconds.
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(r, log_w, k, v, a, b, state, cu_seqlens)


def _check(r, log_w, k, v, a, b, state, cu_seqlens) -> None:
    shape, device = r.shape, r.device
    if len(shape) != 4:
        raise ValueError(f"r must have four dimensions (B, T, H, K), not shape {tuple(shape)}")
    for name, x in zip(_NAMES, (r, log_w, k, v, a, b), strict=True):
        if x.shape != shape and (name != "v" or x.dim() != 4 or x.shape[:3] != shape[:3]):
            but = " but for the last dimension" if name == "v" else ""
            raise ValueError(f"{name} must have the shape of r, {tuple(shape)}{but}, not {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, not {x.dtype}")
        if x.device != device:
            raise _wrong_device(name, x, device)
    rows = shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens must be a vector of n + 1 int32 or int64, not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        if rows != 1:
            raise ValueError(f"cu_seqlens packs sequences in one row, but r has {rows} rows")
        if cu_seqlens.device != device:
            raise _wrong_device("cu_seqlens", cu_seqlens, device)
        rows = cu_seqlens.shape[0] - 1
    if state is not None:
        if state.shape != (rows, shape[2], shape[3], v.shape[3]):
            expected = (rows, shape[2], shape[3], v.shape[3])
            raise ValueError(f"state must have shape {expected}, not {tuple(state.shape)}")
        if state.dtype != torch.float32:
            raise ValueError(f"state must be float32, not {state.dtype}")
        if state.device != device:
            raise _wrong_device("state", state, device)


def _wrong_device(name: str, x: Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{name} is on {x.device}, r on {device}: all arguments must be on one device")


class _Arguments:
    """The words of a structure of wkv.h, and the tensors that they point to."""

    __slots__ = ("tensors", "words")

    def __init__(self, r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        B, T, H, K = r.shape
        self.tensors = []
        self.words = [B, T, H, K, v.shape[3], torch.get_num_threads(), 0, 0]
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.contiguous()
            self.tensors.append(cu_seqlens)
            self.words[0] = cu_seqlens.shape[0] - 1
            self.words[6:] = cu_seqlens.data_ptr(), cu_seqlens.dtype == torch.int64

    def add(self, *tensors: Tensor) -> None:
        """Appends wkv_tensor after wkv_tensor."""
        for x in tensors:
            strides = x.stride()
            if strides[3] != 1:
                x = x.contiguous()
                self.tensors.append(x)
                strides = x.stride()
            self.words += (x.data_ptr(), DTYPES[x.dtype], strides[0], strides[1], strides[2])

    def add_state(self, x: Tensor | None) -> None:
        """Appends a wkv_state."""
        if x is None:
            self.words += (0, 0, 0)
            return
        strides = x.stride()
        if strides[3] != 1 or strides[2] != x.shape[3]:
            x = x.contiguous()
            self.tensors.append(x)
            strides = x.stride()
        self.words += (x.data_ptr(), strides[0], strides[1])


def _new_state(r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    B, _, H, K = r.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty((rows, H, K, v.shape[3]), dtype=torch.float32, device=r.device)


def _new_rows(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("wkv::wkv7", "CPU")
def _wkv7_cpu(r, log_w, k, v, a, b, state, cu_seqlens):
    _check(r, log_w, k, v, a, b, state, cu_seqlens)
    o = _new_rows(v)
    final_state = _new_state(r, v, cu_seqlens)
    arguments = _Arguments(r, v, cu_seqlens)
    arguments.add(r, log_w, k, v, a, b)
    arguments.add_state(state)
    arguments.add(o)
    arguments.add_state(final_state)
    check(_forward(_FORWARD.pack(*arguments.words)))
    return o, final_state


@torch.library.impl("wkv::wkv7_backward", "CPU")
def _wkv7_backward_cpu(grad_o, grad_final_state, r, log_w, k, v, a, b, state, cu_seqlens):
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    grads = [_new_rows(x) for x in (r, log_w, k, v, a, b)]
    grad_state = _new_state(r, v, cu_seqlens)
    arguments = _Arguments(r, v, cu_seqlens)
    arguments.add(r, log_w, k, v, a, b)
    arguments.add_state(state)
    arguments.add(grad_o)
    arguments.add_state(grad_final_state)
    arguments.add(*grads)
    arguments.add_state(grad_state)
    check(_backward(_BACKWARD.pack(*arguments.words)))
    return *grads, grad_state


@torch.library.register_fake("wkv::wkv7")
def _wkv7_fake(r, log_w, k, v, a, b, state, cu_seqlens):
    _check(r, log_w, k, v, a, b, state, cu_seqlens)
    return _new_rows(v), _new_state(r, v, cu_seqlens)


@torch.library.register_fake("wkv::wkv7_backward")
def _wkv7_backward_fake(grad_o, grad_final_state, r, log_w, k, v, a, b, state, cu_seqlens):
    return *(_new_rows(x) for x in (r, log_w, k, v, a, b)), _new_state(r, v, cu_seqlens)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_o, grad_final_state):
    r, log_w, k, v, a, b, state, cu_seqlens = ctx.saved_tensors
    *grads, grad_state = torch.ops.wkv.wkv7_backward.default(
        grad_o, grad_final_state, r, log_w, k, v, a, b, state, cu_seqlens
    )
    return *grads, None if state is None else grad_state, None


def _differentiate_twice(ctx, *grads):
    raise NotImplementedError("wkv7 has no second derivative")


torch.library.register_autograd("wkv::wkv7", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("wkv::wkv7_backward", _differentiate_twice)
