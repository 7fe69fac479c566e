"""Which Triton kernels calls of the operators launch, and with what: a call on meta tensors tells, without a GPU."""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
# Sizes of the calls: tokens, and channels of all heads.
T, C = 4096, 2048


@dataclass(frozen=True)
class Case:
    """Heads of N channels, the dtype of rows but for log_w, sequences packed or each with a state."""

    N: int
    dtype: torch.dtype
    packed: bool = False

    def __str__(self) -> str:
        return f"N = {self.N}, {TYPES[self.dtype]}" + ", packed" * self.packed


# float16 differs from one of the others by conversions, packed sequences by two loads in place of a division.
CASES = (
    *(Case(N, dtype) for N in (64, 32, 128, 16) for dtype in (torch.bfloat16, torch.float32)),
    Case(64, torch.float16, packed=True),
)


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched: types and constants of its arguments, and its options.

    Arguments that are tuples have a tuple of types; constants and what is a multiple of 16 are told by their path.
    """

    kernel: JITFunction
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """The kernel's name, and which of its switches are on: one source makes several programs."""
        given = {self.kernel.arg_names[path[0]]: value for path, value in self.constants if len(path) == 1}
        return ", ".join([self.kernel.__name__, *(name.lower() for name, value in given.items() if value is True)])


def launches(call: Callable, arch: str) -> list[Launch]:
    """What a call of kernels would launch on a device of this architecture."""
    found = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants, aligned = [], []

        def kind(path: tuple[int, ...], value, parameter):
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                constants.append((path, value))
                return "constexpr"
            if isinstance(value, tuple):
                return tuple(kind((*path, i), x, parameter) for i, x in enumerate(value))
            if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
                aligned.append(path)
            if isinstance(value, torch.Tensor):
                return "*" + TYPES[value.dtype]
            return "i32" if isinstance(value, int) else "fp32"

        signature = [(p.name, kind((i,), given[p.name], p)) for i, p in enumerate(kernel.params)]
        found[Launch(kernel, *map(tuple, (signature, constants, aligned, sorted(options.items()))))] = True

    rocm = None if arch.startswith("sm_") else "any version"
    with mock.patch.object(JITFunction, "run", record), mock.patch.object(torch.version, "hip", rocm):
        call()
    return list(found)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def wkv_calls(op: str, cases: Iterable[Case] = CASES) -> Iterator[tuple[str, Callable]]:
    """A forward call, a backward call and a step of wkv6 or wkv7 for every case."""
    module = importlib.import_module(f"wkv_kernels.triton.{op}")
    for case in cases:
        H = C // case.N
        x, log_w, u = meta(1, T, H, case.N, dtype=case.dtype), meta(1, T, H, case.N), meta(H, case.N)
        # Models of RWKV-5 and 6 have v in float32.
        v = meta(1, T, H, case.N) if op == "wkv6" else x
        rows = (x, log_w, u, x, v) if op == "wkv6" else (x, log_w, x, v, x, x)
        step = (row if row is u else row[:, :1] for row in rows)
        state, packing = meta(1, H, case.N, case.N), meta(3, dtype=torch.int64)
        rest = (None, packing) if case.packed else (state, None)
        yield str(case), functools.partial(module.forward, *rows, *rest)
        yield str(case), functools.partial(module.backward, v, rest[0], *rows, *rest)
        yield str(case), functools.partial(module.forward, *step, *rest)


def wkv4_calls(cases: Iterable[Case] = CASES) -> Iterator[tuple[str, Callable]]:
    """A forward and a backward call for every case; there are no heads."""
    module = importlib.import_module("wkv_kernels.triton.wkv4")
    log_w, u, state, packing = meta(1, 1, C), meta(C), meta(1, C, 3), meta(3, dtype=torch.int64)
    for case in cases:
        k = meta(1, T, C, dtype=case.dtype)
        rest = (None, packing) if case.packed else (state, None)
        yield str(case), functools.partial(module.forward, log_w, u, k, k, *rest)
        yield str(case), functools.partial(module.backward, k, rest[0], log_w, u, k, k, *rest)


def fused_calls(cases: Iterable[Case] = CASES) -> Iterator[tuple[str, Callable]]:
    """Each piece, forwards and backwards, as a model calls it; nothing is packed."""
    module = importlib.import_module("wkv_kernels.triton.rwkv7_fused")
    for case in cases:
        H, dtype = C // case.N, case.dtype
        x, h, p = meta(1, T, C, dtype=dtype), meta(1, T, H, case.N, dtype=dtype), meta(C, dtype=dtype)
        log_w, before = meta(1, T, H, case.N), x[:, 0]
        calls = [
            ("key_stage", (x, x, x, p, p, H), [log_w, h, h, h], [x, x, x, p, p]),
            ("value_residual", (x, x, x), [x], [x, x, x]),
            ("out_stage", (h, h, h, h, x, p, p, p, 64e-5), [x], [h, h, h, h, x, p, p, p]),
            ("relu_squared", (x,), [x], [x]),
        ]
        for mixes, shifted in ((6, []), (6, [before]), (1, [before]), (1, [x])):
            inputs = x, *(shifted or [None]), [p] * mixes, dtype
            calls.append(("shift_mix", inputs, [x] * mixes, [x, *shifted, *[p] * mixes]))
        for piece, inputs, outputs, gradients in calls:
            yield str(case), functools.partial(getattr(module, f"rwkv7_{piece}"), inputs, outputs)
            yield str(case), functools.partial(getattr(module, f"rwkv7_{piece}_backward"), inputs, outputs, gradients)


# A row per operator: calls that between them launch each of its kernels in each configuration.
CALLS = {
    "wkv4": wkv4_calls,
    "wkv6": functools.partial(wkv_calls, "wkv6"),
    "wkv7": functools.partial(wkv_calls, "wkv7"),
    "rwkv7_fused": fused_calls,
}


def named_launches(op: str, arch: str, cases: Iterable[Case] = CASES) -> dict[Launch, str]:
    """Each launch of an operator's calls, and the first case that makes it."""
    found = {}
    for name, call in CALLS[op](cases):
        for launch in launches(call, arch):
            found.setdefault(launch, name)
    return found


def kernels_of(op: str) -> set[str]:
    """Names of all kernels that an operator's module has."""
    module = importlib.import_module(f"wkv_kernels.triton.{op}")
    return {name for name, x in vars(module).items() if isinstance(x, JITFunction) and name.endswith("_kernel")}
