"""The forms of the WKV operators that `bench.py` compares, in one process.

Letters: B batch, T tokens, H heads, K key and V value channels of a head; n tokens of a chunk. wkv4 has H K channels.
"""

import time

import torch
import torch.nn.functional as F

from wkv.models import wkv4, wkv6, wkv7


class Operator:
    """Forms of one operator at B = 1, on inputs like those of a trained model, fp32."""

    def __init__(self, op: str, T: int, H: int, K: int):
        generator = torch.Generator().manual_seed(0)
        self.forms, draw_inputs = OPERATORS[op]
        self.inputs = draw_inputs(lambda *shape: torch.randn(*shape, generator=generator), T, H, K)
        # The fourth has the shape of o everywhere.
        self.gradient = torch.randn(self.inputs[3].shape, generator=generator)

    def names(self) -> list[str]:
        """The forms, the compiled one first, the loop last."""
        return list(self.forms)

    def step(self, form: str) -> float:
        """Forward and backward of one form."""
        inputs = [t.clone().requires_grad_() for t in self.inputs]
        start = time.perf_counter()
        o, _ = self.forms[form](*inputs)
        o.backward(self.gradient)
        return time.perf_counter() - start

    def forward(self, form: str) -> float:
        """Forward alone."""
        with torch.no_grad():
            start = time.perf_counter()
            self.forms[form](*self.inputs)
            return time.perf_counter() - start

    def error(self, form: str) -> float:
        """Largest difference between the output of a form and that of the loop."""
        with torch.no_grad():
            return (self.forms[form](*self.inputs)[0] - self.forms["loop"](*self.inputs)[0]).abs().max().item()


def _wkv4(draw, T: int, H: int, K: int) -> list:
    log_w, u, k, v = -torch.exp(draw(1, 1, H * K) - 2), draw(H * K), draw(1, T, H * K), draw(1, T, H * K)
    return [log_w, u, k, v]


def _wkv6(draw, T: int, H: int, K: int) -> list:
    r, k, v, raw = draw(4, 1, T, H, K)
    return [r, -torch.exp(raw - 3), draw(H, K), k * 0.3, v]


def _wkv7(draw, T: int, H: int, K: int) -> list:
    r, k, v, x, y, z = draw(6, 1, T, H, K)
    kk = F.normalize(x, dim=-1)
    log_w = -0.6065 * torch.sigmoid(y)
    return [r, log_w, k * 0.3, v, -kk, kk * torch.sigmoid(z)]


def naive_chunkwise_wkv7(r, log_w, k, v, a, b, n: int = 16):
    """The chunk form written plainly: rows of a chunk in a Python loop, every exponent exact, then chunk after chunk.

    r, log_w, k, a, b (B, T, H, K), v (B, T, H, V), T a multiple of `n`, zero initial state; returns o and the final
    state (B, H, K, V). Inside a chunk, row i of U is a_i S_{i-1}; U solves a unit lower triangular system.
    """
    r, log_w, k, v, a, b = (x.unflatten(1, (-1, n)).permute(1, 0, 3, 2, 4) for x in (r, log_w, k, v, a, b))
    c = log_w.cumsum(-2)  # (chunks, B, H, n, K)
    e = c - log_w
    rows = {"ak": [], "ab": [], "rk": [], "rb": []}
    for i in range(n):
        before = torch.exp((e[..., i : i + 1, :] - c).clamp(max=0)) * a[..., i : i + 1, :]
        upto = torch.exp((c[..., i : i + 1, :] - c).clamp(max=0)) * r[..., i : i + 1, :]
        for name, row in (("ak", before * k), ("ab", before * b), ("rk", upto * k), ("rb", upto * b)):
            rows[name].append(row.sum(-1))
    A = {name: torch.stack(parts, -2).tril(-1 if name[0] == "a" else 0) for name, parts in rows.items()}
    inverse = []
    for i, unit in enumerate(torch.eye(n, dtype=v.dtype).expand_as(A["ab"]).unbind(-2)):
        known = torch.stack(inverse, -2) if i else unit[..., None, :]
        inverse.append(unit + (A["ab"][..., i : i + 1, : max(i, 1)] @ known)[..., 0, :])
    X = torch.stack(inverse, -2)  # (chunks, B, H, n, n)
    U_own, W = X @ (A["ak"] @ v), X @ (a * e.exp())
    rest = torch.exp(c[..., -1:, :] - c)
    S, outputs = torch.zeros_like(k[0].mT @ v[0]), []  # (B, H, K, V)
    for N in range(r.shape[0]):
        U = U_own[N] + W[N] @ S
        outputs.append(A["rk"][N] @ v[N] + A["rb"][N] @ U + (r[N] * c[N].exp()) @ S)
        S = S * c[N, ..., -1, :, None].exp() + (k[N] * rest[N]).mT @ v[N] + (b[N] * rest[N]).mT @ U
    return torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2), S


# By operator: its forms, the compiled one and the definition among them, and its inputs.
OPERATORS = {
    "wkv4": ({"compiled": wkv4.wkv4, "scan": wkv4.scan_wkv4, "loop": wkv4.naive_recurrent_wkv4}, _wkv4),
    "wkv6": ({"compiled": wkv6.wkv6, "chunked": wkv6.chunk_wkv6, "loop": wkv6.naive_recurrent_wkv6}, _wkv6),
    "wkv7": (
        {
            "compiled": wkv7.wkv7,
            "chunked": wkv7.chunk_wkv7,
            "naive chunks": naive_chunkwise_wkv7,
            "loop": wkv7.naive_recurrent_wkv7,
        },
        _wkv7,
    ),
}
