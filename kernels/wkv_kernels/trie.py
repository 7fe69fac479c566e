"""Greedy longest match of byte strings against a vocabulary, compiled: the bulk path of the World tokenizer."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from .library import LIBRARY

_build = LIBRARY.wkv_trie_build
_build.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
_build.restype = ctypes.c_int64
_encode = LIBRARY.wkv_trie_encode
_encode.argtypes = (
    [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64] + [ctypes.c_void_p] * 3 + [ctypes.c_int64]
)
_encode.restype = None


def _ends(strings: Sequence[bytes]) -> np.ndarray:
    """Where each string ends in the joined bytes: (n,) int64."""
    return np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)))


class Trie:
    """A vocabulary in which the id of a piece is its place in the list; empty pieces, and the first, have no id.

    Raises ValueError when one of the 256 single bytes is missing.
    """

    def __init__(self, pieces: Sequence[bytes]):
        missing = set(map(bytes, ((byte,) for byte in range(256)))).difference(pieces[1:])
        if missing:
            raise ValueError(f"a vocabulary needs all 256 single bytes; {min(missing)!r} is missing")
        text, ends = b"".join([b"", *pieces[1:]]), _ends([b"", *pieces[1:]])
        # Measured on the World vocabulary: 1.1 words for each node, and there are fewer nodes than bytes.
        words = np.empty(2 * len(text) + 1024, np.uint64)
        size = _build(text, ends.ctypes.data, len(ends), words.ctypes.data, len(words))
        if size < 0:
            raise MemoryError(f"no room for a trie of {len(pieces)} pieces with {len(text)} bytes")
        self._words = words[:size].copy()

    def encode(self, texts: Sequence[bytes], spans: bool = False) -> list:
        """The ids of each text, arrays of (n,) int32; texts run in parallel over torch.get_num_threads() threads.

        With `spans`, pairs (ids, spans): (n, 2) int32, the first character of each token and the one after its last, in
        the text as UTF-8. A token that holds only a part of a character spans the whole of it.
        """
        joined, ends = texts[0] if len(texts) == 1 else b"".join(texts), _ends(texts)
        ids = np.empty(len(joined), np.int32)
        characters = np.empty((len(joined), 2), np.int32) if spans else None
        counts = np.empty(len(texts), np.int64)
        _encode(
            self._words.ctypes.data,
            joined,
            ends.ctypes.data,
            len(texts),
            ids.ctypes.data,
            characters.ctypes.data if spans else None,
            counts.ctypes.data,
            torch.get_num_threads(),
        )
        begins = (ends - [len(text) for text in texts]).tolist()
        ranges = [slice(begin, begin + count) for begin, count in zip(begins, counts.tolist(), strict=True)]
        return [(ids[part], characters[part]) if spans else ids[part] for part in ranges]
