"""Calls of the operators wkv4, wkv6 and wkv7 for their tests: inputs like those of a model, and what float64 gives.

Letters: B batch rows, T tokens, H heads, K key and V value channels of a head, n packed sequences. wkv4 has no
heads but H V channels. An operator is one row of OPERATORS.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from conftest import OPERATOR_TOLERANCE
from oracle import wkv_numpy
from wkv_kernels.wkv4 import wkv4
from wkv_kernels.wkv6 import wkv6
from wkv_kernels.wkv7 import wkv7

from wkv.models.wkv4 import naive_recurrent_wkv4, scan_wkv4
from wkv.models.wkv6 import chunk_wkv6, naive_recurrent_wkv6
from wkv.models.wkv7 import chunk_wkv7, naive_recurrent_wkv7

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PACKED = [0, 0, 5, 6, 22, 22, 59, 63, 63]


@dataclass(frozen=True)
class Case:
    """A call of an operator.

    `layout` says how the inputs lie in memory, `decay` what log_w is like, `shared` who shares it (rows, tokens or
    all), `keys` what k is like.
    """

    op: str
    T: int
    B: int = 2
    H: int = 3
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = ""
    decay: str = ""
    shared: str = ""
    keys: str = ""
    packed: bool = False
    zero_state: bool = False

    def __str__(self) -> str:
        sizes = "" if self.K == self.V == 64 else f"-K{self.K}-V{self.V}"
        shared = f"{self.shared}_share" * bool(self.shared)
        flags = [self.layout, self.decay, shared, self.keys, "packed" * self.packed, "zero_state" * self.zero_state]
        return f"{DTYPE_NAMES[self.dtype]}-B{self.B}-T{self.T}-H{self.H}{sizes}" + "".join(f"-{f}" for f in flags if f)

    @property
    def rows(self) -> int:
        """Rows of a state."""
        return len(PACKED) - 1 if self.packed else self.B


@dataclass(frozen=True)
class Operator:
    """`compared` is the argument that gives the shape, `masked` what makes a step leave the state alone."""

    names: tuple[str, ...]
    implementations: dict[str, Callable]
    oracle: Callable
    inputs: Callable[[Case, Callable], dict]
    compared: str
    masked: dict[str, float]


def _unbounded_decay(case: Case, draw, *shape: int) -> torch.Tensor:
    """Of RWKV-4 to 6: log_w = -exp(raw)."""
    rows = 1 if case.shared in ("rows", "all") else shape[0]
    shape = (rows, 1 if case.shared in ("tokens", "all") else shape[1], *shape[2:])
    if case.decay == "bimodal":
        return torch.where(draw(*shape) < -1.28, -3828.0, -0.018)
    raw = {"": draw(*shape) - 2, "fastest": torch.full(shape, 8.0), "slowest": torch.full(shape, -20.0)}
    return -torch.exp(raw[case.decay])


def _wkv4(case: Case, draw) -> dict:
    B, T, C = case.B, case.T, case.H * case.V
    x = {"log_w": _unbounded_decay(case, draw, B, T, C), "u": draw(C), "k": draw(B, T, C), "v": draw(B, T, C)}
    if case.keys == "large":
        x["k"] = 60 * x["k"].sign()
    if case.keys == "padding":
        x["k"][:, 5:20], x["log_w"][:, 5:20] = -1e30, 0
    x["state"] = torch.stack([draw(case.rows, C), draw(case.rows, C).exp(), draw(case.rows, C)], -1)
    x["state"][:, ::5] = 0
    return x


def _wkv6(case: Case, draw) -> dict:
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    return {
        "r": draw(B, T, H, K),
        "log_w": _unbounded_decay(case, draw, B, T, H, K),
        "u": draw(H, K),
        "k": draw(B, T, H, K),
        "v": draw(B, T, H, V),
        "state": draw(case.rows, H, K, V),
    }


def _wkv7(case: Case, draw) -> dict:
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    kk = F.normalize(draw(B, T, H, K), dim=-1)
    raw = {
        "": draw(B, T, H, K),
        "fastest": torch.full((B, T, H, K), 20.0),
        "slowest": torch.full((B, T, H, K), -20.0),
        "bimodal": 20.0 * draw(B, T, H, K).sign(),
    }[case.decay]
    return {
        "r": draw(B, T, H, K),
        "log_w": -0.6065306597126334 * torch.sigmoid(raw),
        "k": draw(B, T, H, K),
        "v": draw(B, T, H, V),
        "a": -kk,
        "b": kk * torch.sigmoid(draw(B, T, H, K)),
        "state": draw(case.rows, H, K, V),
    }


OPERATORS = {
    "wkv4": Operator(
        names=("log_w", "u", "k", "v", "state"),
        implementations={"cpu": wkv4, "scan": scan_wkv4, "naive": naive_recurrent_wkv4},
        oracle=wkv_numpy.wkv4,
        inputs=_wkv4,
        compared="k",
        masked={"log_w": 0, "k": -1e30},
    ),
    "wkv6": Operator(
        names=("r", "log_w", "u", "k", "v", "state"),
        implementations={"cpu": wkv6, "chunk": chunk_wkv6, "naive": naive_recurrent_wkv6},
        oracle=wkv_numpy.wkv6,
        inputs=_wkv6,
        compared="r",
        masked={"log_w": 0, "k": 0},
    ),
    "wkv7": Operator(
        names=("r", "log_w", "k", "v", "a", "b", "state"),
        implementations={"cpu": wkv7, "chunk": chunk_wkv7, "naive": naive_recurrent_wkv7},
        oracle=wkv_numpy.wkv7,
        inputs=_wkv7,
        compared="r",
        masked={"log_w": 0, "k": 0, "b": 0},
    ),
}


def compiled(op: str) -> Callable:
    return OPERATORS[op].implementations["cpu"]


def coarse_on_tensor_cores(case: Case) -> set[str]:
    """What is no finer than its bfloat16 rows in the Triton kernels, which multiply those with eleven digits."""
    if case.dtype != torch.bfloat16 or case.op == "wkv4":
        return set()
    if case.op == "wkv6":
        return {"grad of log_w", "grad of u"}
    return {"grad of log_w", "grad of state"} | ({"final_state"} if case.T > 32 else set())


def tokens(op: str) -> list[str]:
    """Names of the inputs with a value for every token."""
    return [name for name in OPERATORS[op].names if name not in ("u", "state")]


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (B, T, H, N) or (B, T, C), lying differently in memory."""
    if layout == "fused":
        return torch.cat([torch.full_like(x, float("nan")), x], -1)[..., x.shape[-1] :]
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels_first":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x


@cache
def make(case: Case) -> tuple[dict, dict]:
    """Inputs like those of a model, the state included, and gradients of the two results."""
    generator = torch.Generator().manual_seed(case.T)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = OPERATORS[case.op].inputs(case, draw)
    grads = {"o": draw(*x["v"].shape).to(case.dtype), "final_state": draw(*x["state"].shape)}
    if case.layout == "broadcast":
        x["log_w"] = x["log_w"][:1, :1].expand_as(x["k"])
    x = {name: t if name in ("log_w", "u", "state") else t.to(case.dtype) for name, t in x.items()}
    x = {name: arrange(t, case.layout) if name in tokens(case.op) else t for name, t in x.items()}
    if case.zero_state:
        x["state"] = None
    return x, grads


def inputs(case: Case) -> list:
    """The inputs in the order of the operator's arguments."""
    x, _ = make(case)
    return [x[name] for name in OPERATORS[case.op].names]


def cu_seqlens(case: Case, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
    return torch.tensor(PACKED, dtype=dtype) if case.packed else None


def run(implementation, x: dict, grads: dict, packing: torch.Tensor | None = None) -> dict:
    """Both results and the gradients of all inputs, by name; x is in the order of the operator's arguments."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in x.items()}
    o, final_state = implementation(*leaves.values(), packing)
    loss = (o.to(final_state) * grads["o"]).sum() + (final_state * grads["final_state"]).sum()
    leaves = {name: t for name, t in leaves.items() if t is not None}
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final_state": final_state, **{f"grad of {n}": g for n, g in zip(leaves, found, strict=True)}}


def run_exactly(op: str, x: dict, grads: dict, packing: torch.Tensor | None = None, form: str = "naive") -> dict:
    """The same by a plain form of the operator, its definition unless said otherwise, in float64."""
    x, grads = ({name: None if t is None else t.double() for name, t in d.items()} for d in (x, grads))
    return run(OPERATORS[op].implementations[form], x, grads, packing)


@cache
def expected(case: Case) -> dict:
    return run_exactly(case.op, *make(case), cu_seqlens(case))


def assert_equal(actual: dict, reference: dict, share: float = 1, coarse: Collection[str] = ()) -> None:
    """Root mean square error, relative to the value's own, within a share of what is allowed to the compared dtype.

    Those whose names are in `coarse` need be no finer than bfloat16.
    """
    assert actual.keys() == reference.keys()
    for name, y in reference.items():
        x = actual[name]
        assert x.shape == y.shape, name
        error = ((x.double() - y).norm() / y.norm()).item() if y.any() else x.double().norm().item()
        tolerance = share * OPERATOR_TOLERANCE[torch.bfloat16 if name in coarse else x.dtype]
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.1e} in {x.dtype}"


def assert_states_pass(op: str, actual: dict, x: dict, grads: dict) -> None:
    """Of a call without tokens: the state comes out, its gradient comes back, and nothing else has one."""
    # An empty state of wkv4 has a p of its own, and its p is a constant.
    filled = x["state"].flatten(1) != 0
    assert torch.equal(actual["final_state"].flatten(1)[filled], x["state"].flatten(1)[filled])
    gradient = grads["final_state"].clone()
    if op == "wkv4":
        gradient[..., 2] = 0
    assert torch.equal(actual["grad of state"], gradient)
    assert not any(actual[f"grad of {name}"].any() for name in x if name != "state")
