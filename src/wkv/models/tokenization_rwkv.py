"""World tokenizer of RWKV: at each position the longest piece of the vocabulary that matches the UTF-8 bytes of the text.

Ids: 0 is end-of-text and has no bytes; 1..256 are the bytes 0x00..0xFF; longer pieces follow (1..65529 in the World vocabulary).
Two engines give the same ids. `tokenizer.json` holds the vocabulary as a WordLevel model behind one regular expression, which is the
whole trie written out, so any program that reads `tokenizer.json` needs nothing of ours. Where `wkv_kernels` is installed, its compiled
trie does the bulk of the work. Pieces are byte strings, many of them invalid UTF-8, so inside the `tokenizers` library every byte is
written as one printable character (the byte-level alphabet of GPT-2).
"""

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, logging

try:
    from wkv_kernels.trie import Trie
except ImportError:
    Trie = None

logger = logging.get_logger(__name__)

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"

CHAT_TEMPLATE = r"""{%- for message in messages %}
    {%- if message['content'] is string %}
        {%- set content = message['content'] %}
    {%- else %}
        {%- set content = message['content'] | map(attribute='text') | join('\n') %}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:' }}
        {%- generation %}
            {{- ' ' + content.strip() + '\n\n' }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user'] %}
        {%- set lines = content.replace('\r\n', '\n').strip().split('\n') | select | join('\n') %}
        {{- message['role'] | capitalize + ': ' + lines + '\n\n' }}
    {%- else %}
        {{- raise_exception("role '" ~ message['role'] ~ "' is not one of system, user, assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}"""


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where printable, the next free one from U+0100 on elsewhere."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(c): c for c in characters if ord(c) < 256}
    substitutes = (c for c in characters if ord(c) >= 256)
    return [printable.get(byte) or next(substitutes) for byte in range(256)]


BYTE_TO_CHARACTER = _byte_alphabet()
CHARACTER_TO_BYTE = {ord(c): byte for byte, c in enumerate(BYTE_TO_CHARACTER)}


def to_alphabet(data: bytes) -> str:
    return data.decode("latin-1").translate(BYTE_TO_CHARACTER)


def from_alphabet(token: str) -> bytes:
    return token.translate(CHARACTER_TO_BYTE).encode("latin-1")


def read_world_vocabulary(path: str | Path) -> dict[int, bytes]:
    """Read an official vocabulary file, lines of `id literal byte_length`, into id -> bytes.

    Raises ValueError naming the file and the line for anything but ids 1, 2, 3, ... with distinct pieces of the stated length, the first 256
    of them the single bytes in order.
    """
    vocabulary: dict[int, bytes] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a World vocabulary: {error}") from None
    seen = set()
    for number, line in enumerate(lines, start=1):
        try:
            index, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            piece = ast.literal_eval(literal)
            piece = piece.encode() if isinstance(piece, str) else piece
            if not isinstance(piece, bytes) or len(piece) != int(length):
                raise ValueError(f"the literal does not have the stated {length} bytes")
            if int(index) != number:
                raise ValueError(f"id {index} where {number} was due")
            if number <= 256 and piece != bytes([number - 1]):
                raise ValueError(f"id {number} must be the byte {number - 1:#04x}")
            if not piece or piece in seen:
                raise ValueError("an empty or repeated piece")
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path}, line {number}: expected `id literal byte_length`: {error}") from None
        seen.add(piece)
        vocabulary[number] = piece
    if len(vocabulary) < 256:
        raise ValueError(f"{path}: {len(vocabulary)} pieces, but the 256 single bytes alone need 256 lines")
    return vocabulary


def _trie_regex(pieces: Iterable[bytes]) -> str:
    """The trie of the pieces as one regular expression that matches the longest piece at a position.

    Children that lead to the same sub-expression share it. Escapes are the ones that every regex dialect accepts.
    """
    root: dict = {}
    for piece in pieces:
        node = root
        for byte in piece:
            node = node.setdefault(byte, {})
        node[None] = {}

    def expression(node: dict) -> str:
        heads: dict[str, list[str]] = {}
        for byte, child in node.items():
            if byte is not None:
                heads.setdefault(expression(child), []).append(BYTE_TO_CHARACTER[byte])
        branches = []
        for tail, characters in heads.items():
            if len(characters) == 1:
                head = re.sub(r"[\^$.*+?()\[\]{}|\\]", r"\\\g<0>", characters[0])
            else:
                head = "[" + re.sub(r"[\^\-\[\]\\]", r"\\\g<0>", "".join(characters)) + "]"
            branches.append(head + tail)
        if not branches:
            return ""
        # The engine tries branches in order; a long branch holds much of the vocabulary and so much of the text.
        alternatives = "|".join(sorted(branches, key=len, reverse=True))
        if None in node:
            return f"(?:{alternatives})?"
        return alternatives if len(branches) == 1 else f"(?:{alternatives})"

    return expression(root)


def world_backend(vocabulary: dict[int, bytes], end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """The `tokenizers` pipeline for a vocabulary id -> bytes that holds the 256 single bytes; id 0 becomes `end_of_text`."""
    tokens = {end_of_text: 0} | {to_alphabet(piece): index for index, piece in vocabulary.items()}
    backend = Tokenizer(models.WordLevel(tokens, unk_token=end_of_text))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    longest_match = pre_tokenizers.Split(Regex(_trie_regex(vocabulary.values())), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([byte_level, longest_match])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return backend


class _LazyEncodings(Sequence):
    """The `encodings` of a batch that the trie tokenized, computed by the `tokenizers` library when someone asks for them."""

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


class RwkvTokenizer(PreTrainedTokenizerFast):
    """The World tokenizer; made by `from_pretrained` (a `tokenizer.json` or the official vocabulary file) or `from_vocabulary`.

    pad = bos = eos = unk = id 0 and nothing is added to a text. A `tokenizer.json` of another kind (GPT-NeoX for RWKV-4 Pile) works as in
    the base class.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt", "tokenizer_file": "tokenizer.json"}
    # id -> bytes and the compiled trie, made at the first use.
    _world: tuple[list[bytes], "Trie | None"] | None = None

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[int, bytes]) -> "RwkvTokenizer":
        """A tokenizer for id -> bytes, as `read_world_vocabulary` returns it; ids need not be those of the World vocabulary."""
        return cls(**cls._world_arguments(vocabulary, END_OF_TEXT), chat_template=CHAT_TEMPLATE)

    @staticmethod
    def _world_arguments(vocabulary: dict[int, bytes], end_of_text: str) -> dict:
        return {
            "tokenizer_object": world_backend(vocabulary, end_of_text),
            **dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], end_of_text),
            "padding_side": "left",
        }

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict:
        """Take `tokenizer.json` as it is; build the same pipeline where a folder has only the official vocabulary file.

        Such folders name id 0 in several ways and some call the ordinary piece "\\n\\n" their eos; here id 0 gets one name and all four roles.
        """
        if kwargs.get("tokenizer_file"):
            kwargs.pop("vocab_file", None)
            return kwargs
        vocabulary = read_world_vocabulary(kwargs.pop("vocab_file"))
        names = [str(kwargs.pop(role, None) or "") for role in ("unk_token", "bos_token", "eos_token", "pad_token")]
        end_of_text = next((name for name in names if name.strip()), END_OF_TEXT)
        if names[2] not in ("", end_of_text):
            logger.warning(f"eos_token {names[2]!r} of the tokenizer config is replaced by {end_of_text!r} (id 0)")
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {index: token for index, token in added.items() if index > len(vocabulary)}
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        return {**kwargs, **cls._world_arguments(vocabulary, end_of_text)}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_world": None}

    def _load_world(self) -> tuple[list[bytes], "Trie | None"] | None:
        """id -> bytes and the trie, or None when the backend is not the World pipeline."""
        backend = self._tokenizer
        is_world = isinstance(backend.model, models.WordLevel) and backend.normalizer is None
        if is_world and self._world is None:
            tokens = backend.get_vocab(with_added_tokens=False)
            tokens.pop(backend.model.unk_token)
            pieces = [b""] * (max(tokens.values()) + 1)
            for token, index in tokens.items():
                pieces[index] = from_alphabet(token)
            self._world = pieces, Trie and Trie(pieces)
        return self._world if is_world else None

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any byte string, valid UTF-8 or not; special and added tokens are not looked for."""
        _, trie = self._load_world()
        if trie is not None:
            return trie.encode([data])[0].tolist()
        longest_match = self._tokenizer.pre_tokenizer[1]
        return [self._tokenizer.token_to_id(token) for token, _ in longest_match.pre_tokenize_str(to_alphabet(data))]

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The bytes of the ids, joined; added tokens are their UTF-8, ids without a piece are nothing. ValueError for a negative id."""
        pieces, _ = self._load_world()
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
        clean_up = self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        if clean_up or self._load_world() is None:
            return super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")


class RWKVWorldTokenizer(RwkvTokenizer):
    """The name in v5-Eagle repositories."""


class Rwkv5Tokenizer(RwkvTokenizer):
    """The name in RWKV-5 World repositories."""


class Rwkv6Tokenizer(RwkvTokenizer):
    """The name in RWKV-6 World repositories."""


class RWKV7Tokenizer(RwkvTokenizer):
    """The name in folders written by rwkv7-hf."""
