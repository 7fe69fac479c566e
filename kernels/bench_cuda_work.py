"""What the Triton kernels multiply and move, and the least time that takes an H100: the predictions of bench_cuda.py.

Letters: H heads of N channels, K keys and V values of a head (both N), n tokens of a chunk; `size` the bytes of an
element of a row. kernels/README.md derives the kernels.
"""

import importlib
import math
from dataclasses import dataclass

import torch

# Of an H100 SXM as its maker states them: bytes, and bfloat16 operations on tensor cores, a second.
BANDWIDTH, RATE = 3.35e12, 989e12
# How many products of bfloat16 one of these takes as long as; see wkv_kernels/triton/common.py.
PARTS = {"tf32": 2, "tf32x3": 6, "bf16x3": 3, "bf16x6": 6}


@dataclass(frozen=True)
class Work:
    """What a launch of a kernel moves, bytes, and multiplies, multiply-adds of bfloat16, for a token of a head."""

    kernel: str
    bytes: float
    products: float = 0

    def seconds(self, heads: int) -> float:
        """Of so many tokens of a head."""
        return heads * max(2 * self.products / RATE, self.bytes / BANDWIDTH)


@dataclass(frozen=True)
class Works:
    """The launches of a call, forward and backward."""

    forward: list[Work]
    backward: list[Work]

    def seconds(self, heads: int) -> tuple[float, float]:
        """Forward, and with backward."""
        forward, backward = (sum(work.seconds(heads) for work in works) for works in (self.forward, self.backward))
        return forward, forward + backward

    def by_kernel(self, heads: int) -> dict[str, tuple[int, float]]:
        """Of a call with its backward pass, by the name of a kernel: launches and seconds."""
        found = {}
        for work in self.forward + self.backward:
            calls, seconds = found.get(work.kernel, (0, 0.0))
            found[work.kernel] = calls + 1, seconds + work.seconds(heads)
        return found


def _module(op: str):
    return importlib.import_module(f"wkv_kernels.triton.{op}")


def _parts() -> tuple[int, int]:
    """Of an ordinary product of bfloat16 rows, and of one that is exact whatever the rows are."""
    return PARTS[_module("common").precision(torch.empty(0, dtype=torch.bfloat16))], PARTS["tf32x3"]


def wkv7_work(N: int, size: int) -> Works:
    """triton/wkv7.py."""
    n, K, V = _module("wkv7").CONFIGURATIONS[N].n, N, N
    once, exact = _parts()
    rows = size * (4 * K + V) + 4 * K
    matrices, state = 4 * (K * K + K * V) / n, 4 * K * V / n
    inverse = exact * (K + n) * n + once * n * n * (2 * math.log2(n) - 1)
    prepare = inverse + once * ((5 * K + n) * n + K * K + K * V)
    scan = Work("scan_kernel", matrices + state, exact * K * K * V / n)
    to_values = once * ((3 * K + 6 * V) * n + 3 * K * V)
    to_keys = once * ((10 * K + 4 * V) * n + 4 * K * V)
    return Works(
        [
            Work("prepare_kernel", rows + matrices + 4 * (K + n), prepare + once * (K + n) * n),
            scan,
            Work("output_kernel", 4 * (K + n) + state + 2 * size * V, once * (K + n) * V),
        ],
        [
            Work("prepare_kernel", rows + size * V + matrices + state + 4 * n, prepare + once * K * V),
            scan,
            scan,
            Work("value_gradient_kernel", rows + 2 * size * V + 4 * n + 2 * state + 8 * V, to_values),
            Work("key_gradient_kernel", 2 * rows + 2 * state + 8 * V, to_keys),
        ],
    )


def wkv6_work(N: int, size: int) -> Works:
    """triton/wkv6.py, a decay of its own for every token, in float32; pairs within blocks are not on tensor cores."""
    module = _module("wkv6")
    n, b, K, V = module.CONFIGURATIONS[N].n, module.BLOCK.value, N, N
    once, exact = _parts()
    levels, state = int(math.log2(n // b)), 4 * K * V / n
    # Sums of log_w over the tokens that a mask of ones chooses: two products of tf32, whatever the rows are.
    sums = 2 * PARTS["tf32"] * n * K
    weights = 4 * b
    add_up = Work("add_up_kernel", size * (K + V) + 4 * K + state + 4 * K / n, sums + exact * K * V)
    scan = Work("scan_kernel", 2 * state + 4 * K / n)
    pairs = Work("weights_kernel", size * 2 * K + 4 * K + weights)
    output = Work(
        "output_kernel",
        size * (2 * K + 2 * V) + 4 * K + state + weights,
        (levels + 1) * sums + once * (levels * n * K + n * V + K * V),
    )
    gradient = Work(
        "gradient_kernel",
        size * (2 * K + 2 * V) + 4 * K + 2 * state + weights + 12 * K,
        (levels + 1) * sums + once * ((2 * levels + 2) * n * K + 2 * n * V + 2 * K * V),
    )
    keys = Work("key_gradient_kernel", size * 3 * K + 16 * K + weights + 4 * K / n)
    readers = Work("reader_gradient_kernel", size * 2 * K + 8 * K + weights)
    return Works(
        [add_up, scan, pairs, output],
        [add_up, scan, add_up, scan, pairs, output, gradient, keys, readers],
    )


def wkv4_work(N: int, size: int) -> Works:
    """triton/wkv4.py, one decay for all tokens; exponentials and divisions hide behind memory."""
    module = _module("wkv4")
    n, states, pulls = module.TOKENS, 4 * module.STATE_PLANES.value, 4 * module.PULL_PLANES.value
    # a, b, and p in two parts; what gradients go on with.
    state, pulled = 16, 8

    def work(kernel: str, rows: int, planes: int) -> Work:
        return Work(f"{kernel}_kernel", (size * rows + planes / n) * N)

    before = [work("add_up", 2, states), work("scan", 0, states + state)]
    return Works(
        [*before, work("output", 3, state)],
        [
            *before,
            work("pull", 3, state + pulls),
            work("scan_back", 0, pulls + pulled),
            work("gradient", 5, state + pulled + 8),
        ],
    )


def fused_works(N: int, size: int) -> dict[str, Works]:
    """triton/rwkv7_fused.py by piece, for many tokens of a model whose hidden layers are four times as wide."""
    run = _module("rwkv7_fused").LONGEST_RUN

    def works(piece: str, forward: float, backward: float, sums: int = 0, width: int = 1) -> Works:
        parts = 4 * sums / run
        adding = [Work("add_parts_kernel", parts * N)] if sums else []
        return Works(
            [Work(f"{piece}_kernel", forward * N * width)],
            [Work(f"{piece}_backward_kernel", (backward + parts) * N * width), *adding],
        )

    return {
        "shift_mix": works("shift_mix", 7 * size, 8 * size, sums=6),
        "value_residual": works("value_residual", 4 * size, 7 * size),
        "key_stage": works("key_stage", 6 * size + 4, 9 * size + 4, sums=2),
        "out_stage": works("out_stage", 6 * size, 11 * size, sums=3),
        "relu_squared": works("relu_squared", 2 * size, 3 * size, width=4),
    }


OPERATORS = {"wkv7": wkv7_work, "wkv6": wkv6_work, "wkv4": wkv4_work}
