"""transformers' own common model tests, run out of tree on every class of every generation.

The mixins come from the sdist of the installed transformers (see common/sdist.py), and no sdist is a failure; those of
generation are not in it and are ours (common/generation.py), padding on either side included. What is skipped needs
something that does not exist here (attention maps, SDPA and flash kernels, rotary positions, experts, images or sound,
tensor-parallel plans, modules kept in float32), an accelerator or DeepSpeed, or is listed below with its reason.
"""

import functools
import unittest
from unittest import mock

from common.causal_lm import CausalLMTesterMixin
from common.generation import GenerationTesterMixin
from common.sdist import load
from conftest import AUTO_CLASSES, TINY
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from wkv.models.rwkv_common import RwkvPreTrainedModel

ModelTesterMixin = load("test_modeling_common").ModelTesterMixin

# Tests of transformers that want its lenient loading: there, missing tensors are drawn anew and sizes are never read
# from the tensors. They run with our strictness lifted; test_bad_folder.py tests the strictness.
LENIENT = [
    "test_base_model_prefix_loads_base_weights",
    "test_can_init_all_missing_weights",
    "test_correct_missing_keys",
    "test_load_with_mismatched_shapes",
    "test_model_weights_reload_no_missing_tied_weights",
]
# Tests that do not apply, and why.
INAPPLICABLE = {
    "test_reverse_loading_mapping": "saved folders always carry our own names, whatever layout the weights came in",
}


def leniently(test):
    """`test` with transformers' own `from_pretrained` rules."""

    @functools.wraps(test)
    def run(self):
        own_rules = staticmethod(PreTrainedModel._finalize_model_loading)
        given_sizes = classmethod(lambda cls, config, shapes: config)
        with (
            mock.patch.object(RwkvPreTrainedModel, "_finalize_model_loading", own_rules),
            mock.patch.object(RwkvPreTrainedModel, "config_from_shapes", given_sizes),
        ):
            test(self)

    return run


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
            "has_attentions": False,
            "test_can_init_all_missing_weights_before_2023": True,
            "_torch_compile_train_cls": classes[1],
            **{name: leniently(getattr(ModelTesterMixin, name)) for name in LENIENT},
            **{name: unittest.skip(why)(getattr(ModelTesterMixin, name)) for name, why in INAPPLICABLE.items()},
        },
    )


for model_type in TINY:
    globals()[f"Test_{model_type}"] = common_test(model_type)
