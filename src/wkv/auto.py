"""One table of generations, and the only place that registers anything with transformers.

Registering needs the model classes, and they need torch and half of transformers. So that `import wkv` stays cheap,
each part of the registration waits until the module of transformers that it concerns has been imported.
"""

import importlib
import logging
import re
import sys
from functools import partial

logger = logging.getLogger(__name__)

# model type: (configuration, base model, causal language model, sequence classifier), in modules of wkv.models
GENERATIONS = {
    "rwkv": (
        "configuration_rwkv4.RwkvConfig",
        "modeling_rwkv4.RwkvModel",
        "modeling_rwkv4.RwkvForCausalLM",
        "modeling_rwkv4.RwkvForSequenceClassification",
    ),
    "rwkv5": (
        "configuration_rwkv5.Rwkv5Config",
        "modeling_rwkv5.Rwkv5Model",
        "modeling_rwkv5.Rwkv5ForCausalLM",
        "modeling_rwkv5.Rwkv5ForSequenceClassification",
    ),
    "rwkv6": (
        "configuration_rwkv6.Rwkv6Config",
        "modeling_rwkv6.Rwkv6Model",
        "modeling_rwkv6.Rwkv6ForCausalLM",
        "modeling_rwkv6.Rwkv6ForSequenceClassification",
    ),
    "rwkv7": (
        "configuration_rwkv7.Rwkv7Config",
        "modeling_rwkv7.Rwkv7Model",
        "modeling_rwkv7.RWKV7ForCausalLM",
        "modeling_rwkv7.RWKV7ForSequenceClassification",
    ),
}
# What PEFT's methods adapt unless they are told otherwise: by the name of the method's table, for the others "ALL".
_BLOCKS_TARGETS = {
    "ALL": ["receptance", "key", "value", "gate", "output"],
    "LNTUNING_TARGET": ["pre_ln", "ln1", "ln2", "ln_x", "ln_out"],
    "IA3_TARGET": ["attention.key", "attention.value", "feed_forward.value"],
    "IA3_FEEDFORWARD": ["feed_forward.value"],
    "BEFT_TARGET": ["attention.value"],
}
ADAPTER_TARGETS = dict.fromkeys(("rwkv", "rwkv5", "rwkv6"), _BLOCKS_TARGETS) | {
    "rwkv7": {
        "ALL": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
        "LNTUNING_TARGET": ["pre_norm", "attn_norm", "ffn_norm", "g_norm", "norm"],
        "IA3_TARGET": ["k_proj", "v_proj", "ffn.value"],
        "IA3_FEEDFORWARD": ["ffn.value"],
        "BEFT_TARGET": ["v_proj"],
    }
}
TOKENIZER = "tokenization_rwkv.RwkvTokenizer"
# Names under which tokenizer_config.json files in the wild ask for the World tokenizer.
TOKENIZER_ALIASES = ("RWKVWorldTokenizer", "Rwkv5Tokenizer", "Rwkv6Tokenizer", "RWKV7Tokenizer")


def architecture(model_type: str) -> str:
    """The causal language model's class, as `architectures` in a configuration names it."""
    return GENERATIONS[model_type][2].rpartition(".")[2]


def register() -> None:
    """Make AutoConfig, the AutoModel classes and AutoTokenizer know every generation, now or as they are imported."""
    _run_actions()
    if _waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """A finder that lets the others find a module, and runs what registration becomes possible once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if not any(name in needed for needed in _waiting.values()):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _loaded.add(name)
                _run_actions()

            spec.loader.exec_module = execute_and_register
        return spec


def _run_actions() -> None:
    for action, needed in list(_waiting.items()):
        # The first one is transformers' own; ours are imported by the action, but not while they are being imported.
        if needed[0] in sys.modules and not any(map(_is_loading, needed)) and _waiting.pop(action, None):
            action()


def _is_loading(name: str) -> bool:
    module = sys.modules.get(name)
    return name not in _loaded and module is not None and getattr(module.__spec__, "_initializing", False)


def _load(name: str):
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"{_MODELS}.{module}"), attribute)


def _register_configurations() -> None:
    from transformers import AutoConfig

    for model_type, (config, *_) in GENERATIONS.items():
        AutoConfig.register(model_type, _load(config), exist_ok=True)
    logger.info("`rwkv` now means wkv's RWKV-4 in AutoConfig and the AutoModel classes, in place of transformers' own")


def _register_tokenizers() -> None:
    from transformers import AutoTokenizer

    for config, *_ in GENERATIONS.values():
        for alias in TOKENIZER_ALIASES:
            AutoTokenizer.register(_load(config), tokenizer_class=_load(f"tokenization_rwkv.{alias}"), exist_ok=True)
        AutoTokenizer.register(_load(config), tokenizer_class=_load(TOKENIZER), exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .loading import conversion_mapping

    for model_type, names in GENERATIONS.items():
        config, base, causal, classifier = map(_load, names)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal.__name__
    for model_type, transforms in conversion_mapping().items():
        register_checkpoint_conversion_mapping(model_type, transforms, overwrite=True)


def _register_gguf(part: str) -> None:
    importlib.import_module(f"{__package__}.gguf_loading").register(part)


def _register_adapters() -> None:
    from peft.utils import constants

    # A method has a table of its own, and what stands there stays: PEFT's own entries and the user's.
    for name, table in vars(constants).items():
        if method := re.fullmatch(r"TRANSFORMERS_MODELS_TO_(\w+)_MODULES_MAPPING", name):
            for model_type, targets in ADAPTER_TARGETS.items():
                table.setdefault(model_type, list(targets.get(method[1], targets["ALL"])))


def _register_state_tuning() -> None:
    importlib.import_module(f"{__package__}.peft_state")


def _register_evaluation() -> None:
    from lm_eval.api.registry import model_registry
    from lm_eval.models import MODEL_MAPPING

    # A place that lm-eval imports when someone asks for the model.
    MODEL_MAPPING["wkv"] = f"{__package__}.evaluation:WkvLM"
    if "wkv" not in model_registry:
        model_registry.register("wkv", target=MODEL_MAPPING["wkv"])


def _register_pushing() -> None:
    importlib.import_module(f"{__package__}.hub_trainer").register()


_MODELS = f"{__package__}.models"
_GENERATION_MODULES = {f"{_MODELS}.{name.partition('.')[0]}" for names in GENERATIONS.values() for name in names}
# What they are made of, and somebody may import first.
_GENERATION_MODULES |= {f"{_MODELS}.rwkv_blocks", f"{_MODELS}.rwkv_models"}
# What has not run yet, and the modules that must not be half imported when it does.
_waiting = {
    _register_adapters: ("peft.utils.constants",),
    _register_state_tuning: ("peft", f"{__package__}.peft_state"),
    _register_evaluation: ("lm_eval.models",),
    _register_pushing: ("transformers.trainer", f"{__package__}.hub_trainer"),
    _register_configurations: ("transformers.models.auto.configuration_auto", *_GENERATION_MODULES),
    _register_tokenizers: ("transformers.models.auto.tokenization_auto", f"{_MODELS}.tokenization_rwkv"),
    _register_models: (
        "transformers.models.auto.modeling_auto",
        "transformers.modeling_layers",
        "transformers.modeling_utils",
        *_GENERATION_MODULES,
    ),
    **{
        partial(_register_gguf, part): (f"transformers.integrations.gguf.gguf_{part}_mapping", f"{__package__}.loading")
        for part in ("config", "conversion", "tokenizer")
    },
}
_loaded = set()
