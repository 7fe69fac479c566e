"""What stands between the matrix products of a RWKV-7 block, each piece one operator: schemas, checks, gradients.

Letters: B batch rows, T tokens, C channels, H heads of N channels each, A = H N; `raw_w`, `raw_a` what decay and
in-context learning rate are made from; `r_k` bonus, g gate, o the output of the WKV operator.

Rows are float32, bfloat16 or float16, of any dtype each and strided at will; the arithmetic is float32. A backward pass
computes anew whatever it needs from the inputs, nothing else is kept. Gradients flow once.
"""

import ctypes
import struct

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .library import DTYPES, LIBRARY, check

MAX_MIXES = 6


def shift_mix(x: Tensor, before: Tensor | None, mixes: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each of up to six mixes of every token with the one before it, p: x + (p - x) mix, in `dtype`.

    x is (B, T, C), each mix has C values. `before` is (B, C), what precedes the first token of a row (None for zeros),
    or (B, T, C), what precedes each token. Raises ValueError naming the argument that does not fit.
    """
    return _run(torch.ops.wkv.rwkv7_shift_mix.default, x, before, mixes, dtype)


def key_stage(raw_w: Tensor, raw_k: Tensor, raw_a: Tensor, k_k: Tensor, k_a: Tensor, heads: int) -> tuple[Tensor, ...]:
    """What the WKV operator reads, (B, T, H, N) each: log_w in float32; k, a and b in the dtype of raw_k.

    log_w = -exp(-1/2) sigmoid(raw_w), eta = sigmoid(raw_a), kk = raw_k k_k divided by its norm in each head,
    k = raw_k (1 + (eta - 1) k_a), a = -kk, b = kk eta. Inputs are (B, T, A), parameters have A values. Raises
    ValueError naming the argument that does not fit.
    """
    return _run(torch.ops.wkv.rwkv7_key_stage.default, raw_w, raw_k, raw_a, k_k, k_a, heads)


def value_residual(v: Tensor, v_first: Tensor, raw: Tensor) -> Tensor:
    """v + (v_first - v) sigmoid(raw), in the shape (B, T, A) and dtype of v; ValueError names what does not fit."""
    return _run(torch.ops.wkv.rwkv7_value_residual.default, v, v_first, raw)


def out_stage(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """(group norm of o, affine, + bonus) g, where the bonus is v times the sum of r k r_k over a head.

    o, r, k and v are (B, T, H, N), g (B, T, A), r_k (H, N), weight and bias have A values. Returns (B, T, A) in the
    dtype of v. Raises ValueError naming the argument that does not fit.
    """
    return _run(torch.ops.wkv.rwkv7_out_stage.default, o, r, k, v, g, r_k, weight, bias, eps)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 for x (B, T, C)."""
    return _run(torch.ops.wkv.rwkv7_relu_squared.default, x)


def _run(op, *inputs):
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return op(*inputs)
    # Nothing to differentiate: going past autograd saves a single token some microseconds.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _check(shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Raises ValueError unless the tensors have this shape; a shape of one number counts their values."""
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if len(shape) == 1 and x.numel() != shape[0]:
            raise ValueError(f"{name} must have {shape[0]} values, not {x.numel()}")
        if len(shape) > 1 and x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, not {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, others on {device}: all arguments must be on one device")


def _sizes(name: str, x: Tensor, dimensions: int) -> torch.Size:
    if x.dim() != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, not shape {tuple(x.shape)}")
    return x.shape


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


class _Arguments:
    """The words of a structure of wkv.h, and the tensors that they point to."""

    __slots__ = ("tensors", "words")

    def __init__(self, x: Tensor, heads: int = 1) -> None:
        B, T = x.shape[:2]
        self.words = [B, T, heads, x.shape[2:].numel() // heads, torch.get_num_threads()]
        self.tensors = []

    def rows(self, *tensors: Tensor | None) -> "_Arguments":
        """Appends a wkv_rows for each tensor (B, T, A) or (B, T, H, N), or (B, A), one token a row."""
        for x in tensors:
            if x is None:
                self.words += (0, 0, 0, 0)
                continue
            strides = x.stride()
            if strides[-1] != 1 or (len(strides) == 4 and strides[2] != x.shape[3]):
                x = x.contiguous()
                strides = x.stride()
                self.tensors.append(x)
            self.words += (x.data_ptr(), DTYPES[x.dtype], strides[0], strides[1] if len(strides) > 2 else 0)
        return self

    def vectors(self, *tensors: Tensor) -> "_Arguments":
        """Appends a wkv_vector for each tensor."""
        for x in tensors:
            x = x.contiguous()
            self.tensors.append(x)
            self.words += (x.data_ptr(), DTYPES[x.dtype])
        return self


def _define(piece: str, schema: str, allocate, arguments, gradient_arguments) -> None:
    """Declares wkv::{piece} and wkv::{piece}_backward: on CPUs by libwkv, on GPUs by triton/rwkv7_fused.py.

    allocate(*inputs) checks the inputs and makes the outputs; arguments(inputs, outputs) are the words of the forward
    structure, which in a backward pass has gradients in place of the outputs; gradient_arguments(arguments, inputs,
    gradients) appends the words of the gradients, one for each tensor among the inputs.
    """
    inputs_schema, outputs_schema = schema.split(" -> ")
    backward = f"{piece}_backward"
    torch.library.define(f"wkv::{piece}", f"({inputs_schema}) -> {outputs_schema}")
    torch.library.define(f"wkv::{backward}", f"(Tensor[] grads, {inputs_schema}) -> Tensor[]")
    run_forward, run_backward = (getattr(LIBRARY, name) for name in (piece, backward))
    for function in (run_forward, run_backward):
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int

    def run(function, words: list[int]) -> None:
        check(function(struct.pack(f"{len(words)}q", *words)))

    def as_list(outputs) -> list[Tensor]:
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def forward_cpu(*inputs):
        outputs = allocate(*inputs)
        filled = arguments(inputs, as_list(outputs))
        run(run_forward, filled.words)
        return outputs

    def backward_fake(grads, *inputs):
        return [_empty(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]

    def backward_cpu(grads, *inputs):
        found = backward_fake(grads, *inputs)
        filled = gradient_arguments(arguments(inputs, grads), inputs, found)
        run(run_backward, filled.words)
        return found

    def run_on_gpu(name: str, inputs, *tensors: list[Tensor]) -> None:
        from .triton import rwkv7_fused

        with torch.cuda.device_of(inputs[0]):
            getattr(rwkv7_fused, name)(inputs, *tensors)

    def forward_cuda(*inputs):
        outputs = allocate(*inputs)
        run_on_gpu(piece, inputs, as_list(outputs))
        return outputs

    def backward_cuda(grads, *inputs):
        found = backward_fake(grads, *inputs)
        run_on_gpu(backward, inputs, grads, found)
        return found

    def setup_context(ctx, inputs, output) -> None:
        leaves, ctx.structure = pytree.tree_flatten(list(inputs))
        ctx.save_for_backward(*(x for x in leaves if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in leaves]

    def differentiate(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if other is None else other[0] for other in ctx.others]
        grads = grads[0] if isinstance(grads[0], list) else grads
        backward_op = getattr(torch.ops.wkv, backward).default
        found = iter(backward_op(list(grads), *pytree.tree_unflatten(leaves, ctx.structure)))
        leaves = [next(found) if other is None else None for other in ctx.others]
        return tuple(pytree.tree_unflatten(leaves, ctx.structure))

    def differentiate_twice(ctx, *grads):
        raise NotImplementedError(f"{piece} has no second derivative")

    torch.library.impl(f"wkv::{piece}", "CPU", forward_cpu)
    torch.library.impl(f"wkv::{backward}", "CPU", backward_cpu)
    torch.library.impl(f"wkv::{piece}", "CUDA", forward_cuda)
    torch.library.impl(f"wkv::{backward}", "CUDA", backward_cuda)
    torch.library.register_fake(f"wkv::{piece}", allocate)
    torch.library.register_fake(f"wkv::{backward}", backward_fake)
    torch.library.register_autograd(f"wkv::{piece}", differentiate, setup_context=setup_context)
    torch.library.register_autograd(f"wkv::{backward}", differentiate_twice)


def _allocate_shift_mix(x, before, mixes, dtype):
    B, _, C = _sizes("x", x, 3)
    _check(x.shape, x=x)
    if before is not None:
        _check((B, C) if before.dim() == 2 else x.shape, before=before)
    if not 1 <= len(mixes) <= MAX_MIXES:
        raise ValueError(f"there can be 1 to {MAX_MIXES} mixes, not {len(mixes)}")
    _check((C,), **{f"mixes[{i}]": mix for i, mix in enumerate(mixes)})
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    return [_empty(x, dtype) for _ in mixes]


def _fill(arguments: _Arguments, tensors: list[Tensor], add) -> _Arguments:
    """Appends tensors, and NULL for those that are missing to the greatest number of mixes."""
    before = len(arguments.words)
    add(*tensors)
    words_each = (len(arguments.words) - before) // len(tensors)
    arguments.words += [0] * (words_each * (MAX_MIXES - len(tensors)))
    return arguments


def _shift_mix(inputs, mixed):
    x, before, mixes, _ = inputs
    arguments = _Arguments(x)
    arguments.words += (len(mixes), before is not None and before.dim() == 3)
    arguments.rows(x, before)
    _fill(arguments, mixes, arguments.vectors)
    return _fill(arguments, mixed, arguments.rows)


def _shift_mix_gradients(arguments, inputs, grads):
    grad_x, *grads = grads
    grad_before = None if inputs[1] is None else grads.pop(0)
    return _fill(arguments.rows(grad_x, grad_before), grads, arguments.vectors)


_define(
    "rwkv7_shift_mix",
    "Tensor x, Tensor? before, Tensor[] mixes, ScalarType dtype -> Tensor[]",
    _allocate_shift_mix,
    _shift_mix,
    _shift_mix_gradients,
)


def _allocate_key_stage(raw_w, raw_k, raw_a, k_k, k_a, heads):
    B, T, A = _sizes("raw_w", raw_w, 3)
    _check(raw_w.shape, raw_w=raw_w, raw_k=raw_k, raw_a=raw_a)
    _check((A,), k_k=k_k, k_a=k_a)
    if heads < 1 or A % heads:
        raise ValueError(f"heads must divide the {A} channels, {heads} does not")
    shape = (B, T, heads, A // heads)
    return raw_w.new_empty(shape, dtype=torch.float32), *(raw_k.new_empty(shape) for _ in range(3))


_define(
    "rwkv7_key_stage",
    "Tensor raw_w, Tensor raw_k, Tensor raw_a, Tensor k_k, Tensor k_a, int heads -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_key_stage,
    lambda inputs, outputs: _Arguments(inputs[0], inputs[5]).rows(*inputs[:3]).vectors(*inputs[3:5]).rows(*outputs),
    lambda arguments, inputs, grads: arguments.rows(*grads[:3]).vectors(*grads[3:]),
)


def _allocate_value_residual(v, v_first, raw):
    _check(_sizes("v", v, 3), v=v, v_first=v_first, raw=raw)
    return _empty(v)


_define(
    "rwkv7_value_residual",
    "Tensor v, Tensor v_first, Tensor raw -> Tensor",
    _allocate_value_residual,
    lambda inputs, outputs: _Arguments(inputs[0]).rows(*inputs, *outputs),
    lambda arguments, inputs, grads: arguments.rows(*grads),
)


def _allocate_out_stage(o, r, k, v, g, r_k, weight, bias, eps):
    B, T, H, N = _sizes("o", o, 4)
    _check(o.shape, o=o, r=r, k=k, v=v)
    _check((B, T, H * N), g=g)
    _check((H * N,), r_k=r_k, weight=weight, bias=bias)
    return v.new_empty((B, T, H * N))


def _out_stage(inputs, outputs):
    arguments = _Arguments(inputs[0], inputs[0].shape[2])
    arguments.words += struct.unpack("q", struct.pack("d", inputs[8]))
    return arguments.rows(*inputs[:5]).vectors(*inputs[5:8]).rows(*outputs)


_define(
    "rwkv7_out_stage",
    "Tensor o, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, float eps -> Tensor",
    _allocate_out_stage,
    _out_stage,
    lambda arguments, inputs, grads: arguments.rows(*grads[:5]).vectors(*grads[5:]),
)


def _allocate_relu_squared(x):
    _check(_sizes("x", x, 3), x=x)
    return _empty(x)


_define(
    "rwkv7_relu_squared",
    "Tensor x -> Tensor",
    _allocate_relu_squared,
    lambda inputs, outputs: _Arguments(inputs[0]).rows(*inputs, *outputs),
    lambda arguments, inputs, grads: arguments.rows(*grads),
)
