"""The operator wkv6 of RWKV-6 and, with a decay that all tokens share, of RWKV-5.

Letters: B batch rows, T tokens, H heads, K key channels of a head, V value channels of a head, n packed sequences,
S the state (K, V), log_w the logarithm of the decay, u the bonus of the current token, o the output.
"""

from torch import Tensor

from .calling import Shapes, check_heads, check_shared, check_tensor, declare, run


def _shapes(r, log_w, u, k, v) -> Shapes:
    shapes = check_heads((("r", r), ("k", k), ("v", v)), v)
    check_shared("log_w", log_w, r.shape, "r")
    if u.shape != r.shape[2:]:
        raise ValueError(f"u must have shape {tuple(r.shape[2:])}, not {tuple(u.shape)}")
    check_tensor("log_w", log_w, r.device, "r")
    check_tensor("u", u, r.device, "r")
    return shapes


_OP = declare("wkv6", ("r", "log_w", "u", "k", "v"), _shapes)


def wkv6(
    r: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-6: o = r (S + diag(u) k^T v), S = diag(exp(log_w)) S + k^T v, in float32.

    r, k are (B, T, H, K), v is (B, T, H, V) and u (H, K), each float32, bfloat16 or float16, strided at will; log_w is
    (B, T, H, K), or has 1 for B or T where rows or tokens share a decay (RWKV-5), and is at most 0, down to -inf. state
    (B, H, K, V) float32 is the state before the first token, None for zeros. cu_seqlens (n + 1,) int32 or int64 says
    that the single row holds n sequences, sequence i at tokens cu_seqlens[i] to cu_seqlens[i + 1]; states then have n
    rows. Returns o (B, T, H, V) in the dtype of v and the state after the last token, float32. Gradients flow to every
    input but cu_seqlens, once. Raises ValueError naming the argument that does not fit. Source: "Eagle and Finch" (Peng
    et al. 2024), section 4.

    GPUs need K <= 128 and do not read cu_seqlens back to check it: a token outside of every sequence gets an undefined
    o and undefined gradients.
    """
    return run(_OP, r, log_w, u, k, v, state, cu_seqlens)
