"""`bench.py --device cuda`: the operators on a GPU, beside what the machine allows and beside other implementations.

Letters: B batch, T tokens, H heads of N channels, n tokens of a chunk. Every row has the same number of tokens, B T.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wkv.models import wkv4, wkv6, wkv7

# Of an H100 SXM as its maker states them: bytes and bfloat16 operations on tensor cores a second.
BANDWIDTH, RATE = 3.35e12, 989e12
# A product of float32 is six of bfloat16, see wkv_kernels/triton/common.py.
PARTS = 6
TOKENS, H, N = 65536, 32, 64
LENGTHS = [512 << i for i in range(8)]
# The definition takes a step a token, whose launches alone take a minute beyond this.
LOOP_LENGTH = 2048
LEGEND = """\
Milliseconds, median; forward / forward and backward. `floor` reads every input once and writes every output once.
`predicted` is what the kernels move and multiply, each by itself at the bandwidth and rate stated for an H100 SXM, and
the share of it that was reached. `chunk` is the plain PyTorch form in float32 that runs without these kernels, `loop`
the definition, `fla` flash-linear-attention where it is installed, FlashAttention-2 causal attention at the same width.
"""


@dataclass(frozen=True)
class Work:
    """What a kernel multiplies and moves for a token of a head: multiply-adds, bytes."""

    products: float
    bytes: float

    def seconds(self, heads: int) -> float:
        return heads * max(2 * PARTS * self.products / RATE, self.bytes / BANDWIDTH)


def wkv7_work(n: int, K: int, V: int, size: int) -> tuple[list[Work], list[Work]]:
    """The kernels of wkv_kernels/triton/wkv7.py, forward and backward; `size` is the bytes of an element of a row."""
    rows = size * (4 * K + V) + 4 * K
    matrices, state = 4 * (K * K + K * V) / n, 4 * K * V / n
    prepare = 2 * n * n + (5 * K + 2 * V) * n + K * K + 2 * K * V
    scan = Work(K * K * V / n, matrices + state)
    forward = [
        Work(prepare + (K + 2 * V) * n, rows + matrices + 4 * (K + V)),
        scan,
        Work(K * V, 4 * (K + V) + state + size * V),
    ]
    backward = [
        Work(prepare + K * V, rows + size * V + matrices + state + 4 * n),
        scan,
        scan,
        Work((3 * K + 6 * V) * n + 3 * K * V, rows + 2 * size * V + 4 * n + 2 * state + 8 * V),
        Work((8 * K + 4 * V) * n + 4 * K * V, 2 * rows + 2 * state + 8 * V),
    ]
    return forward, backward


def predicted(op: str) -> tuple[float, float] | None:
    """Seconds of the kernels, forward and with backward, in bfloat16."""
    if op != "wkv7":
        return None
    n = importlib.import_module("wkv_kernels.triton.wkv7").CONFIGURATIONS[N].n
    forward, backward = (sum(work.seconds(TOKENS * H) for work in works) for works in wkv7_work(n, N, N, 2))
    return forward, forward + backward


def _rows(B: int, T: int, *width: int, count: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = [torch.randn(B, T, *width, generator=generator, device="cuda") for _ in range(count)]
    return [x.bfloat16() for x in draw]


def wkv7_inputs(B: int, T: int) -> list[Tensor]:
    r, k, v, x, y, z = _rows(B, T, H, N, count=6)
    kk = F.normalize(x.float(), dim=-1)
    log_w = -0.6065306597126334 * torch.sigmoid(y.float())
    return [r, log_w, k, v, (-kk).bfloat16(), (kk * torch.sigmoid(z.float())).bfloat16()]


def wkv6_inputs(B: int, T: int) -> list[Tensor]:
    r, k, v, raw = _rows(B, T, H, N, count=4)
    return [r, -torch.exp(raw.float() - 3), torch.randn(H, N, device="cuda"), k, v]


def wkv4_inputs(B: int, T: int) -> list[Tensor]:
    k, v = _rows(B, T, H * N, count=2)
    return [-torch.exp(torch.randn(1, 1, H * N, device="cuda")), torch.randn(H * N, device="cuda"), k, v]


def _fla(op: str) -> Callable | None:
    """The same operator of flash-linear-attention, taking our arguments."""
    try:
        ops = importlib.import_module(f"fla.ops.rwkv{op[-1]}")
    except ImportError:
        return None
    if op == "wkv7":
        return lambda r, log_w, k, v, a, b: ops.chunk_rwkv7(r, log_w, k, v, a, b, scale=1.0, output_final_state=True)
    if op == "wkv6":
        return lambda r, log_w, u, k, v: ops.chunk_rwkv6(r, k, v, log_w, u, scale=1.0, output_final_state=True)
    return None


# By operator: its inputs, ours, the plain form and the definition.
OPERATORS = {
    "wkv7": (wkv7_inputs, wkv7.wkv7, wkv7.chunk_wkv7, wkv7.naive_recurrent_wkv7),
    "wkv6": (wkv6_inputs, wkv6.wkv6, wkv6.chunk_wkv6, wkv6.naive_recurrent_wkv6),
    "wkv4": (wkv4_inputs, wkv4.wkv4, wkv4.scan_wkv4, wkv4.naive_recurrent_wkv4),
}


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def floor(inputs: list[Tensor], output: Tensor) -> tuple[float, float]:
    """Seconds to read every input and write every output once: forward, and with backward."""
    moved = sum(x.nbytes for x in inputs)
    return (moved + output.nbytes) / BANDWIDTH, (3 * moved + 2 * output.nbytes) / BANDWIDTH


def measure(function: Callable, inputs: list[Tensor], gradient: Tensor) -> tuple[float, float] | None:
    """Milliseconds forward, and forward and backward; None where memory does not suffice."""
    from triton.testing import do_bench

    leaves = [x.detach().requires_grad_() for x in inputs]

    def step():
        torch.autograd.grad(function(*leaves)[0], leaves, gradient)

    def forward():
        with torch.no_grad():
            function(*inputs)

    try:
        return tuple(do_bench(f, warmup=50, rep=200, return_mode="median") for f in (forward, step))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _cell(times: tuple[float, float] | None) -> str:
    return "-" if times is None else f"{times[0]:.2f} / {times[1]:.2f}"


def table(op: str) -> Iterator[str]:
    """Lines of markdown, each as soon as it is measured."""
    draw, ours, plain, loop = OPERATORS[op]
    yield f"| {op}: T | B | floor | predicted | wkv | reached | chunk | loop | fla | FlashAttention-2 |"
    yield "|---" * 10 + "|"
    theirs, expected = _fla(op), predicted(op)
    for T in LENGTHS:
        B = TOKENS // T
        inputs = draw(B, T)
        gradient = torch.randn_like(ours(*inputs)[0])
        found = measure(ours, inputs, gradient)
        cells = [f"{T} | {B}", _cell([1e3 * t for t in floor(inputs, gradient)])]
        cells.append(_cell(None if expected is None else [1e3 * t for t in expected]))
        cells.append(_cell(found))
        reached = (
            None if expected is None or found is None else [1e5 * t / m for t, m in zip(expected, found, strict=True)]
        )
        cells.append("-" if reached is None else f"{reached[0]:.0f} % / {reached[1]:.0f} %")
        cells.append(_cell(measure(plain, inputs, gradient)))
        cells.append(_cell(measure(loop, inputs, gradient) if T <= LOOP_LENGTH else None))
        cells.append(_cell(measure(theirs, inputs, gradient) if theirs else None))
        q, k, v = (x.transpose(1, 2) for x in _rows(B, T, H, N, count=3))
        cells.append(_cell(measure(_attention, [q, k, v], torch.randn_like(q))))
        yield "| " + " | ".join(cells) + " |"


def main() -> int:
    """Prints the tables; returns the exit code."""
    if not torch.cuda.is_available():
        print("bench.py: no CUDA device is available to this torch", flush=True)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; H = {H}, N = {N}, bfloat16, log_w float32.\n")
    print(LEGEND)
    for op in OPERATORS:
        for line in table(op):
            print(line, flush=True)
        print()
    return 0
