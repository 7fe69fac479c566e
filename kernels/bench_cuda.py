"""`bench.py --device cuda`: the operators on a GPU, beside what the machine allows and beside other implementations.

Letters: B batch, T tokens, H heads of N channels. Every row of a table has the same number of tokens, B T.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench_cuda_work import BANDWIDTH, fused_works
from bench_cuda_work import OPERATORS as WORKS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wkv_kernels import rwkv7_fused

from wkv.models import rwkv7_fused as plain_stages
from wkv.models import rwkv_fused as plain_fused
from wkv.models import wkv4, wkv6, wkv7
from wkv.models.rwkv_sequences import SequencePlan

DEVICE = "cuda"
TOKENS, H, N = 65536, 32, 64
LENGTHS = [512 << i for i in range(8)]
# Of the tables of kernels.
KERNELS_LENGTH = 4096
# The definition takes a step a token, whose launches alone take a minute beyond this.
LOOP_LENGTH = 2048
REPETITIONS = 5
# Columns that can be left out.
OTHERS = ("plain", "loop", "fla", "attention")
LEGEND = """\
Milliseconds, median; forward / forward and backward. `floor` reads every input once and writes every output once.
`predicted` is what the kernels move and multiply, each by itself at the bandwidth and rate stated for an H100 SXM, and
`reached` the share of it. `plain` is plain PyTorch as it runs without these kernels, `loop` the definition (up to 2048
tokens a row), `fla` flash-linear-attention 0.6 or later where it is installed, called as its own layers call it,
`attention` causal FlashAttention-2 of as many heads and channels. A dash: not there, left out, or out of memory.
"""


def _rows(B: int, T: int, *width: int, count: int) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(B, T, *width, generator=generator, device=DEVICE).bfloat16() for _ in range(count)]


def wkv7_inputs(B: int, T: int) -> list[Tensor]:
    r, k, v, x, y, z = _rows(B, T, H, N, count=6)
    kk = F.normalize(x.float(), dim=-1)
    log_w = plain_stages.LOG_DECAY_SCALE * torch.sigmoid(y.float())
    return [r, log_w, k, v, (-kk).bfloat16(), (kk * torch.sigmoid(z.float())).bfloat16()]


def wkv6_inputs(B: int, T: int) -> list[Tensor]:
    r, k, v, raw = _rows(B, T, H, N, count=4)
    return [r, -torch.exp(raw.float() - 3), torch.randn(H, N, device=DEVICE), k, v]


def wkv4_inputs(B: int, T: int) -> list[Tensor]:
    k, v = _rows(B, T, H * N, count=2)
    return [-torch.exp(torch.randn(1, 1, H * N, device=DEVICE)), torch.randn(H * N, device=DEVICE), k, v]


# By operator: its inputs, ours, the plain form and the definition.
OPERATORS = {
    "wkv7": (wkv7_inputs, wkv7.wkv7, wkv7.chunk_wkv7, wkv7.naive_recurrent_wkv7),
    "wkv6": (wkv6_inputs, wkv6.wkv6, wkv6.chunk_wkv6, wkv6.naive_recurrent_wkv6),
    "wkv4": (wkv4_inputs, wkv4.wkv4, wkv4.scan_wkv4, wkv4.naive_recurrent_wkv4),
}
FUSED = "rwkv7_fused"
CHOICES = (*OPERATORS, FUSED)


def fla_operator(op: str) -> Callable | None:
    """The same operator of flash-linear-attention, taking our arguments; None where there is none."""
    if op not in ("wkv6", "wkv7"):
        return None
    try:
        ops = importlib.import_module(f"fla.ops.rwkv{op[-1]}")
    except ImportError:
        return None
    if op == "wkv6":
        return lambda r, log_w, u, k, v: ops.chunk_rwkv6(r, k, v, log_w, u, scale=1.0)
    # The bound lets it take larger chunks.
    bound = {"scale": 1.0, "safe_gate": True, "lower_bound": plain_stages.LOG_DECAY_SCALE, "chunk_size": 64}
    return lambda r, log_w, k, v, a, b: ops.chunk_rwkv7(r, log_w, k, v, a, b, **bound)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def output_of(function: Callable | None) -> Callable | None:
    """An operator without its final state, as a tuple of one tensor."""
    return None if function is None else lambda *inputs: function(*inputs)[:1]


def fused_pieces() -> dict[str, tuple[list[Tensor], Callable, Callable]]:
    """By piece: its inputs, ours and plain PyTorch; each returns a tuple of tensors."""
    C = H * N
    draw = lambda count, *width: _rows(1, TOKENS, *width, count=count)  # noqa: E731
    vectors = [torch.rand(C, device=DEVICE).bfloat16() for _ in range(6)]
    norm = plain_fused.HeadGroupNorm(H, C, device=DEVICE, dtype=torch.bfloat16)
    stage = [*draw(4, H, N), *draw(1, C), vectors[0].view(H, N), norm.weight.detach(), norm.bias.detach()]

    def plain_out(o, r, k, v, g, r_k, weight, bias):
        normed = F.group_norm(o.reshape(TOKENS, C).float(), H, weight.float(), bias.float(), norm.eps)
        return (plain_stages.plain_out_stage(lambda _: normed, o, r, k, v, g, r_k),)

    return {
        "shift_mix": (
            [*draw(1, C), *vectors],
            lambda x, *mixes: rwkv7_fused.shift_mix(x, None, list(mixes), x.dtype),
            lambda x, *mixes: plain_fused.plain_shift_mix(x, None, SequencePlan(), mixes)[0],
        ),
        "value_residual": (
            draw(3, C),
            lambda *rows: (rwkv7_fused.value_residual(*rows),),
            lambda *rows: (plain_stages.plain_value_residual(*rows),),
        ),
        "key_stage": (
            [*draw(3, C), *vectors[:2]],
            lambda *given: rwkv7_fused.key_stage(*given, H),
            lambda *given: plain_stages.plain_key_stage(*given, H),
        ),
        "out_stage": (stage, lambda *given: (rwkv7_fused.out_stage(*given, norm.eps),), plain_out),
        "relu_squared": (
            draw(1, 4 * C),
            lambda x: (rwkv7_fused.relu_squared(x),),
            lambda x: (plain_fused.plain_relu_squared(x),),
        ),
    }


def floor(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[float, float]:
    """Seconds to read every input and write every output once: forward, and with backward."""
    read, written = (sum(x.nbytes for x in tensors) for tensors in (inputs, outputs))
    return (read + written) / BANDWIDTH, (3 * read + 2 * written) / BANDWIDTH


def passes(function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Callable, Callable]:
    """The forward pass, and forward and backward, of a function that returns tensors with these gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward():
        with torch.no_grad():
            function(*inputs)

    def step():
        torch.autograd.grad(list(function(*leaves)), leaves, gradients)

    return forward, step


def milliseconds(run: Callable) -> float:
    """Median of a fifth of a second."""
    from triton.testing import do_bench

    return do_bench(run, warmup=50, rep=200, return_mode="median")


def measure(function: Callable | None, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[float, ...] | None:
    """Milliseconds forward, and forward and backward; None where there is no function or not enough memory."""
    if function is None:
        return None
    try:
        return tuple(map(milliseconds, passes(function, inputs, gradients)))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def kernel_times(step: Callable) -> dict[str, tuple[int, float]]:
    """By the name of a kernel: launches and milliseconds of one step, a mean of some."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPETITIONS):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.count // REPETITIONS, event.self_device_time_total / 1e3 / REPETITIONS)
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }


def _cell(times: tuple[float, ...] | None) -> str:
    return "-" if times is None else " / ".join(f"{time:.2f}" for time in times)


def _ours(found: tuple[float, ...] | None, least: tuple[float, float], expected: tuple[float, float]) -> list[str]:
    """The cells floor, predicted, wkv and reached."""
    shares = (
        "-" if found is None else " / ".join(f"{1e5 * s / ms:.0f} %" for s, ms in zip(expected, found, strict=True))
    )
    return [_cell([1e3 * s for s in least]), _cell([1e3 * s for s in expected]), _cell(found), shares]


def table(op: str, lengths: list[int], without: list[str]) -> Iterator[str]:
    """Lines of markdown, each as soon as it is measured."""
    draw, *forms = OPERATORS[op]
    ours, plain, loop, theirs = map(output_of, (*forms, fla_operator(op)))
    yield f"| {op}: T | B | floor | predicted | wkv | reached | plain | loop | fla | attention |"
    yield "|---" * 10 + "|"
    for T in lengths:
        B = TOKENS // T
        inputs = draw(B, T)
        gradients = [torch.randn_like(ours(*inputs)[0])]
        cells = _ours(measure(ours, inputs, gradients), floor(inputs, gradients), WORKS[op](N, 2).seconds(B * T * H))
        others = {"plain": plain, "loop": loop if T <= LOOP_LENGTH else None, "fla": theirs}
        for name, function in others.items():
            cells.append(_cell(measure(None if name in without else function, inputs, gradients)))
        del inputs, gradients
        q, k, v = (x.transpose(1, 2) for x in _rows(B, T, H, N, count=3))
        attention = None if "attention" in without else _attention
        cells.append(_cell(measure(attention, [q, k, v], [torch.randn_like(q)])))
        yield f"| {T} | {B} | " + " | ".join(cells) + " |"


def fused_table(without: list[str]) -> Iterator[str]:
    """The same of the pieces between the matrix products."""
    yield f"| {FUSED}: piece | floor | predicted | wkv | reached | plain |"
    yield "|---" * 6 + "|"
    works = fused_works(N, 2)
    for piece, (inputs, ours, plain) in fused_pieces().items():
        gradients = [torch.randn_like(x) for x in ours(*inputs)]
        cells = _ours(measure(ours, inputs, gradients), floor(inputs, gradients), works[piece].seconds(TOKENS * H))
        cells.append(_cell(measure(None if "plain" in without else plain, inputs, gradients)))
        yield f"| {piece} | " + " | ".join(cells) + " |"


def kernel_table(title: str, function: Callable, inputs: list[Tensor], expected: dict) -> Iterator[str]:
    """A step of ours, forward and backward, by kernel, beside `Works.by_kernel`; torch's own have no prediction."""
    gradients = [torch.randn_like(x) for x in function(*inputs)]
    yield f"| {title}: kernel | launches | ms | predicted | reached |"
    yield "|---" * 5 + "|"
    times = kernel_times(passes(function, inputs, gradients)[1])
    for name, (launches, ms) in sorted(times.items(), key=lambda row: -row[1][1]):
        ours = expected.pop(name, None)
        share = "- | -" if ours is None else f"{1e3 * ours[1]:.3f} | {1e5 * ours[1] / ms:.0f} %"
        yield f"| {name[:60].replace('|', ' ')} | {launches} | {ms:.3f} | {share} |"
    for name, (launches, seconds) in expected.items():
        yield f"| {name} | {launches} expected, none seen | - | {1e3 * seconds:.3f} | - |"


def tables(op: str, lengths: list[int] | None, without: list[str], kernels: bool) -> Iterator[Iterator[str]]:
    """The tables of an operator."""
    if not kernels:
        yield fused_table(without) if op == FUSED else table(op, lengths or LENGTHS, without)
    elif op == FUSED:
        works = fused_works(N, 2)
        for piece, (inputs, ours, _) in fused_pieces().items():
            yield kernel_table(piece, ours, inputs, works[piece].by_kernel(TOKENS * H))
    else:
        draw, ours, *_ = OPERATORS[op]
        for T in lengths or [KERNELS_LENGTH]:
            B = TOKENS // T
            expected = WORKS[op](N, 2).by_kernel(B * T * H)
            yield kernel_table(f"{op}, T = {T}", output_of(ours), draw(B, T), expected)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run measures."""
    group = parser.add_argument_group("with --device cuda")
    group.add_argument("--op", nargs="+", choices=CHOICES, metavar="OP", help=f"of {', '.join(CHOICES)}")
    group.add_argument("--lengths", nargs="+", type=int, metavar="T", help=f"tokens of a row, at most {TOKENS}")
    minutes = f"of {', '.join(OTHERS)}; the first two take minutes, and fla tunes itself"
    group.add_argument("--without", nargs="+", choices=OTHERS, metavar="COLUMN", help=minutes)
    group.add_argument("--kernels", action="store_true", help="time by kernel, beside what was predicted of each")


def check_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Ends the program where they do not fit."""
    for name in ("op", "lengths", "without", "kernels"):
        if given.device != "cuda" and getattr(given, name):
            parser.error(f"argument --{name}: needs --device cuda")
    for name in ("quick", "only"):
        if given.device == "cuda" and getattr(given, name):
            parser.error(f"argument --{name}: is of the CPU's bench; --op, --lengths and --without choose a GPU's part")
    for T in given.lengths or ():
        if T < 1 or TOKENS % T:
            parser.error(f"argument --lengths: must divide {TOKENS}, got {T}")


def main(given: argparse.Namespace) -> int:
    """Prints the tables; returns the exit code."""
    if not torch.cuda.is_available():
        print("bench.py: no CUDA device is available to this torch", flush=True)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; H = {H}, N = {N}, {TOKENS} tokens, bfloat16.\n")
    print(LEGEND)
    for op in given.op or CHOICES:
        for lines in tables(op, given.lengths, given.without or (), given.kernels):
            for line in lines:
                print(line, flush=True)
            print()
    return 0
