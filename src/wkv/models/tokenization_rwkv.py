"""World tokenizer of RWKV: at each position the longest piece of the vocabulary that matches the bytes of the text.

Two engines give the same ids. `tokenizer.json` holds the vocabulary behind one regular expression, the whole trie
written out, so a program that reads `tokenizer.json` needs nothing of ours. Where `wkv_kernels` is installed, its trie,
made from the same file at the first use, does the bulk of the work.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import numpy as np
from tokenizers import AddedToken, Encoding
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, logging

from .rwkv_chat_templates import CHAT_TEMPLATES
from .rwkv_publishing import TokenizerPushesCode
from .rwkv_vocabulary import backend_pieces, encode_with_backend, read_world_vocabulary, world_backend

# One warning that nothing is compiled is enough; the module of the operator gives it.
try:
    from wkv_kernels.trie import Trie
except ImportError:
    Trie = None

logger = logging.get_logger(__name__)

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
END_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

# What the trie serves; any other option that is set goes to the `tokenizers` library.
TRIE_OPTIONS = {
    "add_special_tokens",
    "padding_strategy",
    "truncation_strategy",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_tensors",
    "return_attention_mask",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
    "split_special_tokens",
    "verbose",
}


class _LazyEncodings(Sequence):
    """The `encodings` of a batch from the trie, made by the `tokenizers` library when someone asks for them."""

    def __init__(self, size: int, compute: Callable[[], list[Encoding]]):
        self.size, self.compute, self.encodings = size, compute, None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if self.encodings is None:
            self.encodings = self.compute()
        return self.encodings[index]

    def __reduce__(self):
        return list, (self[:],)


def _encode_between(trie: "Trie", texts: Sequence[str], found: list[tuple[int, AddedToken]]) -> list:
    """(ids, spans) of texts that contain added tokens: these are cut out first, the longest at each place.

    As in the `tokenizers` library, tokens that are not `normalized` (all special ones) are cut out before the others.
    """
    # (row, first character, text, id if the text is an added token)
    parts = [(row, 0, text, None) for row, text in enumerate(texts)]
    for normalized in (False, True):
        ids = {token.content: index for index, token in found if token.normalized == normalized}
        if not ids:
            continue
        pattern = re.compile("(" + "|".join(re.escape(content) for content in sorted(ids, key=len, reverse=True)) + ")")
        uncut, parts = parts, []
        for row, start, text, index in uncut:
            for place, part in enumerate(pattern.split(text) if index is None else [text]):
                if part:
                    parts.append((row, start, part, ids[part] if place % 2 else index))
                    start += len(part)
    encoded = iter(trie.encode([text.encode() for *_, text, index in parts if index is None], spans=True))
    row_ids = [[np.empty(0, np.int32)] for _ in texts]
    row_spans = [[np.empty((0, 2), np.int32)] for _ in texts]
    for row, start, text, index in parts:
        ids, span = next(encoded) if index is None else (np.array([index], np.int32), np.array([[0, len(text)]]))
        row_ids[row].append(ids)
        row_spans[row].append(span + start)
    return list(zip(map(np.concatenate, row_ids), map(np.concatenate, row_spans), strict=True))


class RwkvTokenizer(TokenizerPushesCode, PreTrainedTokenizerFast):
    """The World tokenizer, from a `tokenizer.json`, from the official vocabulary file, or by `from_vocabulary`.

    pad = bos = eos = unk = id 0, and nothing is added to a text. With a `tokenizer.json` of another kind (the 20B one,
    for RWKV-4 Pile and Raven) it is what its base class is.
    """

    vocab_files_names: ClassVar = {"vocab_file": "rwkv_vocab_v20230424.txt", "tokenizer_file": "tokenizer.json"}
    padding_side = "left"
    # Bytes of each id and compiled trie, made at the first use; (None, None) for a `tokenizer.json` of another kind.
    _world: tuple[list[bytes] | None, "Trie | None"] | None = None
    # The Python integers 0, 1, 2, ...: ids in lists share them, for speed and a fifth of the memory.
    _integers: np.ndarray | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Old GGUF files name a template inside llama.cpp.
        if self.chat_template == "rwkv-world":
            self.chat_template = CHAT_TEMPLATES["world"]
        # Not all files name all roles; in every RWKV vocabulary id 0 ends a text.
        first = self._tokenizer.get_added_tokens_decoder().get(0)
        if first is not None and first.special and self.eos_token in (None, first.content):
            self.add_special_tokens({role: first for role in END_ROLES if getattr(self, role) is None})

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[int, bytes]) -> "RwkvTokenizer":
        """A tokenizer for id -> bytes. Ids must be 1, 2, 3, ... and all 256 single bytes be among the pieces."""
        return cls(**cls._world_arguments(vocabulary, END_OF_TEXT), chat_template=CHAT_TEMPLATES["world"])

    @staticmethod
    def _world_arguments(vocabulary: dict[int, bytes], end_of_text: str) -> dict:
        return {
            "tokenizer_object": world_backend(vocabulary, end_of_text),
            **dict.fromkeys(END_ROLES, end_of_text),
            "padding_side": "left",
        }

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict:
        """Take `tokenizer.json` as it is; build the same pipeline where a folder has only the official vocabulary file.

        Such folders name id 0 in several ways, and some call the ordinary piece of two newlines their eos; here id 0
        has one name and all four roles.
        """
        if kwargs.get("tokenizer_file") or kwargs.get("gguf_file"):
            kwargs.pop("vocab_file", None)
            return kwargs
        vocab_file = kwargs.pop("vocab_file", None)
        if vocab_file is None:
            names = " or ".join(sorted(cls.vocab_files_names.values(), reverse=True))
            raise ValueError(f"{kwargs.get('name_or_path') or 'this folder'} has no tokenizer: {names} is needed")
        vocabulary = read_world_vocabulary(vocab_file)
        unk, bos, eos, pad = (str(kwargs.pop(f"{role}_token", None) or "") for role in ("unk", "bos", "eos", "pad"))
        end_of_text = next((name for name in (unk, bos, eos, pad) if name.strip()), END_OF_TEXT)
        if eos not in ("", end_of_text):
            logger.warning(f"eos_token {eos!r} of the tokenizer config is replaced by {end_of_text!r}, id 0")
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {index: token for index, token in added.items() if index > len(vocabulary)}
        kwargs.setdefault("chat_template", CHAT_TEMPLATES["world"])
        return {**kwargs, **cls._world_arguments(vocabulary, end_of_text)}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_world": None, "_integers": None}

    def _load_world(self) -> tuple[list[bytes] | None, "Trie | None"]:
        if self._world is None:
            pieces = backend_pieces(self._tokenizer)
            self._world = pieces, Trie(pieces) if Trie and pieces else None
        return self._world

    def _world_pieces(self) -> list[bytes]:
        pieces, _ = self._load_world()
        if pieces is None:
            raise ValueError(
                f"{self.name_or_path or 'this tokenizer'}: tokenizer.json does not hold a World vocabulary"
            )
        return pieces

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any byte string, valid UTF-8 or not; special and added tokens are not looked for."""
        self._world_pieces()
        _, trie = self._load_world()
        return encode_with_backend(self._tokenizer, data) if trie is None else trie.encode([data])[0].tolist()

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The bytes of the ids, joined: of an added token its UTF-8, of an id without a piece none.

        Raises ValueError for a negative id.
        """
        pieces = self._world_pieces()
        added = {
            index: b"" if skip_special_tokens and token.special else token.content.encode()
            for index, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        parts = []
        for index in ids:
            if index in added:
                parts.append(added[index])
            elif 0 <= index < len(pieces):
                parts.append(pieces[index])
            elif index < 0:
                raise ValueError(f"token id {index} is negative")
        return b"".join(parts)

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        """Join the bytes first and decode UTF-8 once: a character may be spread over several tokens."""
        clean_up = clean_up_tokenization_spaces
        clean_up = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        if clean_up or self._load_world()[0] is None:
            return super()._decode(token_ids, skip_special_tokens, clean_up, **kwargs)
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")

    def _encode_plus(self, text, text_pair=None, **options) -> BatchEncoding:
        """Tokenize with the trie where it can do what is asked, else in the base class; the results are equal."""

        def encode() -> BatchEncoding:
            return super(RwkvTokenizer, self)._encode_plus(text, text_pair, **options)

        texts = [text] if isinstance(text, str) else text
        is_plain = isinstance(texts, (list, tuple)) and texts and all(isinstance(one, str) for one in texts)
        rows = self._trie_rows(texts, options) if is_plain and text_pair is None else None
        if rows is None:
            return encode()
        data = self._pad_rows(*rows, options)
        for ids in data["input_ids"]:
            self._eventual_warn_about_too_long_sequence(ids, options.get("max_length"), options.get("verbose", True))
        tensors = options.get("return_tensors")
        if isinstance(text, str) and tensors is None:
            data = {key: value[0] if isinstance(value[0], list) else value for key, value in data.items()}
        return BatchEncoding(data, _LazyEncodings(len(texts), lambda: encode().encodings), tensors, n_sequences=1)

    def _trie_rows(self, texts: Sequence[str], options: dict) -> tuple[list, list] | None:
        """Truncated ids (n,) and, if asked for, character spans (n, 2) of each text; None if the trie cannot serve."""
        _, trie = self._load_world()
        truncation = options.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE)
        limit = None if truncation == TruncationStrategy.DO_NOT_TRUNCATE else options.get("max_length")
        if (
            trie is None
            or self._tokenizer.normalizer is not None
            or any(value for option, value in options.items() if option not in TRIE_OPTIONS)
            or (options.get("add_special_tokens", True) and self._tokenizer.num_special_tokens_to_add(False))
            or truncation == TruncationStrategy.ONLY_SECOND
            or limit == 0
        ):
            return None
        added = self._tokenizer.get_added_tokens_decoder().items()
        found = [(index, token) for index, token in added if any(token.content in text for text in texts)]
        split_special = self.split_special_tokens or options.get("split_special_tokens")
        if found and (split_special or any(token.lstrip or token.rstrip or token.single_word for _, token in found)):
            return None
        with_spans = bool(found or options.get("return_offsets_mapping"))
        rows = _encode_between(trie, texts, found) if found else trie.encode([t.encode() for t in texts], with_spans)
        ids, spans = zip(*rows, strict=True) if with_spans else (rows, [])
        keep = slice(limit) if self.truncation_side == "right" or limit is None else slice(-limit, None)
        return [row[keep] for row in ids], [row[keep] for row in spans if options.get("return_offsets_mapping")]

    def _pad_rows(self, rows: list[np.ndarray], spans: list[np.ndarray], options: dict) -> dict[str, list]:
        """The fields of a BatchEncoding, padded as the options say."""
        lengths = [len(row) for row in rows]
        strategy = options.get("padding_strategy", PaddingStrategy.DO_NOT_PAD)
        multiple = options.get("pad_to_multiple_of") or 1
        width = options["max_length"] if strategy == PaddingStrategy.MAX_LENGTH else max(lengths)
        width = 0 if strategy == PaddingStrategy.DO_NOT_PAD else -(-width // multiple) * multiple
        on_the_left = (options.get("padding_side") or self.padding_side) == "left"

        def padded(values: list, fill) -> list:
            if len(values) >= width:
                return values
            padding = [fill] * (width - len(values))
            return padding + values if on_the_left else values + padding

        if self._integers is None or len(self._integers) < len(self):
            self._integers = np.array(range(len(self)), dtype=object)
        data = {"input_ids": [padded(self._integers.take(row).tolist(), self.pad_token_id) for row in rows]}
        wants_mask = options.get("return_attention_mask")
        if "attention_mask" in self.model_input_names if wants_mask is None else wants_mask:
            data["attention_mask"] = [padded([1] * length, 0) for length in lengths]
        if options.get("return_special_tokens_mask"):
            data["special_tokens_mask"] = [padded([0] * length, 1) for length in lengths]
        if options.get("return_offsets_mapping"):
            data["offset_mapping"] = [padded(list(map(tuple, span.tolist())), (0, 0)) for span in spans]
        if options.get("return_length"):
            data["length"] = [len(ids) for ids in data["input_ids"]]
        return data


class RWKVWorldTokenizer(RwkvTokenizer):
    """The name in v5-Eagle repositories."""


class Rwkv5Tokenizer(RwkvTokenizer):
    """The name in RWKV-5 World repositories."""


class Rwkv6Tokenizer(RwkvTokenizer):
    """The name in RWKV-6 World repositories."""


class RWKV7Tokenizer(RwkvTokenizer):
    """The name in folders written by rwkv7-hf."""
