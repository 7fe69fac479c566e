"""The World vocabulary: its file, its alphabet inside the `tokenizers` library, its trie as one regular expression.

Ids: 0 is end-of-text and has no bytes; 1..256 are the bytes 0x00..0xFF; longer pieces follow, up to 65529 in the
official file. Pieces are byte strings, many of them invalid UTF-8, so inside the `tokenizers` library every byte is
written as one printable character (the byte-level alphabet of GPT-2).
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where printable, the next free one from U+0100 on elsewhere."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(c): c for c in characters if ord(c) < 256}
    substitutes = (c for c in characters if ord(c) >= 256)
    return [printable.get(byte) or next(substitutes) for byte in range(256)]


BYTE_TO_CHARACTER = _byte_alphabet()
CHARACTER_TO_BYTE = {ord(c): byte for byte, c in enumerate(BYTE_TO_CHARACTER)}
# The same in a regular expression, on its own and inside a character class; escaped only where every dialect wants it.
ESCAPED = [re.sub(r"[\^$.*+?()\[\]{}|\\]", r"\\\g<0>", c) for c in BYTE_TO_CHARACTER]
ESCAPED_IN_CLASS = [re.sub(r"[\^\-\[\]\\]", r"\\\g<0>", c) for c in BYTE_TO_CHARACTER]


def to_alphabet(data: bytes) -> str:
    """Any bytes, one printable character for each."""
    return data.decode("latin-1").translate(BYTE_TO_CHARACTER)


def from_alphabet(token: str) -> bytes:
    """The bytes that `to_alphabet` was given."""
    return token.translate(CHARACTER_TO_BYTE).encode("latin-1")


def read_world_vocabulary(path: str | Path) -> dict[int, bytes]:
    """Read an official vocabulary file, lines of `id literal byte_length`, into id -> bytes.

    Raises ValueError naming the file and the line for anything but ids 1, 2, 3, ... with distinct pieces of the stated
    length, the first 256 of them the single bytes in order.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a World vocabulary: {error}") from None
    vocabulary: dict[int, bytes] = {}
    seen = {b""}
    for number, line in enumerate(lines, start=1):
        try:
            # The literal may hold spaces itself.
            index, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            piece = ast.literal_eval(literal)
            piece = piece.encode() if isinstance(piece, str) else piece
            if int(index) != number:
                raise ValueError(f"id {index} where {number} was due")
            if not isinstance(piece, bytes) or len(piece) != int(length):
                raise ValueError(f"{literal} does not have the stated {length} bytes")
            if number <= 256 and piece != bytes([number - 1]):
                raise ValueError(f"id {number} must be the byte {number - 1:#04x}")
            if piece in seen:
                raise ValueError(f"{literal} is empty or came before")
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path}, line {number}: expected `id literal byte_length`: {error}") from None
        seen.add(piece)
        vocabulary[number] = piece
    if len(vocabulary) < 256:
        raise ValueError(f"{path}: {len(vocabulary)} pieces, but the single bytes alone need 256")
    return vocabulary


def trie_regex(pieces: Iterable[bytes]) -> str:
    """The trie of the pieces as one regular expression, which matches the longest piece at a position.

    Children that lead to the same sub-expression share it.
    """
    root: dict = {}
    for piece in pieces:
        node = root
        for byte in piece:
            node = node.setdefault(byte, {})
        node[None] = {}

    def expression(node: dict) -> str:
        heads: dict[str, list[int]] = {}
        for byte, child in node.items():
            if byte is not None:
                heads.setdefault(expression(child), []).append(byte)
        if not heads:
            return ""
        branches = []
        for tail, (byte, *others) in heads.items():
            a_class = "".join(ESCAPED_IN_CLASS[one] for one in (byte, *others))
            branches.append((f"[{a_class}]" if others else ESCAPED[byte]) + tail)
        # Branches are tried in order; a long one holds much of the vocabulary and so matches much of a text.
        alternatives = "|".join(sorted(branches, key=len, reverse=True))
        if None in node:
            return f"(?:{alternatives})?"
        return alternatives if len(branches) == 1 else f"(?:{alternatives})"

    return expression(root)


def world_backend(vocabulary: dict[int, bytes], end_of_text: str) -> Tokenizer:
    """The `tokenizers` pipeline for id -> bytes with the 256 single bytes among the pieces; id 0 is `end_of_text`.

    Cutting the text is the regular expression's work; the model only looks up what was cut, so nothing is ever unknown.
    """
    tokens = {end_of_text: 0} | {to_alphabet(piece): index for index, piece in vocabulary.items()}
    backend = Tokenizer(models.WordLevel(tokens, unk_token=end_of_text))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    longest_match = pre_tokenizers.Split(Regex(trie_regex(vocabulary.values())), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([byte_level, longest_match])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return backend


def backend_pieces(backend: Tokenizer) -> list[bytes] | None:
    """The bytes of each id in a pipeline made by `world_backend`, b"" where it has none; None for another pipeline."""
    if not (isinstance(backend.model, models.WordLevel) and isinstance(backend.decoder, decoders.ByteLevel)):
        return None
    tokens = backend.get_vocab(with_added_tokens=False)
    tokens.pop(backend.model.unk_token)
    pieces = [b""] * (max(tokens.values()) + 1)
    for token, index in tokens.items():
        pieces[index] = from_alphabet(token)
    return pieces


def encode_with_backend(backend: Tokenizer, data: bytes) -> list[int]:
    """The ids of any byte string, valid UTF-8 or not, from a pipeline made by `world_backend`."""
    longest_match = backend.pre_tokenizer[1]
    return [backend.token_to_id(token) for token, _ in longest_match.pre_tokenize_str(to_alphabet(data))]
