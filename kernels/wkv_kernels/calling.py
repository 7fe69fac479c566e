"""What the WKV operators share between torch and libwkv: schema, checks, structures of wkv.h, gradients.

Letters: B batch rows, T tokens, H heads, K key channels of a head, V value channels of a head, n packed sequences.
An operator is op(*rows, state, cu_seqlens) -> (o, final_state), with v among the rows.
"""

import ctypes
import importlib
import struct
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .library import DTYPES, LIBRARY, check

# 64-bit words of a wkv_sizes, a wkv_tensor and a wkv_state.
_SIZES, _TENSOR, _STATE = 8, 5, 3


# What the checks of an operator find out: the name of the argument that shapes are compared with; B, T, H, K, V as in
# wkv_sizes; the shape of a sequence's state.
Shapes = tuple[str, int, int, int, int, int, tuple[int, ...]]


def run(op: torch._ops.OpOverload, *args: Tensor | None) -> tuple[Tensor, Tensor]:
    """Calls an operator."""
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled():
        for x in args:
            if x is not None and x.requires_grad:
                return op(*args)
    # Nothing to differentiate: going past autograd saves a single token five microseconds.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def check_tensor(name: str, x: Tensor, device: torch.device, of: str) -> None:
    """Raises ValueError unless x is of a dtype that the library reads and lies where `of` does."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {x.dtype}")
    check_device(name, x, device, of)


def check_device(name: str, x: Tensor, device: torch.device, of: str) -> None:
    """Raises ValueError unless x lies where `of` does."""
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, {of} on {device}: all arguments must be on one device")


def check_heads(rows: Iterable[tuple[str, Tensor]], v: Tensor) -> Shapes:
    """Checks r and what has its shape (B, T, H, K), v but for the last dimension."""
    for name, x in rows:
        if name == "r":
            shape, device = x.shape, x.device
            if len(shape) != 4:
                raise ValueError(f"r must have four dimensions (B, T, H, K), not shape {tuple(shape)}")
        elif x.shape != shape and (x is not v or x.dim() != 4 or x.shape[:3] != shape[:3]):
            but = " but for the last dimension" if x is v else ""
            raise ValueError(f"{name} must have the shape of r, {tuple(shape)}{but}, not {tuple(x.shape)}")
        if x.dtype not in DTYPES or x.device != device:
            check_tensor(name, x, device, "r")
    B, T, H, K = shape
    V = v.shape[3]
    return "r", B, T, H, K, V, (H, K, V)


def check_shared(name: str, x: Tensor, shape: tuple[int, ...], of: str) -> None:
    """Raises ValueError unless x has this shape, or 1 instead of B or T."""
    if x.dim() != len(shape) or x.shape[2:] != shape[2:] or not all(x.shape[i] in (1, shape[i]) for i in (0, 1)):
        expected = f"the shape of {of}, {tuple(shape)}, or 1 in its first two dimensions"
        raise ValueError(f"{name} must have {expected}, not {tuple(x.shape)}")


def _check_rest(shapes: Shapes, device: torch.device, state: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Checks the state and the packing; returns the number of sequences."""
    of, rows, *_, expected = shapes
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens must be a vector of n + 1 int32 or int64, not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        if rows != 1:
            raise ValueError(f"cu_seqlens packs sequences in one row, but {of} has {rows} rows")
        check_device("cu_seqlens", cu_seqlens, device, of)
        rows = cu_seqlens.shape[0] - 1
    if state is not None:
        if state.shape != (rows, *expected):
            raise ValueError(f"state must have shape {(rows, *expected)}, not {tuple(state.shape)}")
        if state.dtype != torch.float32:
            raise ValueError(f"state must be float32, not {state.dtype}")
        check_device("state", state, device, of)
    return rows


class _Arguments:
    """The words of a structure of wkv.h, and the tensors that they point to."""

    __slots__ = ("tensors", "words")

    def __init__(self, shapes: Shapes, n_seq: int, cu_seqlens: Tensor | None) -> None:
        _, _, T, H, K, V, _ = shapes
        self.tensors = []
        self.words = [n_seq, T, H, K, V, torch.get_num_threads(), 0, 0]
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.contiguous()
            self.tensors.append(cu_seqlens)
            self.words[6:] = cu_seqlens.data_ptr(), cu_seqlens.dtype == torch.int64

    def add(self, *tensors: Tensor) -> None:
        """Appends wkv_tensor after wkv_tensor: (B, T, H, N), (B, T, N), (H, N) or (N,)."""
        for x in tensors:
            strides = x.stride()
            if strides[-1] != 1:
                x = self._contiguous(x)
                strides = x.stride()
            if len(strides) == 4:
                batch, token, head, _ = strides
            else:
                batch, token = strides[:2] if len(strides) == 3 else (0, 0)
                head = strides[0] if len(strides) == 2 else 0
            self.words += (x.data_ptr(), DTYPES[x.dtype], batch, token, head)

    def add_state(self, x: Tensor | None) -> None:
        """Appends a wkv_state."""
        if x is None:
            self.words += (0, 0, 0)
            return
        strides = x.stride()
        if strides[-1] != 1 or strides[-2] != x.shape[-1]:
            x = self._contiguous(x)
            strides = x.stride()
        self.words += (x.data_ptr(), strides[0], strides[1])

    def _contiguous(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self.tensors.append(x)
        return x


def _new_rows(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def declare(name: str, rows: tuple[str, ...], shapes_of: Callable[..., Shapes]) -> torch._ops.OpOverload:
    """Declares operator `name` with torch: CPU, CUDA and ROCm, fake tensors, gradients. Returns what `run` calls.

    CPUs are served by libwkv, GPUs by the module of that name in `triton/`, imported at the first call. `rows` names
    the tensors before state and cu_seqlens, in the order of wkv.h; `shapes_of` checks them. log_w may have one row or
    one token for all, and then its gradient is summed over them.
    """
    inputs = ", ".join([f"Tensor {x}" for x in rows] + ["Tensor? state", "Tensor? cu_seqlens"])
    gradients = ", ".join(["Tensor"] * (len(rows) + 1))
    torch.library.define(f"wkv::{name}", f"({inputs}) -> (Tensor, Tensor)")
    torch.library.define(
        f"wkv::{name}_backward", f"(Tensor? grad_o, Tensor? grad_final_state, {inputs}) -> ({gradients})"
    )
    forward_words = struct.Struct(f"{_SIZES + (len(rows) + 1) * _TENSOR + 2 * _STATE}q")
    backward_words = struct.Struct(f"{_SIZES + (2 * len(rows) + 1) * _TENSOR + 3 * _STATE}q")
    v_at, decay_at = rows.index("v"), rows.index("log_w")
    functions = [getattr(LIBRARY, f"{name}_{direction}") for direction in ("forward", "backward")]
    for function in functions:
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int
    run_forward, run_backward = functions

    def examine(args):
        shapes = shapes_of(*args[:-2])
        return shapes, _check_rest(shapes, args[0].device, *args[-2:])

    def new_state(shapes, n_seq, like):
        return torch.empty((n_seq, *shapes[-1]), dtype=torch.float32, device=like.device)

    def add_rows(arguments, tensors):
        decay = len(arguments.words) + decay_at * _TENSOR
        arguments.add(*tensors)
        # Strides are 0 where rows or tokens share a decay.
        if tensors[decay_at].shape[0] == 1:
            arguments.words[decay + 2] = 0
        if tensors[decay_at].shape[1] == 1:
            arguments.words[decay + 3] = 0

    def add_inputs(shapes, n_seq, args):
        arguments = _Arguments(shapes, n_seq, args[-1])
        add_rows(arguments, args[:-2])
        arguments.add_state(args[-2])
        return arguments

    def forward(*args):
        shapes, n_seq = examine(args)
        o, final_state = _new_rows(args[v_at]), new_state(shapes, n_seq, args[v_at])
        arguments = add_inputs(shapes, n_seq, args)
        arguments.add(o)
        arguments.add_state(final_state)
        check(run_forward(forward_words.pack(*arguments.words)))
        return o, final_state

    def backward(grad_o, grad_final_state, *args):
        shapes, n_seq = examine(args)
        if grad_o is None:
            grad_o = torch.zeros_like(args[v_at])
        grads, grad_state = [_new_rows(x) for x in args[:-2]], new_state(shapes, n_seq, args[v_at])
        log_w, B = args[decay_at], shapes[1]
        # One row of decays for several rows of tokens: the library writes one each.
        if B > 1 and log_w.shape[0] == 1 and log_w.shape[1] > 1:
            grads[decay_at] = log_w.new_empty((B, *log_w.shape[1:]), dtype=torch.float32)
        arguments = add_inputs(shapes, n_seq, args)
        arguments.add(grad_o)
        arguments.add_state(grad_final_state)
        add_rows(arguments, grads)
        arguments.add_state(grad_state)
        check(run_backward(backward_words.pack(*arguments.words)))
        if grads[decay_at].shape != log_w.shape:
            grads[decay_at] = grads[decay_at].sum(0, keepdim=True).to(log_w.dtype)
        return *grads, grad_state

    def on_gpu():
        return importlib.import_module(f".triton.{name}", __package__)

    def forward_on_gpu(*args):
        examine(args)
        with torch.cuda.device_of(args[0]):
            return on_gpu().forward(*args)

    def backward_on_gpu(grad_o, grad_final_state, *args):
        examine(args)
        with torch.cuda.device_of(args[0]):
            return on_gpu().backward(grad_o, grad_final_state, *args)

    def fake_forward(*args):
        shapes, n_seq = examine(args)
        return _new_rows(args[v_at]), new_state(shapes, n_seq, args[v_at])

    def fake_backward(grad_o, grad_final_state, *args):
        shapes, n_seq = examine(args)
        return *(_new_rows(x) for x in args[:-2]), new_state(shapes, n_seq, args[v_at])

    op = getattr(torch.ops.wkv, name).default
    op_backward = getattr(torch.ops.wkv, f"{name}_backward").default

    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad_o, grad_final_state):
        # Checkpointing lets them be unpacked once.
        inputs = ctx.saved_tensors
        *grads, grad_state = op_backward(grad_o, grad_final_state, *inputs)
        return *grads, None if inputs[-2] is None else grad_state, None

    def differentiate_twice(ctx, *grads):
        raise NotImplementedError(f"{name} has no second derivative")

    torch.library.impl(f"wkv::{name}", "CPU")(forward)
    torch.library.impl(f"wkv::{name}_backward", "CPU")(backward)
    torch.library.impl(f"wkv::{name}", "CUDA")(forward_on_gpu)
    torch.library.impl(f"wkv::{name}_backward", "CUDA")(backward_on_gpu)
    torch.library.register_fake(f"wkv::{name}")(fake_forward)
    torch.library.register_fake(f"wkv::{name}_backward")(fake_backward)
    torch.library.register_autograd(f"wkv::{name}", differentiate, setup_context=keep)
    torch.library.register_autograd(f"wkv::{name}_backward", differentiate_twice)
    return op
