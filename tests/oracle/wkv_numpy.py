"""The operator wkv7 in numpy, float64, one element-wise rule a line: an oracle that shares no code with the package.

Letters: T tokens, H heads, K key and V value channels of a head, S state (K, V), d decay.
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
