"""The files of a repository: what a folder holds, completed so that it runs where only transformers is installed."""

import importlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import convert_file_size_to_int

from . import models
from .auto import GENERATIONS, TOKENIZER, TOKENIZER_ALIASES
from .hub_checks import SEARCHED_BYTES, is_local, litter_of, refuse_link, refuse_names, refuse_text, refuse_weights
from .hub_upload import WEIGHTS, Entry
from .models.rwkv_publishing import auto_map
from .tensor_files import open_checkpoint

MODELS = Path(models.__file__).parent
ADAPTER_CONFIG_NAME, TOKENIZER_CONFIG_NAME, TIME_STATE_NAME = (
    "adapter_config.json",
    "tokenizer_config.json",
    "time_state.pth",
)
TOKENIZER_FILES = ("tokenizer.json", "rwkv_vocab_v20230424.txt")
TOKENIZER_MODULE, TOKENIZER_CLASS = TOKENIZER.split(".")
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Where a folder was loaded from, in its configuration and in its tokenizer's.
ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")
ORIGINS += ("is_local", "local_files_only")


def kept_files(folder: Path, exclude: Sequence[str], allow_pickles: bool) -> tuple[dict[str, Entry], list[str]]:
    """The files of a folder by their paths in it, and those left out; raises ValueError for what must not go up."""
    entries, left_out = {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if litter := litter_of(name):
            left_out[litter] = None
        elif any(fnmatch(name, pattern) for pattern in exclude):
            left_out[name] = None
        else:
            if path.is_symlink():
                refuse_link(folder, path, allow_pickles)
            if path.is_file():
                refuse_names(folder, name, allow_pickles)
                size = path.stat().st_size
                origin = "kept" if size <= SEARCHED_BYTES or _is_weights(name) else "kept, too large to be searched"
                entries[name] = Entry(name, origin, size, path)
    return entries, list(left_out)


def check_contents(folder: Path, entries: dict[str, Entry]) -> None:
    """Raise ValueError for secrets, paths of this machine, and weights that are damaged or not finite."""
    for entry in entries.values():
        if _is_weights(entry.path):
            if isinstance(entry.content, Path):
                refuse_weights(entry.content)
        elif entry.origin != "code" and entry.size <= SEARCHED_BYTES:
            data = entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()
            refuse_text(folder / entry.path, data)


def _is_weights(name: str) -> bool:
    """Whether a file is read as tensors; indices are texts."""
    return name.endswith((".safetensors", ".pth")) or (name.endswith(".bin") and bool(WEIGHTS.fullmatch(name)))


def complete_model(folder: Path, entries: dict[str, Entry], scratch: Path, max_shard_size: str) -> None:
    """Add what a model's folder lacks to run by itself: auto_map, code, generation settings, tokenizer files, shards.

    Raises ValueError for models of other architectures, tensors in another layout, weights that would not go up or not
    be loaded, and a missing tokenizer.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in GENERATIONS:
        raise ValueError(f"{folder / CONFIG_NAME}: a model of type {config.model_type}; {', '.join(GENERATIONS)} go up")
    model_class = class_of(config)
    _check_tensors(folder, model_class, config)
    weights = _weights(folder, entries)
    if sharded := _shards(folder, convert_file_size_to_int(max_shard_size)):
        for name in weights:
            del entries[name]
        entries |= sharded
    _rewrite(entries, CONFIG_NAME, {"auto_map": auto_map(model_class)}, "with auto_map")
    if GENERATION_CONFIG_NAME not in entries and model_class.can_generate():
        settings = GenerationConfig.from_model_config(config).to_json_string().encode()
        entries[GENERATION_CONFIG_NAME] = Entry(GENERATION_CONFIG_NAME, "generated", len(settings), settings)
    code = {f"{model_class.__module__.rpartition('.')[2]}.py"}
    if _complete_tokenizer(folder, entries, scratch):
        code.add(f"{TOKENIZER_MODULE}.py")
    for name in sorted(code.union(*({Path(f).name for f in get_relative_import_files(MODELS / c)} for c in code))):
        entries[name] = Entry(name, "code", (MODELS / name).stat().st_size, MODELS / name)


def complete_adapter(folder: Path, entries: dict[str, Entry], scratch: Path, base_model: str | None) -> None:
    """Let an adapter name its base model as others can load it, and add the official file of a tuned state.

    Raises ValueError where the base model is a folder of this machine and `base_model` does not say what to name.
    """
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        if name not in entries:
            raise ValueError(f"{folder}: an adapter needs {name}, which is missing or excluded")
    config = _read(folder / ADAPTER_CONFIG_NAME)
    base = base_model or config.get("base_model_name_or_path") or ""
    if not base or is_local(base):
        where, found = folder / ADAPTER_CONFIG_NAME, base or "not named"
        raise ValueError(f"{where}: its base model is {found}; give the Hub's name of it with --base-model")
    if base != config.get("base_model_name_or_path"):
        _rewrite(entries, ADAPTER_CONFIG_NAME, {"base_model_name_or_path": base}, "with the base model")
    if TOKENIZER_CONFIG_NAME in entries:
        _rewrite(entries, TOKENIZER_CONFIG_NAME, {}, "cleaned")
    if config.get("peft_type") == "RWKV_STATE" and not any("time_state" in name for name in entries):
        from .peft_state import export_time_state

        tensors = open_checkpoint(folder / ADAPTER_WEIGHTS_NAME).tensors
        # RWKV-4 has no official file.
        if all(len(tensor.shape) == 3 for tensor in tensors.values()):
            export_time_state(folder, file := scratch / TIME_STATE_NAME)
            entries[TIME_STATE_NAME] = Entry(TIME_STATE_NAME, "generated", file.stat().st_size, file)


def state_of(folder: Path) -> Path | None:
    """The official file of a tuned state that a path is, or that is alone in a folder without a model."""
    if folder.is_file():
        return folder
    if (folder / CONFIG_NAME).exists() or (folder / ADAPTER_CONFIG_NAME).exists():
        return None
    found = [path for path in folder.glob("*state*") if path.suffix in (".pth", ".safetensors")]
    return found[0] if len(found) == 1 else None


def class_of(config: PreTrainedConfig) -> type:
    """The class that a configuration names, a causal language model where it names none."""
    _, *names = GENERATIONS[config.model_type]
    named = [name for name in names if name.rpartition(".")[2] in (config.architectures or ())]
    module, name = (named or names[1:])[0].split(".")
    return getattr(importlib.import_module(f"{models.__name__}.{module}"), name)


def _check_tensors(folder: Path, model_class: type, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the tensors have the names and shapes of the class: code without wkv reads no others."""
    found = {name: tuple(tensor.shape) for name, tensor in open_checkpoint(folder).tensors.items()}
    with torch.device("meta"):
        wanted = model_class(model_class.config_from_shapes(config, found)).state_dict()
    for name in sorted(wanted.keys() ^ found.keys()):
        trouble = "lacks" if name in wanted else "has unknown"
        raise ValueError(
            f"{folder}: {trouble} tensor {name} for {model_class.__name__}; `wkv convert` knows other layouts"
        )
    for name, tensor in wanted.items():
        if tuple(tensor.shape) != found[name]:
            raise ValueError(f"{folder}: tensor {name} has shape {found[name]}, expected {tuple(tensor.shape)}")


def _weights(folder: Path, entries: dict[str, Entry]) -> set[str]:
    """The files that loading reads, as the folder has them; raises ValueError unless these go up, and no others."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            needed, why = {single}, single
            break
        if (folder / index).is_file():
            needed, why = {index, *_read(folder / index)["weight_map"].values()}, index
            break
    for name in sorted(needed - entries.keys()):
        raise ValueError(f"{folder / name}: weights that are excluded or lie elsewhere; the model needs them ({why})")
    found = {name for name in entries if WEIGHTS.fullmatch(name) and name.startswith("model")}
    for name in sorted(found - needed):
        raise ValueError(f"{folder / name}: beside {why}, and not loaded with it; remove or --exclude it")
    return needed


def _shards(folder: Path, limit: int) -> dict[str, Entry]:
    """Smaller files for weights whose files hold more than `limit` bytes; none where they fit, or are pickles."""
    files = [open_checkpoint(path).tensors for path in folder.glob("model*.safetensors")]
    if not any(len(held) > 1 and sum(t.nbytes for t in held.values()) > limit for held in files):
        return {}
    tensors = open_checkpoint(folder).tensors
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=limit,
    )
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    entries = {SAFE_WEIGHTS_INDEX_NAME: Entry(SAFE_WEIGHTS_INDEX_NAME, "generated", len(data), data)}
    for name, held in split.filename_to_tensors.items():
        size = sum(tensors[tensor].nbytes for tensor in held)
        entries[name] = Entry(name, "kept, in new shards", size, {tensor: tensors[tensor] for tensor in held})
    return entries


def _complete_tokenizer(folder: Path, entries: dict[str, Entry], scratch: Path) -> bool:
    """Add the files that a tokenizer lacks, and say whether its class is ours, so that its code must go along."""
    if TOKENIZER_CONFIG_NAME in entries:
        _read(entries[TOKENIZER_CONFIG_NAME].content)
    if not any(name in entries for name in TOKENIZER_FILES):
        raise ValueError(f"{folder}: no tokenizer: {' or '.join(TOKENIZER_FILES)} is needed; see `wkv tokenizer build`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # A damaged tokenizer.json fails in any way.
    except Exception as error:
        raise ValueError(f"{folder}: its tokenizer ({TOKENIZER_FILES[0]}) cannot be loaded: {error}") from error
    if not {TOKENIZER_FILES[0], TOKENIZER_CONFIG_NAME} <= entries.keys():
        for path in map(Path, tokenizer.save_pretrained(scratch / "tokenizer")):
            entries.setdefault(path.name, Entry(path.name, "generated", path.stat().st_size, path))
    name = _read(entries[TOKENIZER_CONFIG_NAME].content).get("tokenizer_class", TOKENIZER_CLASS)
    is_ours = name in (TOKENIZER_CLASS, *TOKENIZER_ALIASES)
    # A slow class and a fast one, of which there is one here.
    mapping = {"auto_map": {"AutoTokenizer": [f"{TOKENIZER_MODULE}.{name}", None]}} if is_ours else {}
    _rewrite(entries, TOKENIZER_CONFIG_NAME, mapping, "with auto_map" if is_ours else "cleaned")
    return is_ours


def _rewrite(entries: dict[str, Entry], name: str, changes: dict, what: str) -> None:
    """Change keys of a JSON file and drop those that tell where it comes from; a file that stays equal is kept."""
    before = entries[name]
    content = _read(before.content)
    after = {key: value for key, value in content.items() if key not in ORIGINS} | changes
    if after != content:
        data = (json.dumps(after, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
        entries[name] = Entry(name, f"{before.origin}, {what}", len(data), data)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
