"""RWKV-4 to 7 in numpy, float64: oracles small enough to be obviously right.

Written from the equations over the official flat names; they share no code with the package. Everything but the
recurrence acts on all tokens at once, the recurrence is a loop over them.

Letters: T tokens, x residual (T, C), h normalised rows and p the rows one token before, H heads of size N (A = H*N),
r receptance, k key, v value, g gate, u bonus of the current token, S state (H, N, N) with rows = key channels;
RWKV-4: numerator and denominator (A); RWKV-7: a in-context rate, kk removal direction.
A weight name without its prefix is that of the block's `att.` or `ffn.`
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


class Rwkv:
    """What all generations share, over a dict of official tensors taken to float64; (1, 1, C) becomes (C).

    A state is a list of three arrays a layer: attention shift (C), WKV state, channel-mix shift (C).
    """

    layer_norm_eps = 1e-5
    group_norm_eps = 64e-5

    def __init__(self, weights: dict):
        arrays = {name: np.asarray(tensor.double()) for name, tensor in weights.items()}
        self.w = {name: a.reshape(-1) if a.shape[:2] == (1, 1) else a for name, a in arrays.items()}
        self.V, self.C = weights["emb.weight"].shape
        self.A = weights["blocks.0.att.key.weight"].shape[0]
        self.L = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.H = self.heads(self.part("blocks.0.att."))

    def heads(self, att: dict) -> int:
        return self.A

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        return {name[len(prefix) :]: array for name, array in self.w.items() if name.startswith(prefix)}

    def zero_state(self) -> list[np.ndarray]:
        N = self.A // self.H
        shapes = [(self.C,), (self.H, N, N), (self.C,)]
        return [np.zeros(shape) for _ in range(self.L) for shape in shapes]

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return normalised(x, self.layer_norm_eps) * self.w[name + ".weight"] + self.w[name + ".bias"]

    def group_norm(self, y: np.ndarray, att: dict) -> np.ndarray:
        """(T, H, N) to (T, A), statistics of a head."""
        return normalised(y, self.group_norm_eps).reshape(-1, self.A) * att["ln_x.weight"] + att["ln_x.bias"]

    def split(self, *rows: np.ndarray) -> list[np.ndarray]:
        return [x.reshape(len(x), self.H, -1) for x in rows]

    def time_mix(self, att: dict, h, p, state, v_first):
        """The block's output (T, C), the final WKV state, and RWKV-7's values of block 0."""
        raise NotImplementedError

    def channel_mix(self, ffn: dict, h, p):
        x_k, x_r = (h * ffn["time_mix_" + x] + p * (1 - ffn["time_mix_" + x]) for x in "kr")
        inner = np.maximum(x_k @ ffn["key.weight"].T, 0) ** 2
        return sigmoid(x_r @ ffn["receptance.weight"].T) * (inner @ ffn["value.weight"].T)

    def forward(self, ids: Sequence[int], state: list[np.ndarray] | None = None):
        """Logits (T, V) of every position and the final state; `state` is not modified."""
        state = self.zero_state() if state is None else [np.asarray(s, np.float64) for s in state]
        x, v_first, final = self.layer_norm(self.w["emb.weight"][list(ids)], "blocks.0.ln0"), None, []
        for layer in range(self.L):
            block = f"blocks.{layer}."
            shift, wkv, ffn_shift = state[3 * layer : 3 * layer + 3]
            h = self.layer_norm(x, block + "ln1")
            out, wkv, v_first = self.time_mix(self.part(block + "att."), h, np.vstack([shift, h[:-1]]), wkv, v_first)
            x = x + out
            h2 = self.layer_norm(x, block + "ln2")
            x = x + self.channel_mix(self.part(block + "ffn."), h2, np.vstack([ffn_shift, h2[:-1]]))
            final += [h[-1], wkv, h2[-1]]
        return self.layer_norm(x, "ln_out") @ self.w["head.weight"].T, final


class Rwkv4(Rwkv):
    """The recurrence is the unstabilised definition; float64 holds exp(k) up to k = 700.

    The WKV state (A, 3) is a, b, p: numerator a * exp(p), denominator b * exp(p). Ours has p = 0 on return.
    """

    def zero_state(self):
        return [np.zeros(shape) for _ in range(self.L) for shape in [(self.C,), (self.A, 3), (self.C,)]]

    def time_mix(self, att, h, p, state, v_first):
        x_k, x_v, x_r = (h * att["time_mix_" + x] + p * (1 - att["time_mix_" + x]) for x in "kvr")
        r = sigmoid(x_r @ att["receptance.weight"].T)
        k, v = x_k @ att["key.weight"].T, x_v @ att["value.weight"].T
        decay, u = np.exp(-np.exp(att["time_decay"])), att["time_first"]
        numerator, denominator = state[:, 0] * np.exp(state[:, 2]), state[:, 1] * np.exp(state[:, 2])
        y = np.empty_like(v)
        for t in range(len(v)):
            now = np.exp(u + k[t])
            y[t] = (numerator + now * v[t]) / (denominator + now)
            numerator = decay * numerator + np.exp(k[t]) * v[t]
            denominator = decay * denominator + np.exp(k[t])
        final = np.stack([numerator, denominator, np.zeros(self.A)], -1)
        return (r * y) @ att["output.weight"].T, final, v_first


def decayed_attention(r, k, v, decay, u, S):
    """y_t = r_t (S + diag(u) k_t^T v_t), then S = diag(decay_t) S + k_t^T v_t; all (T, H, N) but u (H, N)."""
    y = np.empty_like(v)
    for t in range(len(v)):
        kv = k[t, :, :, None] * v[t, :, None, :]
        y[t] = ((S + u[:, :, None] * kv) * r[t, :, :, None]).sum(1)
        S = decay[t, :, :, None] * S + kv
    return y, S


class Rwkv5(Rwkv):
    """5.0, 5.1 and 5.2: a decay and a bonus for each head or channel, a gate or none, the bonus or its logarithm."""

    def heads(self, att):
        return len(att["time_decay"])

    def time_mix(self, att, h, p, S, v_first):
        mixed = {x: h * att["time_mix_" + x] + p * (1 - att["time_mix_" + x]) for x in "rkvg" if "time_mix_" + x in att}
        r, k, v = self.split(
            mixed["r"] @ att["receptance.weight"].T,
            mixed["k"] @ att["key.weight"].T,
            mixed["v"] @ att["value.weight"].T,
        )
        _, H, N = v.shape
        decay = np.exp(-np.exp(att["time_decay"])).reshape(H, -1)
        u = (att["time_faaaa"] if "time_faaaa" in att else np.exp(att["time_first"])).reshape(H, -1)
        y, S = decayed_attention(r, k, v, np.broadcast_to(decay, v.shape), np.broadcast_to(u, (H, N)), S)
        y = self.group_norm(y, att)
        if "gate.weight" in att:
            gate = mixed["g"] @ att["gate.weight"].T
            y = y * gate * sigmoid(gate)
        return y @ att["output.weight"].T, S, v_first


class Rwkv6(Rwkv):
    def heads(self, att):
        return len(att["time_faaaa"])

    def time_mix(self, att, h, p, S, v_first):
        d = p - h
        inner = np.tanh((h + d * att["time_maa_x"]) @ att["time_maa_w1"])
        x = {}
        for letter, q, up in zip("wkvrg", np.split(inner, 5, axis=1), att["time_maa_w2"], strict=True):
            x[letter] = h + d * (att["time_maa_" + letter] + q @ up)
        raw = att["time_decay"] + np.tanh(x["w"] @ att["time_decay_w1"]) @ att["time_decay_w2"]
        r, k, v, decay = self.split(
            x["r"] @ att["receptance.weight"].T,
            x["k"] @ att["key.weight"].T,
            x["v"] @ att["value.weight"].T,
            np.exp(-np.exp(raw)),
        )
        y, S = decayed_attention(r, k, v, decay, att["time_faaaa"], S)
        gate = x["g"] @ att["gate.weight"].T
        return (self.group_norm(y, att) * gate * sigmoid(gate)) @ att["output.weight"].T, S, v_first

    def channel_mix(self, ffn, h, p):
        x_k, x_r = (h + (p - h) * ffn["time_maa_" + x] for x in "kr")
        inner = np.maximum(x_k @ ffn["key.weight"].T, 0) ** 2
        return sigmoid(x_r @ ffn["receptance.weight"].T) * (inner @ ffn["value.weight"].T)


class Rwkv7(Rwkv):
    def heads(self, att):
        return len(att["r_k"])

    def time_mix(self, att, h, p, S, v_first):
        x_r, x_w, x_k, x_v, x_a, x_g = (h + (p - h) * att["x_" + letter] for letter in "rwkvag")
        r, k0, v = x_r @ att["receptance.weight"].T, x_k @ att["key.weight"].T, x_v @ att["value.weight"].T
        decay = np.exp(-math.exp(-0.5) * sigmoid(att["w0"] + np.tanh(x_w @ att["w1"]) @ att["w2"]))
        a = sigmoid(att["a0"] + (x_a @ att["a1"]) @ att["a2"])
        g = sigmoid(x_g @ att["g1"]) @ att["g2"]
        k = k0 * (1 + (a - 1) * att["k_a"])
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(att["v0"] + (x_v @ att["v1"]) @ att["v2"])

        r, k, v, a, decay, kk = self.split(r, k, v, a, decay, k0 * att["k_k"])
        kk = kk / np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
        y, S = np.empty_like(v), S.copy()
        for t in range(len(v)):
            for head in range(self.H):
                removed = -kk[t, head] @ S[head]
                written = np.outer(kk[t, head] * a[t, head], removed) + np.outer(k[t, head], v[t, head])
                S[head] = decay[t, head][:, None] * S[head] + written
                y[t, head] = r[t, head] @ S[head]
        bonus = (r * k * att["r_k"]).sum(-1, keepdims=True) * v
        y = self.group_norm(y, att) + bonus.reshape(-1, self.A)
        return (y * g) @ att["output.weight"].T, S, v_first

    def channel_mix(self, ffn, h, p):
        inner = np.maximum((h + (p - h) * ffn["x_k"]) @ ffn["key.weight"].T, 0) ** 2
        return inner @ ffn["value.weight"].T


def oracle(weights: dict) -> Rwkv:
    """The oracle of a checkpoint's generation, told by the names of block 0."""
    att = {name.removeprefix("blocks.0.att.") for name in weights if name.startswith("blocks.0.att.")}
    kind = Rwkv7 if "r_k" in att else Rwkv6 if "time_maa_x" in att else Rwkv5 if "ln_x.weight" in att else Rwkv4
    return kind(weights)
