"""What the files of a model or an adapter tell about it, for its card."""

import json
from collections import Counter
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from .auto import GENERATIONS
from .chat import FORMATS, format_of
from .hub_checks import is_local
from .hub_files import TIME_STATE_NAME, class_of
from .presets import PRESETS
from .tensor_files import CheckpointError, LazyTensor, open_checkpoint

NAMES = {"rwkv": 'RWKV-4 "Dove"', "rwkv5": 'RWKV-5 "Eagle"', "rwkv6": 'RWKV-6 "Finch"', "rwkv7": 'RWKV-7 "Goose"'}
LOW_RANKS = {"decay": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "gate": "gate_low_rank_dim"}
CONVERSATION = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi, how can I help you?"},
    {"role": "user", "content": "Who are you?"},
]
TUNED_STATE = "RWKV_STATE"
# The Hub's name of what a model of an auto class does, what the card calls it, and PEFT's names of the other tasks.
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModel": "feature-extraction",
}
KINDS = {
    "AutoModelForCausalLM": "a language model",
    "AutoModelForSequenceClassification": "a classifier of texts",
    "AutoModel": "a language model without its head",
}
TASKS = {"SEQ_CLS": "AutoModelForSequenceClassification", "FEATURE_EXTRACTION": "AutoModel"}


def about_model(folder: Path, base_model: str | None) -> dict:
    """What the template says of a model. Raises ValueError for a folder of anything else, or a damaged file."""
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in GENERATIONS:
        raise ValueError(
            f"{folder / 'config.json'}: field `model_type` is {model_type!r}, not {', '.join(GENERATIONS)}"
        )
    config = _load(AutoConfig, folder)
    auto_class = class_of(config)._auto_name
    parameters, weights = _weights(_tensors(folder))
    name = NAMES[model_type] + (f", version {_version(config)}" if model_type == "rwkv5" else "")
    facts = {
        "architecture": name,
        "parameters": f"{parameters:,}",
        "weights": weights,
        "layers": config.num_hidden_layers,
        "width": f"{config.hidden_size:,}",
        "time-mix width": f"{config.attention_hidden_size:,}" + _heads(config),
        "channel-mix width": f"{config.intermediate_size:,}",
        "vocabulary": f"{config.vocab_size:,} embeddings",
        "trained length": f"{config.max_position_embeddings:,} tokens",
    }
    if model_type == "rwkv7":
        facts["low ranks"] = ", ".join(f"{letter} {getattr(config, key)}" for letter, key in LOW_RANKS.items())
    base_model = hub_id(base_model, "base_model")
    origin = f", made from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    return {
        "adapter": False,
        "auto_class": auto_class,
        "base_model": base_model,
        # RWKV-4 is the one generation that transformers has itself.
        "native": model_type == "rwkv",
        "context": f"{config.max_position_embeddings:,}",
        "summary": f"{name}, {KINDS[auto_class]} of {_short(parameters)} parameters{origin}. It is an RNN: its memory "
        "of what it has read is a state of constant size.",
        "tags": list(dict.fromkeys(["rwkv", model_type])),
        **_about_tokenizer(folder, facts),
    }


def about_adapter(folder: Path, base_model: str | None) -> dict:
    """What the template says of an adapter of PEFT; ValueError as above, and if its base model has no id on the Hub."""
    file = folder / "adapter_config.json"
    config = read_json(file)
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{file}: field `peft_type` is missing")
    base_model = hub_id(base_model, "base_model") or hub_id(
        config.get("base_model_name_or_path"), f"{file}: field `base_model_name_or_path`"
    )
    if base_model is None:
        raise ValueError(f"{file}: field `base_model_name_or_path` is missing: name the base model by base_model")
    parameters, weights = _weights(tensors := _tensors(folder / "adapter_model.safetensors"))
    tuned_state = method == TUNED_STATE
    facts = {
        "method": "state tuning: the state that every text begins with, one a layer" if tuned_state else method,
        "base model": f"[{base_model}](https://huggingface.co/{base_model})",
        "trained parameters": f"{parameters:,}",
        "weights": weights,
    }
    for key, name in {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}.items():
        # The modules of a tuned state have one name in all layers, which tells nothing.
        if config.get(key) and not tuned_state:
            facts[name] = ", ".join(sorted(config[key])) if isinstance(config[key], list) else config[key]
    kind = "A tuned initial state" if tuned_state else f"An adapter ({method})"
    official = sorted(path.name for path in folder.glob("*time_state*"))
    # `wkv publish` adds the file where there is none; RWKV-4, whose states are no matrices, has no such file.
    if tuned_state and not official and all(len(tensor.shape) == 3 for tensor in tensors.values()):
        official = [TIME_STATE_NAME]
    return {
        "adapter": True,
        "auto_class": TASKS.get(config.get("task_type"), "AutoModelForCausalLM"),
        "base_model": base_model,
        "state_file": official[0] if official else None,
        "summary": f"{kind} for [{base_model}](https://huggingface.co/{base_model}), an RWKV language model, with "
        f"{_short(parameters)} trained parameters.",
        "tags": ["rwkv", "state-tuning" if tuned_state else method.lower()],
        "tuned_state": tuned_state,
        **_about_tokenizer(folder, facts),
    }


def hub_id(name: str | None, origin: str) -> str | None:
    """An id on the Hub, or None; ValueError for the path of a folder."""
    if name is None:
        return None
    if is_local(name):
        raise ValueError(f"{origin} is the folder {name!r}; name the base model's repository on the Hub by base_model")
    validate_repo_id(name)
    return name


def read_json(path: Path) -> dict:
    """The table in a JSON file; ValueError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder holds no model and no adapter") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no table")
    return content


def _load(auto_class: type, folder: Path):
    try:
        return auto_class.from_pretrained(folder)
    # The libraries that read the files raise many types, bare Exception among them; all mean that the folder is bad.
    except Exception as error:
        what = "configuration" if auto_class is AutoConfig else "tokenizer"
        raise ValueError(f"{folder}: its {what} is damaged: {' '.join(str(error).split())}") from error


def _short(number: int) -> str:
    """A number of parameters in words: thousands, millions, billions."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return str(number)


def _tensors(path: Path) -> dict[str, LazyTensor]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    return open_checkpoint(path).tensors


def _weights(tensors: dict[str, LazyTensor]) -> tuple[int, str]:
    """How many parameters there are, and what they are stored as, most common dtype first."""
    dtypes = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes // tensor.dtype.itemsize
    size = sum(tensor.nbytes for tensor in tensors.values())
    return dtypes.total(), f"{', '.join(name for name, _ in dtypes.most_common())}; {size / 1e6:,.1f} MB"


def _version(config: PreTrainedConfig) -> str:
    """Which RWKV-5."""
    return "5.0" if not config.use_gate else "5.1" if config.decay_per_head else "5.2"


def _heads(config: PreTrainedConfig) -> str:
    """The heads of the time-mix; RWKV-4 has channels only."""
    return f", {config.state_shape[0]} heads of {config.state_shape[1]}" if len(config.state_shape) == 3 else ""


def _about_tokenizer(folder: Path, facts: dict) -> dict:
    """The facts, and with them those of the tokenizer in the folder, if there is one."""
    about = {"facts": facts, "tokenizer": False}
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return about
    tokenizer = _load(AutoTokenizer, folder)
    facts["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"
    about["tokenizer"] = True
    if tokenizer.chat_template:
        style = FORMATS[format_of(tokenizer)]
        preset = PRESETS[style.preset]
        about |= {
            "conversation": tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True),
            "format": format_of(tokenizer).capitalize(),
            "sampling": f"temperature {preset.temperature}, top-p {preset.top_p} and penalties of {preset.presence} "
            f"(presence) and {preset.frequency} (frequency) that fade by {preset.decay} a token",
            "stop": json.dumps(style.stop),
        }
    return about
