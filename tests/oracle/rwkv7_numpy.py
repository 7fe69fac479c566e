"""RWKV-7 in numpy, float64, one token at a time: an oracle small enough to be obviously right.

Written from the equations of RWKV-7 "Goose" (x070) over the official flat names; it shares no code with the package.

Letters: x residual row (C), h normalised row and p the one before it, H heads of size N (A = H*N), r receptance,
k key, v value, a in-context rate, g gate, kk removal direction, S state (H, N, N) with rows = value channels.
"""

import math
from collections.abc import Sequence

import numpy as np


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def normalised(x: np.ndarray, eps: float) -> np.ndarray:
    """Zero mean, unit biased variance over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


class Rwkv7:
    """The model of a dict of official tensors, taken to float64; vectors stored as (1, 1, C) become (C)."""

    layer_norm_eps = 1e-5
    group_norm_eps = 64e-5

    def __init__(self, weights: dict):
        arrays = {name: np.asarray(tensor.double()) for name, tensor in weights.items()}
        self.w = {name: array.reshape(-1) if array.ndim == 3 else array for name, array in arrays.items()}
        self.H, self.N = weights["blocks.0.att.r_k"].shape
        self.V, self.C = weights["emb.weight"].shape
        self.L = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))

    def zero_state(self) -> list[np.ndarray]:
        """Three arrays a layer: attention shift (C), S (H, N, N), channel-mix shift (C)."""
        shapes = [(self.C,), (self.H, self.N, self.N), (self.C,)]
        return [np.zeros(shape) for _ in range(self.L) for shape in shapes]

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return normalised(x, self.layer_norm_eps) * self.w[name + ".weight"] + self.w[name + ".bias"]

    def time_mix(self, layer: int, h, p, S, v_first):
        w = {name.split(".att.")[1]: t for name, t in self.w.items() if name.startswith(f"blocks.{layer}.att.")}
        H, N = self.H, self.N
        x_r, x_w, x_k, x_v, x_a, x_g = (h + (p - h) * w["x_" + letter] for letter in "rwkvag")
        r, k0, v = w["receptance.weight"] @ x_r, w["key.weight"] @ x_k, w["value.weight"] @ x_v
        decay = np.exp(-math.exp(-0.5) * sigmoid(w["w0"] + np.tanh(x_w @ w["w1"]) @ w["w2"]))
        a = sigmoid(w["a0"] + (x_a @ w["a1"]) @ w["a2"])
        g = sigmoid(x_g @ w["g1"]) @ w["g2"]
        kk = (k0 * w["k_k"]).reshape(H, N)
        kk = kk / np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
        k = k0 * (1 + (a - 1) * w["k_a"])
        if layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(w["v0"] + (x_v @ w["v1"]) @ w["v2"])

        r, k, v, a, decay = (t.reshape(H, N) for t in (r, k, v, a, decay))
        y = np.empty((H, N))
        S = S.copy()
        for head in range(H):
            removed = S[head] @ -kk[head]
            written = np.outer(removed, kk[head] * a[head]) + np.outer(v[head], k[head])
            S[head] = S[head] * decay[head] + written
            y[head] = S[head] @ r[head]
        y = normalised(y, self.group_norm_eps) * w["ln_x.weight"].reshape(H, N) + w["ln_x.bias"].reshape(H, N)
        y = y + (r * k * w["r_k"]).sum(-1, keepdims=True) * v
        return w["output.weight"] @ (y.reshape(-1) * g), S, v_first

    def channel_mix(self, layer: int, h, p):
        ffn = f"blocks.{layer}.ffn."
        inner = self.w[ffn + "key.weight"] @ (h + (p - h) * self.w[ffn + "x_k"])
        return self.w[ffn + "value.weight"] @ np.maximum(inner, 0.0) ** 2

    def forward(self, ids: Sequence[int], state: list[np.ndarray] | None = None):
        """Logits (T, V) of every position and the final state; `state` is not modified."""
        state = self.zero_state() if state is None else [np.asarray(s, np.float64) for s in state]
        logits = np.empty((len(ids), self.V))
        for t, token in enumerate(ids):
            x, v_first = self.layer_norm(self.w["emb.weight"][token], "blocks.0.ln0"), None
            for layer in range(self.L):
                shift, S, ffn_shift = state[3 * layer : 3 * layer + 3]
                h = self.layer_norm(x, f"blocks.{layer}.ln1")
                out, S, v_first = self.time_mix(layer, h, shift, S, v_first)
                x = x + out
                h2 = self.layer_norm(x, f"blocks.{layer}.ln2")
                x = x + self.channel_mix(layer, h2, ffn_shift)
                state = [*state[: 3 * layer], h, S, h2, *state[3 * layer + 3 :]]
            logits[t] = self.w["head.weight"] @ self.layer_norm(x, "ln_out")
        return logits, state
