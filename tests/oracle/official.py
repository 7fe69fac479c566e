"""Random checkpoints in the official layout, and the official `rwkv` package run on them: the judge of our numbers.

Letters: L blocks, C residual width, A attention width, H heads of size N (A = H*N), F channel-mix width,
V vocabulary rows, R rank of a low-rank pair, T tokens.
"""

import contextlib
import functools
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")
# Ranks of the low-rank pairs, 6: (token shift, decay), 7: (decay w, in-context rate a, value residual v, gate g).
# All different, so that a mixed-up pair cannot fit.
RANKS = {"6": (3, 5), "7": (5, 3, 4, 6)}
TINY_RANKS = RANKS["7"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Weights = dict[str, torch.Tensor]


class _Draw:
    """A seeded source of tensors."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """A linear layer of unit gain."""
        return self.normal(rows, columns, std=columns**-0.5)

    def norm(self, name: str, width: int) -> Weights:
        return {f"{name}.weight": self.normal(width, mean=1.0, std=0.2), f"{name}.bias": self.normal(width, std=0.2)}


def random_official(
    version: str,
    L: int = 3,
    C: int = 32,
    N: int = 8,
    V: int = 37,
    ranks: Sequence[int] | None = None,
    F: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layer0_v: bool = False,
    A: int | None = None,
    bonus_is_log: bool | None = None,
) -> Weights:
    """Draw a checkpoint of a version with the official names, singleton axes and order of keys.

    Gates are open to a varying degree, decays lie between slow and erasing (but in 7, which cannot erase), and logits
    have a standard deviation of about 2 (extremes about 5). `ranks` are those of RANKS; F defaults to the version's
    rule and A to C (the `rwkv` package runs A = C only); `layer0_v` adds the unused v0, v1, v2 of block 0 which some
    released files of 7 have; `bonus_is_log` stores the bonus of 5.0 or 5.1 as `time_first`, its logarithm, and not as
    `time_faaaa`; files of 5.0 usually do. Version 4 has no heads and leaves N aside.
    """
    A = A or C
    F = F or (4 * C if version in ("4", "5.0", "7") else int(3.5 * C) // 32 * 32)
    log_bonus = version == "5.0" if bonus_is_log is None else bonus_is_log
    draw = _Draw(seed)
    weights = {"emb.weight": draw.normal(V, C)}
    for layer in range(L):
        block = f"blocks.{layer}."
        if layer == 0:
            weights |= draw.norm(block + "ln0", C)
        weights |= draw.norm(block + "ln1", C) | draw.norm(block + "ln2", C)
        if version == "7":
            att = _time_mix7(draw, C, A, N, ranks or RANKS["7"], residual_v=layer > 0 or layer0_v)
        elif version == "6":
            att = _time_mix6(draw, C, A, N, ranks or RANKS["6"])
        elif version == "4":
            att = _time_mix4(draw, C, A)
        else:
            att = _time_mix5(draw, C, A, N, version, log_bonus)
        weights |= {f"{block}att.{name}": tensor for name, tensor in att.items()}
        weights |= {f"{block}ffn.{name}": tensor for name, tensor in _channel_mix(draw, version, C, F).items()}
    weights |= draw.norm("ln_out", C)
    weights["head.weight"] = draw.normal(V, C, std=2 * C**-0.5)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


random_official_rwkv7 = functools.partial(random_official, "7")


def _decay(draw: _Draw, *shape: int) -> torch.Tensor:
    """Logarithms of decay rates: a token leaves between exp(-e^-5) = 0.993 and exp(-e^3) = 2e-9 of what was there."""
    return draw.uniform(*shape, low=-5.0, high=3.0)


def _time_mix4(draw: _Draw, C: int, A: int) -> Weights:
    att = {"time_decay": _decay(draw, A), "time_first": draw.normal(A)}
    att |= {f"time_mix_{x}": draw.uniform(1, 1, C) for x in "kvr"}
    att |= {f"{name}.weight": draw.matrix(A, C) for name in ("key", "value", "receptance")}
    return att | {"output.weight": draw.matrix(C, A)}


def _time_mix5(draw: _Draw, C: int, A: int, N: int, version: str, log_bonus: bool) -> Weights:
    H, gate = A // N, ["gate"] if version != "5.0" else []
    vector = (H, N) if version == "5.2" else (H,)
    att = {f"time_mix_{x}": draw.uniform(1, 1, C) for x in ("kvrg" if gate else "kvr")}
    att["time_decay"] = _decay(draw, *vector)
    att["time_first" if log_bonus else "time_faaaa"] = draw.normal(*vector, mean=-0.5 if log_bonus else 0.5, std=0.5)
    modules = ["receptance", "key", "value", "output", *gate] if version == "5.2" else [*gate, *_RKVO]
    att |= {f"{name}.weight": draw.matrix(C, A) if name == "output" else draw.matrix(A, C) for name in modules}
    return att | draw.norm("ln_x", A)


def _time_mix6(draw: _Draw, C: int, A: int, N: int, ranks: Sequence[int]) -> Weights:
    H, (R, Rd) = A // N, ranks
    att = {f"time_maa_{x}": draw.uniform(1, 1, C) for x in "xwkvrg"}
    att["time_maa_w1"] = draw.matrix(C, 5 * R)
    att["time_maa_w2"] = draw.normal(5, R, C, std=0.5 * R**-0.5)
    att["time_decay"] = _decay(draw, 1, 1, A)
    att["time_decay_w1"] = draw.normal(C, Rd, std=C**-0.5)
    att["time_decay_w2"] = draw.normal(Rd, A, std=Rd**-0.5)
    att["time_faaaa"] = draw.normal(H, N, mean=0.5, std=0.5)
    modules = [*_RKVO, "gate"]
    att |= {f"{name}.weight": draw.matrix(C, A) if name == "output" else draw.matrix(A, C) for name in modules}
    return att | draw.norm("ln_x", A)


def _time_mix7(draw: _Draw, C: int, A: int, N: int, ranks: Sequence[int], residual_v: bool) -> Weights:
    H = A // N
    att = {f"x_{letter}": draw.uniform(1, 1, C) for letter in "rwkvag"}
    base = {"w": (-2.0, 2.0), "a": (0.0, 0.5), "v": (0.0, 0.5)}
    for letter, rank in zip("wavg", ranks, strict=True):
        if letter == "v" and not residual_v:
            continue
        if letter in base:
            mean, std = base[letter]
            att[letter + "0"] = draw.normal(1, 1, A, mean=mean, std=std)
        att[letter + "1"] = draw.normal(C, rank, std=C**-0.5)
        att[letter + "2"] = draw.normal(rank, A, std=(2.0 if letter == "g" else 1.0) * rank**-0.5)
    att["k_k"] = draw.normal(1, 1, A, mean=0.7, std=0.2)
    att["k_a"] = draw.normal(1, 1, A, mean=1.0, std=0.2)
    att["r_k"] = draw.normal(H, N, std=0.3)
    att |= {f"{name}.weight": draw.matrix(C, A) if name == "output" else draw.matrix(A, C) for name in _RKVO}
    return att | draw.norm("ln_x", A)


_RKVO = ("receptance", "key", "value", "output")


def _channel_mix(draw: _Draw, version: str, C: int, F: int) -> Weights:
    mixes = {"6": ("time_maa_k", "time_maa_r"), "7": ("x_k",)}.get(version, ("time_mix_k", "time_mix_r"))
    ffn = {name: draw.uniform(1, 1, C) for name in mixes} | {"key.weight": draw.matrix(F, C)}
    if version != "7":
        ffn["receptance.weight"] = draw.matrix(C, C)
    return ffn | {"value.weight": draw.matrix(C, F)}


@functools.cache
def _package(for_rwkv7: bool) -> ModuleType:
    """The module `rwkv.model`, which runs either RWKV-7 or 4 to 6: its switches are read while it is imported."""
    os.environ.update(RWKV_V7_ON=str(int(for_rwkv7)), RWKV_JIT_ON=str(int(for_rwkv7)), RWKV_CUDA_ON="0")
    [folder] = importlib.util.find_spec("rwkv").submodule_search_locations
    name = "official_rwkv7" if for_rwkv7 else "official_rwkv456"
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "model.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # It collects garbage several times a checkpoint, which takes longer than all the rest.
    module.gc = SimpleNamespace(collect=lambda: None)
    return module


class Official:
    """A checkpoint in the `rwkv` package, on the CPU.

    A state is a list of three tensors a layer: attention shift (C), WKV state, channel-mix shift (C). The WKV state is
    as in our caches: 4: (A, 3) = numerator, denominator, exponent; 5, 6, 7: (H, K, V), rows = key channels.
    """

    def __init__(self, checkpoint: str | Path | Weights, dtype: str = "fp32"):
        """`checkpoint` is a `.pth` file or a dict, `dtype` fp32, bf16 or fp16 (4 to 6 then rescale every 6 layers)."""
        with contextlib.redirect_stdout(io.StringIO()), _as_file(checkpoint) as path:
            self.is_rwkv7 = "blocks.0.att.r_k" in torch.load(path)
            self.model = _package(self.is_rwkv7).RWKV(str(path.with_suffix("")), f"cpu {dtype}")
        self.is_rwkv4 = not self.is_rwkv7 and self.model.version == 4
        self.dtype = DTYPES[dtype]

    def zero_state(self) -> list[torch.Tensor]:
        """The state before the first token; not the package's own, whose dtype follows the RWKV-7 loaded last."""
        args = self.model.args
        C, L = args.n_embd, args.n_layer
        if self.is_rwkv4:
            wkv = torch.tensor([0.0, 0.0, -1e30]).repeat(args.n_att, 1)
        else:
            H = self.model.n_head if self.is_rwkv7 else args.n_head
            wkv = torch.zeros(H, C // H, C // H)
        return [t for _ in range(L) for t in (torch.zeros(C, dtype=self.dtype), wkv, torch.zeros(C, dtype=self.dtype))]

    def forward(self, ids: Sequence[int], state: list[torch.Tensor] | None = None):
        """Logits (T, V) of every position and the final state; `state` is not modified."""
        theirs = self._to_package(self.zero_state() if state is None else state)
        # The package's one-token path is code of its own; both write into the list that they are given.
        if len(ids) == 1:
            logits, theirs = self.model.forward(list(ids), theirs)
            logits = logits[None]
        else:
            logits, theirs = self.model.forward(list(ids), theirs, full_output=True)
        return logits, self._from_package(theirs)

    def _to_package(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        triples = zip(state[0::3], state[1::3], state[2::3], strict=True)
        if self.is_rwkv4:
            return [t for shift, wkv, ffn in triples for t in (shift, *wkv.unbind(-1), ffn)]
        return [t for shift, wkv, ffn in triples for t in (shift, wkv.mT if self.is_rwkv7 else wkv, ffn)]

    def _from_package(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.is_rwkv4:
            layers = [state[i : i + 5] for i in range(0, len(state), 5)]
            return [t for shift, *abp, ffn in layers for t in (shift, torch.stack(abp, -1), ffn)]
        return [t.mT if self.is_rwkv7 and t.ndim == 3 else t for t in state]


@contextlib.contextmanager
def _as_file(checkpoint: str | Path | Weights) -> Iterator[Path]:
    """A path that ends in .pth, which the package insists on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        if isinstance(checkpoint, dict):
            torch.save(checkpoint, path)
        else:
            path.symlink_to(Path(checkpoint).resolve())
        yield path


def official_logits(
    checkpoint: str | Path | Weights, ids: Sequence[int], state: list[torch.Tensor] | None = None, dtype: str = "fp32"
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the `rwkv` package over `ids`: logits (T, V) of every position and the final state (see `Official`)."""
    return Official(checkpoint, dtype).forward(ids, state)
