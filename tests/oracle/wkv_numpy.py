"""The WKV operators in numpy, float64, one element-wise rule a line: an oracle that shares no code with the package.

Letters: T tokens, H heads, K key and V value channels of a head, S state (K, V), d decay; C channels.
"""

import numpy as np


def wkv7(r, log_w, k, v, a, b, state):
    """One sequence: r, log_w, k, a, b (T, H, K), v (T, H, V), state (H, K, V); returns o and the last state."""
    r, log_w, k, v, a, b = (np.asarray(x, dtype=np.float64) for x in (r, log_w, k, v, a, b))
    state = np.asarray(state, dtype=np.float64).copy()
    T, H, V = v.shape
    o = np.zeros((T, H, V))
    for h in range(H):
        S = state[h]
        for t in range(T):
            d = np.exp(log_w[t, h])
            sa = a[t, h] @ S
            S = np.diag(d) @ S + np.outer(b[t, h], sa) + np.outer(k[t, h], v[t, h])
            o[t, h] = r[t, h] @ S
        state[h] = S
    return o, state


def wkv6(r, log_w, u, k, v, state):
    """One sequence: r, log_w, k (T, H, K), u (H, K), v (T, H, V), state (H, K, V); returns o and the last state."""
    r, log_w, u, k, v = (np.asarray(x, dtype=np.float64) for x in (r, log_w, u, k, v))
    state = np.asarray(state, dtype=np.float64).copy()
    T, H, K = k.shape
    o = np.zeros(v.shape)
    for h in range(H):
        for t in range(T):
            for i in range(K):
                o[t, h] += r[t, h, i] * (state[h, i] + u[h, i] * k[t, h, i] * v[t, h])
                state[h, i] = np.exp(log_w[t, h, i]) * state[h, i] + k[t, h, i] * v[t, h]
    return o, state


def wkv4(log_w, u, k, v, state):
    """One sequence: log_w, k, v (T, C), u (C,), state (C, 3); returns o and the last sums of values and weights (C, 2).

    Every token's weight is written out: e^k, times the decays since; the state stands for a token before the first.
    """
    log_w, u, k, v, state = (np.asarray(x, dtype=np.float64) for x in (log_w, u, k, v, state))
    T, _ = k.shape
    age = np.vstack([np.zeros_like(u), np.cumsum(log_w, 0)])
    o = np.zeros(k.shape)
    for t in range(T + 1):
        past = np.exp(k[:t] + age[t] - age[1 : t + 1])
        values = (past * v[:t]).sum(0) + state[:, 0] * np.exp(state[:, 2] + age[t])
        weights = past.sum(0) + state[:, 1] * np.exp(state[:, 2] + age[t])
        if t < T:
            o[t] = (values + np.exp(u + k[t]) * v[t]) / (weights + np.exp(u + k[t]))
    return o, np.stack([values, weights], -1)
