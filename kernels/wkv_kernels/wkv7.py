"""The operator wkv7 of RWKV-7.

Letters: B batch rows, T tokens, H heads, K key channels of a head, V value channels of a head, n packed sequences,
S the state (K, V), log_w the logarithm of the decay, a and b the rank-one change of the state, o the output.
"""

from torch import Tensor

from .calling import Shapes, check_heads, declare, run

_ROWS = ("r", "log_w", "k", "v", "a", "b")


def _shapes(r, log_w, k, v, a, b) -> Shapes:
    return check_heads(zip(_ROWS, (r, log_w, k, v, a, b), strict=True), v)


_OP = declare("wkv7", _ROWS, _shapes)


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-7: sa = a S, S = diag(exp(log_w)) S + b^T sa + k^T v, o = r S, in float32.

    r, log_w, k, a, b are (B, T, H, K) and v is (B, T, H, V), each float32, bfloat16 or float16, strided at will. state
    (B, H, K, V) float32 is the state before the first token, None for zeros. cu_seqlens (n + 1,) int32 or int64 says
    that the single row holds n sequences, sequence i at tokens cu_seqlens[i] to cu_seqlens[i + 1]; states then have n
    rows. Returns o (B, T, H, V) in the dtype of v and the state after the last token, float32. Gradients flow to every
    input but cu_seqlens, once. Raises ValueError naming the argument that does not fit. Source: RWKV-7 "Goose" (Peng et
    al. 2025), with the state transposed.

    GPUs need K <= 128 and log_w >= -exp(-1/2), which is as low as RWKV-7 goes, and do not read cu_seqlens back to check
    it: a token outside of every sequence gets an undefined o and undefined gradients.
    """
    return run(_OP, r, log_w, k, v, a, b, state, cu_seqlens)
