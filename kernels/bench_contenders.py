"""The programs that `bench.py` measures, each in a process of its own: a constructor loads, methods do the work.

Letters: D residual width, L blocks, V vocabulary rows, F feed-forward width, T tokens, B batch, H heads, K head size.
Most methods of a contender return seconds.
"""

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model that is measured: D, L, V and F, and F of the Llama with as many parameters."""

    name: str
    width: int
    layers: int
    vocabulary: int
    feed_forward: int
    llama_feed_forward: int


SHAPES = {
    "191m": Shape("191m", 768, 12, 65536, 3072, 2240),
    "tiny": Shape("tiny", 128, 2, 1024, 512, 448),
}


def checkpoint_paths(shape: Shape, cache: Path) -> tuple[Path, Path]:
    """Where the random weights of a shape lie: an official `.pth`, and a folder converted from it."""
    return cache / f"rwkv7-{shape.name}.pth", cache / f"rwkv7-{shape.name}"


def write_checkpoint(shape: Shape, cache: Path) -> None:
    """Write the random weights of a shape, unless they are there."""
    official, folder = checkpoint_paths(shape, cache)
    cache.mkdir(parents=True, exist_ok=True)
    if not official.exists():
        import torch

        sys.path.insert(0, str(ROOT / "tests"))
        from oracle.official import random_official_rwkv7

        weights = random_official_rwkv7(
            L=shape.layers, C=shape.width, N=64, V=shape.vocabulary, F=shape.feed_forward, ranks=(64, 64, 32, 128)
        )
        partial = official.with_suffix(".partial")
        torch.save(weights, partial)
        partial.rename(official)
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        from wkv.checkpoints import convert

        convert(official, folder, tokenizer=False)


class HuggingFace:
    """A causal language model with the interface of transformers."""

    def __init__(self, model):
        self.model = model.eval()
        self.cache = self.next = None

    def prefill(self, ids: list[int]) -> float:
        """Run a prompt of T tokens; logits of its last position only."""
        import torch

        tokens = torch.tensor([ids])
        self.model.eval()
        with torch.inference_mode():
            start = time.perf_counter()
            output = self.model(tokens, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
        self.cache, self.next = output.past_key_values, output.logits[0, -1]
        return seconds

    def decode(self, count: int) -> float:
        """Continue greedily by `count` tokens from where the last call stopped."""
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(count):
                output = self.model(self.next.argmax().view(1, 1), past_key_values=self.cache, use_cache=True)
                self.cache, self.next = output.past_key_values, output.logits[0, -1]
            return time.perf_counter() - start

    def train(self, ids: list[int]) -> float:
        """One forward pass with loss and one backward pass over T tokens, without an optimizer."""
        import torch

        tokens = torch.tensor([ids])
        self.model.train()
        start = time.perf_counter()
        self.model(tokens, labels=tokens, use_cache=False).loss.backward()
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return seconds

    def logits(self, ids: list[int]) -> list[float]:
        """The first logits after a prompt, to see that the contenders run the same weights."""
        self.prefill(ids)
        return self.next[:512].float().tolist()


class Wkv(HuggingFace):
    """This package."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        from transformers import AutoModelForCausalLM

        import wkv  # noqa: F401

        super().__init__(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


class Rwkv7Hf(HuggingFace):
    """The `rwkv7-hf` package."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        from rwkv7_hf import RWKV7ForCausalLM

        super().__init__(RWKV7ForCausalLM.from_pretrained(folder, dtype=dtype))


class Llama(HuggingFace):
    """A Llama of transformers with as many parameters, random weights."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            intermediate_size=shape.llama_feed_forward,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
        super().__init__(LlamaForCausalLM(config).to(getattr(torch, dtype)))


class Rwkv:
    """The official `rwkv` package, TorchScript on, as its README runs it on a CPU."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
        from rwkv.model import RWKV

        strategy = {"float32": "cpu fp32", "bfloat16": "cpu bf16"}[dtype]
        self.model = RWKV(model=str(official.with_suffix("")), strategy=strategy)
        self.state = self.next = None

    def prefill(self, ids: list[int]) -> float:
        start = time.perf_counter()
        self.next, self.state = self.model.forward(ids, None)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.next, self.state = self.model.forward([int(self.next.argmax())], self.state)
        return time.perf_counter() - start

    logits = HuggingFace.logits


class Machine:
    """What this machine gives: seconds to read one GiB, and seconds for a square product of side 4096."""

    def __init__(self):
        import torch

        self.memory = torch.ones(2**28)
        self.square = {name: torch.randn(4096, 4096).to(getattr(torch, name)) for name in ("float32", "bfloat16")}

    def read(self) -> float:
        start = time.perf_counter()
        self.memory.sum()
        return time.perf_counter() - start

    def product(self, dtype: str) -> float:
        matrix = self.square[dtype]
        start = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - start
