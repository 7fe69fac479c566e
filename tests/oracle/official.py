"""Random checkpoints in the official layout, and the official `rwkv` package run on them: the judge of our numbers.

Letters: L blocks, C residual width, A attention width, H heads of size N (A = H*N), F channel-mix width,
V vocabulary rows, R rank of a low-rank pair (p1 (C, R), p2 (R, A)), T tokens.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

# Ranks of (decay w, in-context rate a, value residual v, gate g): all different, so that a mixed-up pair cannot fit.
TINY_RANKS = (5, 3, 4, 6)


def random_official_rwkv7(
    L: int = 3,
    C: int = 32,
    N: int = 8,
    V: int = 37,
    ranks: Sequence[int] = TINY_RANKS,
    F: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layer0_v: bool = False,
    A: int | None = None,
) -> dict[str, torch.Tensor]:
    """Draw an RWKV-7 checkpoint with the official names, singleton axes and order of keys.

    Gates are open to a varying degree and logits have a standard deviation of about 2 (extremes about 5). `ranks`
    are those of w, a, v, g; F defaults to 4C and A to C (the `rwkv` package runs A = C only); `layer0_v` adds the
    unused v0, v1, v2 of block 0 which some released files have.
    """
    A, F = A or C, F or 4 * C
    H = A // N
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": normal(width, mean=1.0, std=0.2), f"{name}.bias": normal(width, std=0.2)}

    weights = {"emb.weight": normal(V, C)}
    for layer in range(L):
        block = f"blocks.{layer}."
        if layer == 0:
            weights |= norm(block + "ln0", C)
        weights |= norm(block + "ln1", C) | norm(block + "ln2", C)
        att = block + "att."
        weights |= {att + f"x_{letter}": uniform(1, 1, C) for letter in "rwkvag"}
        base = {"w": (-2.0, 2.0), "a": (0.0, 0.5), "v": (0.0, 0.5)}
        for letter, rank in zip("wavg", ranks, strict=True):
            if letter == "v" and layer == 0 and not layer0_v:
                continue
            if letter in base:
                mean, std = base[letter]
                weights[att + letter + "0"] = normal(1, 1, A, mean=mean, std=std)
            weights[att + letter + "1"] = normal(C, rank, std=C**-0.5)
            weights[att + letter + "2"] = normal(rank, A, std=(2.0 if letter == "g" else 1.0) * rank**-0.5)
        weights[att + "k_k"] = normal(1, 1, A, mean=0.7, std=0.2)
        weights[att + "k_a"] = normal(1, 1, A, mean=1.0, std=0.2)
        weights[att + "r_k"] = normal(H, N, std=0.3)
        for name in ("receptance", "key", "value"):
            weights[att + name + ".weight"] = normal(A, C, std=C**-0.5)
        weights[att + "output.weight"] = normal(C, A, std=A**-0.5)
        weights |= norm(att + "ln_x", A)
        weights[block + "ffn.x_k"] = uniform(1, 1, C)
        weights[block + "ffn.key.weight"] = normal(F, C, std=C**-0.5)
        weights[block + "ffn.value.weight"] = normal(C, F, std=F**-0.5)
    weights |= norm("ln_out", C)
    weights["head.weight"] = normal(V, C, std=2 * C**-0.5)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def official_rwkv7(checkpoint: str | Path | dict[str, torch.Tensor], dtype: str = "fp32"):
    """Load a `.pth` file or a dict into the RWKV-7 of the `rwkv` package, on the CPU; `dtype` is fp32 or bf16."""
    os.environ["RWKV_V7_ON"] = "1"
    os.environ.setdefault("RWKV_JIT_ON", "1")
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        from rwkv.model import RWKV_x070

        path = Path(folder) / "model.pth"
        if isinstance(checkpoint, dict):
            torch.save(checkpoint, path)
        else:
            path.symlink_to(Path(checkpoint).resolve())
        return RWKV_x070(str(path.with_suffix("")), f"cpu {dtype}")


def official_logits(
    checkpoint: str | Path | dict[str, torch.Tensor],
    ids: Sequence[int],
    state: list[torch.Tensor] | None = None,
    dtype: str = "fp32",
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the `rwkv` package over `ids`: logits (T, V) of every position and the final state.

    `state` is a list of three tensors a layer: attention shift (C), WKV state (H, N, N) with rows = value channels,
    channel-mix shift (C). It is not modified. `dtype` is fp32 or bf16.
    """
    model = official_rwkv7(checkpoint, dtype)
    if state is None:
        state = zero_state(model, getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
    # The package's sequence path needs two tokens or more, and writes into the list that it is given.
    if len(ids) == 1:
        logits, state = model.forward(list(ids), list(state))
        return logits[None], state
    return model.forward(list(ids), list(state), full_output=True)


def zero_state(model, dtype: torch.dtype) -> list[torch.Tensor]:
    """The state before the first token; not the package's own, whose dtype follows the model loaded last."""
    C, H, N = model.n_embd, model.n_head, model.head_size
    return [
        t
        for _ in range(model.n_layer)
        for t in (torch.zeros(C, dtype=dtype), torch.zeros(H, N, N), torch.zeros(C, dtype=dtype))
    ]
