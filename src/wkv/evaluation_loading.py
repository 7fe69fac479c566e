"""An RWKV model and its tokenizer for an evaluation: from a folder, a repository, a GGUF file, or an adapter."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import find_adapter_config_file

from .auto import GENERATIONS
from .models.rwkv_models import GenericRwkvForCausalLM

# What learned prompts are called that stand before a text as so many embeddings.
PROMPTS = ("PROMPT_TUNING", "P_TUNING")


def load_model(pretrained, peft, dtype, device, gguf_file, **hub) -> PreTrainedModel:
    """The model, with its adapter; an object is taken as it is. Raises ValueError for what is not RWKV."""
    if not isinstance(pretrained, str):
        if peft is not None or gguf_file is not None:
            raise ValueError("a model that is loaded already takes neither `peft` nor `gguf_file`")
        return pretrained
    is_adapter = gguf_file is None and _has_adapter(pretrained, hub)
    if is_adapter and peft is not None:
        raise ValueError(f"{pretrained} is an adapter itself: leave `peft` out, or name its base model")
    options = {**hub, "dtype": getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype}
    if is_adapter:
        from peft import AutoPeftModelForCausalLM, PeftConfig

        base = PeftConfig.from_pretrained(pretrained, revision=hub["revision"]).base_model_name_or_path
        _refuse_other(base, AutoConfig.from_pretrained(base, trust_remote_code=hub["trust_remote_code"]))
        model = AutoPeftModelForCausalLM.from_pretrained(pretrained, **options)
    else:
        _refuse_other(pretrained, AutoConfig.from_pretrained(pretrained, gguf_file=gguf_file, **hub))
        model = AutoModelForCausalLM.from_pretrained(pretrained, gguf_file=gguf_file, **options)
        if peft is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, peft)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_tokenizer(tokenizer, pretrained, model, gguf_file, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer that was given or that the model's folder has. Raises ValueError where there is none."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    base = plain_model(model).config._name_or_path
    places = [tokenizer] if tokenizer else [pretrained, base] if isinstance(pretrained, str) else [base]
    options = hub | ({"gguf_file": gguf_file} if gguf_file is not None and not tokenizer else {})
    errors = []
    for place in dict.fromkeys(filter(None, places)):
        try:
            return AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError, KeyError) as error:
            errors.append(f"{place}: no tokenizer that can be read ({str(error).strip().splitlines()[0]})")
    raise ValueError("; ".join(errors or ["the model has no folder"]) + "; name one with `tokenizer`")


def plain_model(model: PreTrainedModel) -> GenericRwkvForCausalLM:
    """The RWKV model itself, adapters inside. Raises ValueError for other models and for adapters around the model."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        around = config.is_prompt_learning and config.peft_type not in PROMPTS
        if around or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {name!r} ({config.peft_type.value}) is not part of the model: use --model hf"
            )
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(plain, GenericRwkvForCausalLM):
        _refuse_other(plain.config._name_or_path or type(plain).__name__, plain.config)
        raise ValueError(f"{type(plain).__module__}.{type(plain).__name__} is not one of wkv's models: use --model hf")
    return plain


@torch.no_grad()
def prompt_state(model: PreTrainedModel) -> Cache | None:
    """The state (of one row) after the learned prompt of an adapter, where it has one."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return None
    plain = plain_model(model)
    cache = DynamicCache(config=plain.config)
    plain.base_model(inputs_embeds=model.get_prompt(1).to(plain.dtype), past_key_values=cache, use_cache=True)
    return cache


def _has_adapter(folder: str, hub: dict) -> bool:
    places = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    return find_adapter_config_file(folder, **places) is not None


def _refuse_other(place: str, config) -> None:
    if config.model_type not in GENERATIONS:
        raise ValueError(f"{place}: a model of type {config.model_type}, not RWKV: use --model hf")
