"""One table of generations, and the only place that registers anything with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .models.configuration_rwkv7 import Rwkv7Config
from .models.modeling_rwkv7 import RWKV7ForCausalLM, RWKV7ForSequenceClassification, Rwkv7Model
from .models.tokenization_rwkv import RwkvTokenizer

# configuration: base model, causal language model, sequence classifier, tokenizer
GENERATIONS = {
    Rwkv7Config: (Rwkv7Model, RWKV7ForCausalLM, RWKV7ForSequenceClassification, RwkvTokenizer),
}


def register() -> None:
    """Make AutoConfig, AutoModel..., and AutoTokenizer know every generation. Calling it again changes nothing."""
    for config, (base, causal, classifier, tokenizer) in GENERATIONS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
        AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = causal.__name__
