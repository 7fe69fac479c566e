"""Finished answers of an evaluation in a file, so that one that was stopped goes on where it was.

The file has one line for each answer, {"key": ..., "answer": ...}, and only grows. A line that a killed process has
left unfinished is passed over. The keys tell models apart, so any number of them may share a file.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import __version__

HEADER = b'{"format": "wkv answers", "version": 1}\n'


class Answers:
    """The answers in a file for one model, by `model_identity`. Raises ValueError for a file of another kind."""

    def __init__(self, path: str | Path, identity: str):
        self.path, self.identity = Path(path), identity
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = self.path.read_bytes() if self.path.exists() else b""
        if len(held) < len(HEADER) and HEADER.startswith(held):
            self.path.write_bytes(HEADER)
            held = HEADER
        elif not held.startswith(HEADER):
            raise ValueError(f"{self.path}: not a file of answers by wkv; nothing is written to it")
        elif not held.endswith(b"\n"):
            self._append(b"\n")
        self.by_key = dict(filter(None, map(_read_line, held.splitlines()[1:])))

    def key(self, kind: str, *ids: Sequence[int], options: dict | None = None) -> str:
        """Of a request: what is asked for, of which tokens."""
        return _digest([self.identity, kind, [list(map(int, part)) for part in ids], options])

    def get(self, key: str):
        """The answer, or None."""
        return self.by_key.get(key)

    def add(self, answers: Iterable[tuple[str, object]]) -> None:
        """Keep (key, answer) pairs, which survive the end of this process from now on."""
        answers = list(answers)
        self.by_key.update(answers)
        self._append(b"".join(json.dumps({"key": key, "answer": a}).encode() + b"\n" for key, a in answers))

    def _append(self, data: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.write(data)


def _read_line(line: bytes) -> tuple[str, object] | None:
    try:
        fields = json.loads(line)
        return fields["key"], fields["answer"]
    except (ValueError, TypeError, KeyError):
        return None


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of all that answers depend on: weights and dtypes, adapters, configurations, vocabulary."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    adapters = {name: str(config) for name, config in (getattr(model, "peft_config", None) or {}).items()}
    # A method of transformers' own models, a property of PEFT's.
    active = model.active_adapters if adapters else None
    active = active() if callable(active) else active
    configs = [
        {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        for config in (model.config, model.generation_config)
    ]
    vocabulary = sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id
    return _digest([__version__, digest.hexdigest(), adapters, active, configs, vocabulary])
