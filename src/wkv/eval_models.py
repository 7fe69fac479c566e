"""The models of `wkv eval`: what a name stands for, checked before anything is loaded, and lm-eval's view of it.

RWKV runs as lm-eval's model `wkv`, every other model of transformers as lm-eval's own `hf`, which is made to count.
"""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError, safe_open
from sqlitedict import SqliteDict
from transformers import AutoConfig, AutoTokenizer

from .auto import GENERATIONS
from .eval_selection import why_offline
from .results import files_sha256, weights_sha256

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
# At most; lm-eval finds the largest batch by failing, which a CPU's memory does not forgive.
HF_BATCH_ON_CPU = 8


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: the arguments that load it, and what identifies it."""

    name: str
    model_type: str
    arguments: dict[str, str]
    tokenizer: str
    # The digest of its weights, and that of an adapter's base; None before the Hub's files are here.
    sha256: str | None
    base_sha256: str | None = None
    # Of its other files and, of an adapter, those of its base; a .gguf file has none.
    files_sha256: str | None = None

    @property
    def digests(self) -> dict[str, str | None]:
        """What tells its weights and files apart from every other's, as results files have it."""
        return {"model_sha256": self.sha256, "base_sha256": self.base_sha256, "files_sha256": self.files_sha256}

    def as_downloaded(self) -> "Subject":
        """The same with the digests of what running it has fetched from the Hub."""
        here = self.sha256 and (self.base_sha256 or "peft" not in self.arguments)
        return self if here else find_model(self.arguments.get("peft", self.arguments["pretrained"]))

    @property
    def backend(self) -> str:
        return "wkv" if self.model_type in GENERATIONS else "hf"

    def dtype(self, asked: str) -> str:
        """That to load in: a .gguf file has none of its own."""
        return "float32" if asked == "auto" and "gguf_file" in self.arguments else asked


def find_model(name: str) -> Subject:
    """What `name` is: a folder, a .gguf file, the folder of a PEFT adapter, or an id on the Hub.

    Raises `ValueError` if it is none of them or has no tokenizer.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{name}: neither a folder, a .gguf file nor a results .json; `wkv convert` makes folders")
        return _find_gguf(path)
    if path.is_dir():
        return _find_adapter(path) if (path / "adapter_config.json").is_file() else _find_folder(path)
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name}: no such folder or file")
    return _find_on_hub(name)


def _find_folder(path: Path) -> Subject:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: has no config.json; a folder that `wkv convert` or save_pretrained wrote is needed")
    if not _has_tokenizer(path):
        raise ValueError(f"{path}: has no tokenizer; `wkv tokenizer build DIR` writes one")
    config = _read(path, AutoConfig)
    _read(path, AutoTokenizer)
    _check_weights(path)
    name = path.resolve().name
    weights, files = weights_sha256(path), files_sha256(path)
    return Subject(name, config.model_type, {"pretrained": str(path)}, str(path), weights, files_sha256=files)


def _find_adapter(path: Path) -> Subject:
    try:
        base_name = json.loads((path / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        if (Path(base_name) / "adapter_config.json").is_file():
            raise ValueError(f"{base_name} is an adapter too")
        base = find_model(base_name)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its base model cannot be had: {error}") from error
    tokenizer = base.tokenizer
    if _has_tokenizer(path):
        _read(path, AutoTokenizer)
        tokenizer = str(path)
    _check_weights(path)
    arguments = base.arguments | {"peft": str(path), "tokenizer": tokenizer}
    name = path.resolve().name
    files = hashlib.sha256(f"{files_sha256(path)} {base.files_sha256}".encode()).hexdigest()
    return Subject(name, base.model_type, arguments, tokenizer, weights_sha256(path), base.sha256, files)


def _find_gguf(path: Path) -> Subject:
    arguments = {"pretrained": str(path.parent), "gguf_file": path.name}
    config = _read(path.parent, AutoConfig, gguf_file=path.name)
    name = path.name.removesuffix(path.suffix)
    return Subject(name, config.model_type, arguments, str(path), weights_sha256(path))


def _find_on_hub(name: str) -> Subject:
    away = why_offline()
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no such folder, and not to be had from the Hub: {away or error}") from error
    try:
        AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"{name}: has no tokenizer: {_first_sentence(error)}") from error
    weights, files = _hub_digests(name)
    return Subject(name, config.model_type, {"pretrained": name}, name, weights, files_sha256=files)


def _hub_digests(name: str) -> tuple[str | None, str | None]:
    """Those of a repository whose weights have been downloaded, None if they have not."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        return weights_sha256(folder), files_sha256(folder)
    except (LocalEntryNotFoundError, ValueError):
        return None, None


def check_chat_template(subject: Subject) -> None:
    """Raise `ValueError` if the model's tokenizer has no template for chats."""
    path = Path(subject.tokenizer)
    place, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (subject.tokenizer, {})
    if _read(place, AutoTokenizer, **options).chat_template is None:
        raise ValueError(f"{subject.name}: its tokenizer has no chat template, which --apply-chat-template needs")


def _check_weights(path: Path) -> None:
    """Raise `ValueError` if a .safetensors file of the folder is damaged or cut short."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged: {_first_sentence(error)}") from error


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def _read(path: Path, auto_class, **options):
    try:
        return auto_class.from_pretrained(path, **options)
    # The libraries that read the files raise many types, bare Exception among them; all mean that they are bad.
    except Exception as error:
        raise ValueError(f"{path}: {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


class CountingHFLM(HFLM):
    """lm-eval's model of transformers, which tells how many tokens it was asked for and how many it computed."""

    tokens_asked = 0
    tokens_computed = 0

    def _loglikelihood_tokens(self, requests, *args, **options):
        self.tokens_asked += sum(len(context) + len(rest) - 1 for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, *args, **options)

    def _model_call(self, inps, *args, **options):
        self.tokens_computed += inps.numel()
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context, *args, **options):
        output = super()._model_generate(context, *args, **options)
        new = output[:, context.shape[1] :].numel()
        mask = options.get("attention_mask")
        self.tokens_asked += new + (context.numel() if mask is None else int(mask.sum()))
        self.tokens_computed += new + context.numel()
        return output


def load_model(subject: Subject, dtype: str, device: str, batch_size: str, leading_token: bool, cache: Path):
    """lm-eval's model of a subject, and what simple_evaluate is to keep answers in, if the model does not do it.

    `leading_token` makes an RWKV model read token 0 before every text, as the official programs do.
    """
    options = {**subject.arguments, "dtype": subject.dtype(dtype), "device": device, "batch_size": batch_size}
    if subject.backend == "wkv":
        from .evaluation import WkvLM

        return WkvLM(**options, leading_token=leading_token, cache=cache), None
    by_memory = batch_size == "auto" and torch.device(device).type == "cpu"
    model = CountingHFLM(**options | ({"batch_size": 1} if by_memory else {}))
    if by_memory:
        model.batch_size_per_gpu = _batch_by_memory(model)
    return model, str(cache)


def _batch_by_memory(model: HFLM) -> int:
    """How many of the longest texts fit into a quarter of the free memory: their logits, and two copies of them."""
    text = 3 * 4 * model.max_length * model.model.config.get_text_config().vocab_size
    return int(min(HF_BATCH_ON_CPU, max(1, psutil.virtual_memory().available // 4 // text)))


def kept_answers(subject: Subject, cache: Path) -> int:
    """How many answers an interrupted run has left in `cache`."""
    if subject.backend == "wkv":
        # A header, and one line an answer.
        return len(cache.read_bytes().splitlines()[1:]) if cache.exists() else 0
    # The name that lm-eval gives it.
    path = cache.with_name(f"{cache.name}_rank0.db")
    if not path.exists():
        return 0
    with SqliteDict(str(path)) as answers:
        return len(answers)


class Stopwatch:
    """The seconds that a model spends answering."""

    def __init__(self, model):
        self.seconds = 0.0
        for method in METHODS:
            setattr(model, method, self._timed(getattr(model, method)))

    def _timed(self, answer):
        def timed(*args, **options):
            start = time.perf_counter()
            try:
                return answer(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed
