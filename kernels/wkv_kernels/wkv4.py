"""The operator wkv4 of RWKV-4.

Letters: B batch rows, T tokens, C channels, n packed sequences, log_w the logarithm of the decay, u the bonus of the
current token, a, b and p the state of a channel, o the output.
"""

from torch import Tensor

from .calling import Shapes, check_shared, check_tensor, declare, run


def _shapes(log_w, u, k, v) -> Shapes:
    shape = k.shape
    if len(shape) != 3:
        raise ValueError(f"k must have three dimensions (B, T, C), not shape {tuple(shape)}")
    if v.shape != shape:
        raise ValueError(f"v must have the shape of k, {tuple(shape)}, not {tuple(v.shape)}")
    check_shared("log_w", log_w, shape, "k")
    B, T, C = shape
    if u.shape != (C,):
        raise ValueError(f"u must have shape {(C,)}, not {tuple(u.shape)}")
    for name, x in (("log_w", log_w), ("u", u), ("k", k), ("v", v)):
        check_tensor(name, x, k.device, "k")
    return "k", B, T, 1, 1, C, (C, 3)


_OP = declare("wkv4", ("log_w", "u", "k", "v"), _shapes)


def wkv4(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-4: o = (A + e^(u+k) v) / (B + e^(u+k)), A = e^log_w A + e^k v, B = e^log_w B + e^k.

    k, v are (B, T, C) and u (C,), each float32, bfloat16 or float16, strided at will; log_w is (B, T, C), or has 1 for
    B or T where rows or tokens share a decay. state (B, C, 3) float32 is a, b and p before the first token, for
    A = a e^p and B = b e^p; a channel with b = 0 is empty, None is a state of empty channels. cu_seqlens (n + 1,) int32
    or int64 says that the single row holds n sequences, sequence i at tokens cu_seqlens[i] to cu_seqlens[i + 1]; states
    then have n rows. Returns o (B, T, C) in the dtype of v and the state after the last token, float32. Gradients flow
    to every input but cu_seqlens, once; p of the final state counts as a constant. Raises ValueError naming the
    argument that does not fit. Source: "RWKV: Reinventing RNNs for the Transformer Era" (Peng et al. 2023), appendix D.

    GPUs do not read cu_seqlens back to check it: a token outside of every sequence gets an undefined o and undefined
    gradients.
    """
    return run(_OP, log_w, u, k, v, state, cu_seqlens)
