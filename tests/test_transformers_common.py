"""transformers' own common model tests, run out of tree on every class of every generation.

The mixins come from the sdist of the installed transformers (see common/sdist.py); the padding tests, which it runs for
its own layer types only, are forced on here.
"""

import unittest

import pytest
from common.causal_lm import CausalLMTesterMixin
from common.generation import GenerationTesterMixin
from common.sdist import SdistUnavailableError, load
from conftest import AUTO_CLASSES, TINY
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

try:
    ModelTesterMixin = load("test_modeling_common").ModelTesterMixin
except SdistUnavailableError as error:
    pytest.skip(f"transformers' tests are not reachable: {error}", allow_module_level=True)


def common_test(model_type: str) -> type:
    """The test class of one generation."""
    config_class = type(AutoConfig.for_model(model_type))
    classes = tuple(auto_class._model_mapping[config_class] for auto_class in AUTO_CLASSES)
    # Parts of the mixins look the classes up in these tables of names, which registration does not fill.
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = classes[0].__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = classes[1].__name__
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type] = classes[2].__name__
    return type(
        f"Test{classes[0].__name__}",
        (CausalLMTesterMixin, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase),
        {
            "__module__": __name__,
            "config_class": config_class,
            "tiny_config": TINY[model_type] | {"num_hidden_layers": 2, "hidden_size": 32},
            "all_model_classes": classes,
            "auto_classes": AUTO_CLASSES,
            "has_attentions": False,
            "test_can_init_all_missing_weights_before_2023": True,
            "_torch_compile_train_cls": classes[1],
        },
    )


for model_type in TINY:
    globals()[f"Test_{model_type}"] = common_test(model_type)
