"""World vocabularies: the official one from the installed `rwkv` package, and smaller ones chosen for a corpus."""

import hashlib
import heapq
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .models.rwkv_vocabulary import read_world_vocabulary
from .models.tokenization_rwkv import RwkvTokenizer

WORLD_FILE = RwkvTokenizer.vocab_files_names["vocab_file"]
# Of the file with LF line ends; copies with CRLF are in circulation.
WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


def world_vocabulary_file() -> Path:
    """The vocabulary file inside the installed `rwkv` package, found without importing it.

    Raises FileNotFoundError when the package is absent and ValueError when its file is not the official one.
    """
    package = importlib.util.find_spec("rwkv")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"the World vocabulary {WORLD_FILE} is needed: `pip install rwkv`, or name the file (--vocab)"
        )
    path = Path(package.submodule_search_locations[0]) / WORLD_FILE
    digest = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    if digest != WORLD_SHA256:
        raise ValueError(f"{path}: SHA-256 {digest} (LF line ends) where the official file has {WORLD_SHA256}")
    return path


def build_tokenizer(vocab_file: str | Path | None = None, pieces: Iterable[bytes] | None = None) -> RwkvTokenizer:
    """A World tokenizer from the installed `rwkv` package, from an official vocabulary file, or from pieces.

    With `pieces`, ids 1..256 are the single bytes and 257.. the longer pieces in the order given, so that a small model
    needs few embedding rows. Raises ValueError for an empty or repeated piece.
    """
    if pieces is None:
        return RwkvTokenizer.from_vocabulary(read_world_vocabulary(vocab_file or world_vocabulary_file()))
    if vocab_file is not None:
        raise ValueError("build_tokenizer takes vocab_file or pieces, not both")
    counts = Counter(pieces)
    wrong = next((piece for piece, count in counts.items() if count > 1 or not piece), None)
    if wrong is not None:
        raise ValueError(f"pieces must be distinct and not empty, got {wrong!r} {counts[wrong]} times")
    single = [bytes([byte]) for byte in range(256)]
    return RwkvTokenizer.from_vocabulary(
        dict(enumerate(single + [piece for piece in counts if len(piece) > 1], start=1))
    )


def save_tokenizer(directory: str | Path, vocab_file: str | Path | None = None) -> RwkvTokenizer:
    """Build a tokenizer and save it in `directory`, which appears complete or not at all.

    Raises FileExistsError when `directory` is a file or a folder with something in it.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder")
    tokenizer = build_tokenizer(vocab_file)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        complete = Path(scratch) / directory.name
        tokenizer.save_pretrained(complete)
        os.replace(complete, directory)
    return tokenizer


def select_pieces(texts: Iterable[str], vocabulary: dict[int, bytes], size: int) -> list[bytes]:
    """The pieces of `vocabulary` that shorten the corpus most, for a tokenizer of `size` ids, end-of-text included.

    Returns the 256 single bytes and up to `size - 257` longer pieces, in order of their ids; fewer when the corpus has
    no use for as many. The number is brought down in steps, with the corpus tokenized anew at each, so that the counts
    agree with what is left. Raises ValueError when `size` is below 257.
    """
    if size < 257:
        raise ValueError(f"size {size} leaves no room for end-of-text and the 256 bytes: at least 257")
    texts = list(texts)
    order = {piece: index for index, piece in vocabulary.items()}
    kept = {piece for piece in order if len(piece) > 1}
    for limit in [4 * (size - 257), 2 * (size - 257), 5 * (size - 257) // 4, size - 257]:
        kept = _keep_most_useful(_count_pieces(texts, kept), kept, limit)
    single = [bytes([byte]) for byte in range(256)]
    return single + sorted(kept, key=order.__getitem__)


def _keep_most_useful(counts: Counter[bytes], pieces: set[bytes], limit: int) -> set[bytes]:
    """Drop pieces one by one until at most `limit` are in use, always the one whose loss costs fewest tokens.

    A dropped piece hands its count to the parts that greedy matching makes of it; these may have been unused before.
    """
    alive = set(pieces)
    in_use = {piece for piece in pieces if counts[piece]}
    heap = [(0, piece) for piece in in_use]
    heapq.heapify(heap)
    while len(in_use) > limit:
        stated_cost, piece = heapq.heappop(heap)
        parts = _split_without(piece, alive)
        cost = counts[piece] * (len(parts) - 1)
        # Costs only grow while others are dropped, so an entry that is still the cheapest after a new look is the one.
        if cost > stated_cost:
            heapq.heappush(heap, (cost, piece))
            continue
        alive.discard(piece)
        in_use.discard(piece)
        for part in (part for part in parts if len(part) > 1):
            if part not in in_use:
                in_use.add(part)
                heapq.heappush(heap, (0, part))
            counts[part] += counts[piece]
    return in_use


def _split_without(piece: bytes, pieces: set[bytes]) -> list[bytes]:
    """Greedy longest match of a piece's bytes when the piece itself is not in the vocabulary."""
    parts, start = [], 0
    while start < len(piece):
        longest = len(piece) - start if start else len(piece) - 1
        length = next((n for n in range(longest, 1, -1) if piece[start : start + n] in pieces), 1)
        parts.append(piece[start : start + length])
        start += length
    return parts


def _count_pieces(texts: list[str], pieces: set[bytes]) -> Counter[bytes]:
    tokenizer = build_tokenizer(pieces=sorted(pieces))
    counts = Counter()
    for start in range(0, len(texts), 64):
        for ids in tokenizer(texts[start : start + 64], return_attention_mask=False)["input_ids"]:
            counts.update(ids)
    return Counter({tokenizer.decode_bytes([index]): count for index, count in counts.items()})
