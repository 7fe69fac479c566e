"""The PyTorch programs that `bench.py` measures, each in a process of its own: constructors load, methods do the work.

Letters: T tokens, B batch, H heads, K head size. Most methods return seconds. The number of threads is that of
OMP_NUM_THREADS.
"""

import contextlib
import copy
import os
import statistics
import time
from pathlib import Path

import psutil
import torch
from bench_weights import ZEROS, Shape
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

# Tokens of a slice when a context is read.
SLICE = 1024


class HuggingFace:
    """A causal language model with the interface of transformers."""

    # Where `adapt` puts its adapters; None leaves it to PEFT.
    projections: list[str] | None = None

    def __init__(self, model):
        self.model = model.eval()
        self.cache = self.next = None

    def prefill(self, ids: list[int], rows: int = 1) -> float:
        """Run a prompt of T tokens in every row of a batch; logits of its last position only."""
        tokens = torch.tensor([ids] * rows)  # (B, T)
        self.model.eval()
        with torch.inference_mode():
            start = time.perf_counter()
            output = self.model(tokens, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
        self.cache, self.next = output.past_key_values, output.logits[:, -1]
        return seconds

    def decode(self, count: int) -> float:
        """Continue greedily by `count` tokens a row from where the last call stopped."""
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(count):
                output = self.model(self.next.argmax(-1, keepdim=True), past_key_values=self.cache, use_cache=True)
                self.cache, self.next = output.past_key_values, output.logits[:, -1]
            return time.perf_counter() - start

    def decode_rows(self, rows: int, count: int) -> float:
        """Continue a short prompt by `count` tokens in each of `rows` rows."""
        self.prefill(list(range(1, 9)), rows)
        self.decode(1)
        return self.decode(count)

    def decode_after(self, context: int, count: int) -> tuple[float, int, int]:
        """Continue by `count` tokens after `context` others: seconds, and bytes of the cache and resident in all."""
        with torch.inference_mode():
            self.cache, self.next = self.cache_after(context), torch.zeros(1, 1)
            self.decode(1)
            seconds = self.decode(count)
            size = sum(t.nbytes for layer in self.cache.layers for t in self.tensors(layer))
            resident = psutil.Process().memory_info().rss
        self.cache = None
        return seconds, size, resident

    def train(self, ids: list[int]) -> float:
        """One forward pass with loss and one backward pass over T tokens, without an optimizer."""
        tokens = torch.tensor([ids])
        self.model.train()
        start = time.perf_counter()
        self.model(tokens, labels=tokens, use_cache=False).loss.backward()
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return seconds

    def adapt(self) -> int:
        """Freeze the model, with LoRA adapters of rank 16 at its blocks' projections; how many values those have."""
        config = LoraConfig(r=16, target_modules=self.projections, task_type="CAUSAL_LM")
        self.model = get_peft_model(self.model, config)
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def logits(self, ids: list[int]) -> list[float]:
        """The first logits after a prompt, to see that the contenders run the same weights."""
        self.prefill(ids)
        return self.next[0, :512].float().tolist()


class Wkv(HuggingFace):
    """This package."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        import wkv  # noqa: F401

        super().__init__(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        self.caches = {}

    def decode_with(self, zeros: float, method: str, *arguments):
        """Another method while about a share `zeros` of the feed-forward activations is zero, not that of the weights.

        The bias of the norm before the feed-forward moves them, see `bench_weights.random_weights`.
        """
        normal = statistics.NormalDist()
        self._set_bias(normal.inv_cdf(zeros) / normal.inv_cdf(ZEROS))
        result = getattr(self, method)(*arguments)
        self._set_bias(1.0)
        return result

    def decode_adapted(self, active: bool, count: int) -> float:
        """One row of `decode_rows` by an adapted model, with its adapters or without."""
        with contextlib.nullcontext() if active else self.model.disable_adapter():
            return self.decode_rows(1, count)

    def zeros(self, ids: list[int]) -> float:
        """The share of the feed-forward activations of a prompt that is zero."""
        shares = []
        hooks = [
            layer.ffn.value.register_forward_pre_hook(lambda _, x: shares.append((x[0] == 0).float().mean().item()))
            for layer in self.model.model.layers
        ]
        self.prefill(ids)
        for hook in hooks:
            hook.remove()
        return statistics.mean(shares)

    def cache_after(self, context: int) -> DynamicCache:
        """The state after `context` tokens, read in slices on top of the longest context so far."""
        if context not in self.caches:
            length = max(self.caches, default=0)
            cache = copy.deepcopy(self.caches[length]) if self.caches else DynamicCache(config=self.model.config)
            for start in range(length, context, SLICE):
                tokens = torch.arange(start, min(start + SLICE, context)) % (self.model.config.vocab_size - 1) + 1
                cache = self.model(
                    tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1
                ).past_key_values
            self.caches[context] = cache
        return copy.deepcopy(self.caches[context])

    @staticmethod
    def tensors(layer) -> list[torch.Tensor]:
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
        return [state for state in states if state is not None]

    @torch.no_grad()
    def _set_bias(self, value: float) -> None:
        for layer in self.model.model.layers:
            layer.ffn_norm.bias.fill_(value)


class Rwkv7Hf(HuggingFace):
    """The `rwkv7-hf` package."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        from rwkv7_hf import RWKV7ForCausalLM

        super().__init__(RWKV7ForCausalLM.from_pretrained(folder, dtype=dtype))


class Llama(HuggingFace):
    """A Llama of transformers with as many parameters, random weights."""

    # PEFT by itself takes two of them.
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            intermediate_size=shape.llama_feed_forward,
            max_position_embeddings=2**17,
            tie_word_embeddings=False,
        )
        super().__init__(LlamaForCausalLM(config).to(getattr(torch, dtype)))

    def cache_after(self, context: int) -> DynamicCache:
        """A cache of random keys and values for `context` tokens; to compute them would take many minutes."""
        config = self.model.config
        cache = DynamicCache(config=config)
        if context:
            block = torch.randn(1, config.num_key_value_heads, SLICE, config.head_dim, dtype=self.model.dtype)
            for layer in range(config.num_hidden_layers):
                keys = block.repeat(1, 1, -(-context // SLICE), 1)[:, :, :context]  # (B, H, T, K)
                cache.update(keys, keys, layer)
        return cache

    @staticmethod
    def tensors(layer) -> list[torch.Tensor]:
        return [layer.keys, layer.values]


class NativeRwkv4(HuggingFace):
    """The RWKV-4 of transformers itself, whose cache is called `state`."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM

        super().__init__(RwkvForCausalLM.from_pretrained(folder, dtype=dtype))

    def prefill(self, ids: list[int]) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            output = self.model.eval()(torch.tensor([ids]), use_cache=True)
            seconds = time.perf_counter() - start
        self.cache, self.next = output.state, output.logits[:, -1]
        return seconds

    def decode(self, count: int) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(count):
                output = self.model(self.next.argmax(-1, keepdim=True), state=self.cache, use_cache=True)
                self.cache, self.next = output.state, output.logits[:, -1]
            return time.perf_counter() - start


class Rwkv:
    """The official `rwkv` package, TorchScript on, as its README runs it on a CPU."""

    def __init__(self, shape: Shape, official: Path, folder: Path, dtype: str):
        os.environ.update(RWKV_V7_ON=str(int(shape.version == "7")), RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
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

    def logits(self, ids: list[int]) -> list[float]:
        self.prefill(ids)
        return self.next[:512].float().tolist()


class Machine:
    """What this machine gives: seconds to read one GiB, and seconds for a square product of side 4096."""

    def __init__(self):
        self.memory = torch.ones(2**28)
        self.square = {name: torch.randn(4096, 4096).to(getattr(torch, name)) for name in ("float32", "bfloat16")}

    def read(self, threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        start = time.perf_counter()
        torch.dot(self.memory, self.memory)
        seconds = time.perf_counter() - start
        torch.set_num_threads(before)
        return seconds

    def product(self, dtype: str) -> float:
        matrix = self.square[dtype]
        start = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - start
