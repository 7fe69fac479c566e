"""Calls of the operator wkv7 for its tests: inputs like those of a model, and what they give in float64.

Letters: B batch rows, T tokens, H heads, K key and V value channels of a head, n packed sequences.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from conftest import OPERATOR_TOLERANCE

from wkv.models.wkv7 import naive_recurrent_wkv7

NAMES = ["r", "log_w", "k", "v", "a", "b", "state"]
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PACKED = [0, 0, 5, 6, 22, 22, 59, 63, 63]


@dataclass(frozen=True)
class Case:
    """A call of the operator; `layout` says how the inputs lie in memory, `raw` what the decay is made from."""

    T: int
    B: int = 2
    H: int = 3
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = ""
    raw: str = ""
    packed: bool = False
    zero_state: bool = False

    def __str__(self) -> str:
        sizes = "" if self.K == self.V == 64 else f"-K{self.K}-V{self.V}"
        flags = [self.layout, self.raw, "packed" * self.packed, "zero_state" * self.zero_state]
        return f"{DTYPE_NAMES[self.dtype]}-B{self.B}-T{self.T}-H{self.H}{sizes}" + "".join(f"-{f}" for f in flags if f)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (B, T, H, N), lying differently in memory."""
    if layout == "fused":
        return torch.cat([torch.full_like(x, float("nan")), x], -1)[..., x.shape[-1] :]
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels_first":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    return x


@cache
def make(case: Case) -> tuple[dict, dict]:
    """Inputs like those of a model, the state included, and gradients of the two results."""
    generator = torch.Generator().manual_seed(case.T)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    rows = len(PACKED) - 1 if case.packed else B
    kk = F.normalize(draw(B, T, H, K), dim=-1)
    raw = {
        "": draw(B, T, H, K),
        "fastest": torch.full((B, T, H, K), 20.0),
        "slowest": torch.full((B, T, H, K), -20.0),
        "extremes": 20.0 * draw(B, T, H, K).sign(),
    }[case.raw]
    x = {
        "r": draw(B, T, H, K),
        "log_w": -0.6065306597126334 * torch.sigmoid(raw),
        "k": draw(B, T, H, K),
        "v": draw(B, T, H, V),
        "a": -kk,
        "b": kk * torch.sigmoid(draw(B, T, H, K)),
    }
    x = {name: t if name == "log_w" else t.to(case.dtype) for name, t in x.items()}
    if case.layout == "broadcast":
        x["log_w"] = x["log_w"][:1, :1].expand(B, T, H, K)
    x = {name: arrange(t, case.layout) for name, t in x.items()}
    x["state"] = None if case.zero_state else draw(rows, H, K, V)
    grads = {"o": draw(B, T, H, V).to(case.dtype), "final_state": draw(rows, H, K, V)}
    return x, grads


def cu_seqlens(case: Case, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
    return torch.tensor(PACKED, dtype=dtype) if case.packed else None


def run(implementation, x: dict, grads: dict, packing: torch.Tensor | None) -> dict:
    """Both results and the gradients of all inputs, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in x.items() if t is not None}
    o, final_state = implementation(*(leaves.get(name) for name in NAMES), packing)
    loss = (o.to(final_state) * grads["o"]).sum() + (final_state * grads["final_state"]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final_state": final_state, **{f"grad of {n}": g for n, g in zip(leaves, found, strict=True)}}


@cache
def expected(case: Case) -> dict:
    x, grads = make(case)
    x, grads = ({name: None if t is None else t.double() for name, t in d.items()} for d in (x, grads))
    return run(naive_recurrent_wkv7, x, grads, cu_seqlens(case))


def assert_equal(actual: dict, reference: dict) -> None:
    """Root mean square error, relative to the value's own, by the dtype of what is compared."""
    assert actual.keys() == reference.keys()
    for name, y in reference.items():
        x = actual[name]
        assert x.shape == y.shape, name
        error = ((x.double() - y).norm() / y.norm()).item() if y.any() else x.double().norm().item()
        tolerance = OPERATOR_TOLERANCE[x.dtype]
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.0e} in {x.dtype}"
