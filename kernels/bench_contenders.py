"""The programs that `bench.py` measures, each in a process of its own: a constructor loads, methods do the work.

Letters: D residual width, L blocks, V vocabulary rows, F feed-forward width, T tokens, B batch, H heads, K head size.
Every method of a contender returns seconds; `serve` answers the calls of `bench.py` over a pipe.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import resource
import shutil
import sys
import time
import traceback
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


def checkpoint(shape: Shape, cache: Path) -> tuple[Path, Path]:
    """Random weights of this shape as an official `.pth` and, converted from it, as a folder; written once."""
    official, folder = cache / f"rwkv7-{shape.name}.pth", cache / f"rwkv7-{shape.name}"
    cache.mkdir(parents=True, exist_ok=True)
    if not official.exists():
        import torch

        sys.path.insert(0, str(ROOT / "tests"))
        from oracle.official import random_official_rwkv7

        weights = random_official_rwkv7(
            L=shape.layers, C=shape.width, N=64, V=shape.vocabulary, F=shape.feed_forward, ranks=(64, 64, 32, 128)
        )
        torch.save(weights, official.with_suffix(".partial"))
        official.with_suffix(".partial").rename(official)
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        from wkv.checkpoints import convert

        convert(official, folder, tokenizer=False)
    return official, folder


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


def serve(pipe, distribution: str, path: str, threads: int, arguments: tuple) -> None:
    """Load the contender `path`, then answer calls `(method, arguments)` with `(result, peak memory)` until None comes.

    `path` is module.class; memory is in bytes. A contender whose distribution is not installed, or that fails, answers
    with a string that says so.
    """
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pipe.send(f"not installed: pip install {distribution}")
        return
    try:
        import torch
        from transformers.utils import logging

        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        module, name = path.split(".")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            contender = getattr(importlib.import_module(module), name)(*arguments)
            pipe.send(None)
            while (call := pipe.recv()) is not None:
                result = getattr(contender, call[0])(*call[1:])
                pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        # The bench was interrupted; nobody listens any more.
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"failed: {type(error).__name__}")
