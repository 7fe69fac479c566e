"""The World vocabulary as a GGUF file lists it: each piece as Python writes bytes, end-of-text first.

An id without a piece is called `[PAD<id>]`, as llama.cpp's own converter calls it.
"""

import re

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .rwkv_vocabulary import backend_pieces, world_backend

# llama.cpp's types of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_ESCAPES = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def escaped(piece: bytes) -> str:
    """A piece as a GGUF file spells it."""
    return repr(piece)[2:-1]


def unescaped(text: str) -> bytes:
    """The piece that `escaped` was given."""

    def piece(match: re.Match) -> bytes:
        code = match[1]
        return bytes.fromhex(code[1:].decode()) if len(code) == 3 else _ESCAPES.get(code, code)

    return re.sub(rb"\\(x[0-9a-f]{2}|.)", piece, text.encode(), flags=re.DOTALL)


def token_list(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int], int | None]:
    """The token of every embedding row, its type, and the id of the empty line that ends a turn, if it is one token.

    Raises ValueError for a tokenizer without World vocabulary, or with more ids than rows.
    """
    pieces = backend_pieces(tokenizer.backend_tokenizer)
    if pieces is None:
        raise ValueError("GGUF files of RWKV hold World vocabularies; this tokenizer has another kind")
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids, the model only {rows} embedding rows")
    tokens = [escaped(piece) for piece in pieces] + [f"[PAD{index}]" for index in range(len(pieces), rows)]
    types = [NORMAL] * len(pieces) + [UNUSED] * (rows - len(pieces))
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index], types[index] = added.content, CONTROL if added.special else USER_DEFINED
    return tokens, types, pieces.index(b"\n\n") if b"\n\n" in pieces else None


def world_tokenizer(words: dict) -> PreTrainedTokenizerFast:
    """A tokenizer from what transformers reads of a GGUF file; ValueError if the file holds no World vocabulary."""
    tokens, types = words["tokens"], words["token_type"]
    pieces = {index: unescaped(tokens[index]) for index, kind in enumerate(types) if kind == NORMAL}
    if types[0] != CONTROL or [pieces.get(index) for index in range(1, 257)] != [bytes([i]) for i in range(256)]:
        raise ValueError("the tokens of the GGUF file are no World vocabulary: end of text, the single bytes, pieces")
    added = {index: kind for index, kind in enumerate(types) if index and kind in (CONTROL, USER_DEFINED)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=world_backend(pieces, tokens[0]), bos_token=tokens[0], eos_token=tokens[0]
    )
    tokenizer.add_tokens(
        [AddedToken(tokens[index], special=kind == CONTROL, normalized=False) for index, kind in added.items()]
    )
    return tokenizer
