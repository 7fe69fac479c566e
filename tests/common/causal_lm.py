"""What a causal language model brings to transformers' common tests: configuration, inputs, tests of its heads."""

import torch
from transformers import AutoModelForSequenceClassification, set_seed

from common.sdist import load


class CausalLMTester:
    """The `model_tester` of the common tests, built around one tiny configuration.

    `config` holds the keyword arguments of `config_class`. Inputs are (batch_size, seq_length) ids with a padding mask
    whose rows start with a real token.
    """

    batch_size = 5
    seq_length = 7
    is_training = True
    num_labels = 3

    def __init__(self, parent, config_class, config: dict):
        self.parent = parent
        self.config_class = config_class
        self.config = config
        self.hidden_size = config["hidden_size"]
        self.num_hidden_layers = config["num_hidden_layers"]
        self.vocab_size = config["vocab_size"]

    def get_config(self):
        return self.config_class(**self.config)

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(1, self.vocab_size, shape, generator=generator)
        lengths = torch.randint(1, self.seq_length + 1, (self.batch_size, 1), generator=generator)
        mask = (torch.arange(self.seq_length) < lengths).long()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class CausalLMTesterMixin:
    """Tests of the configuration and of the heads that come with a causal language model."""

    config_class = None
    tiny_config: dict = {}

    def setUp(self):
        set_seed(0)
        self.model_tester = CausalLMTester(self, self.config_class, self.tiny_config)
        tester = load("test_configuration_common").ConfigTester
        self.config_tester = tester(self, config_class=self.config_class, hidden_size=37 * 64, common_properties=[])

    def test_config(self):
        self.config_tester.run_common_tests()

    def check_classification(self, labels: torch.Tensor, problem_type: str):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_labels, config.problem_type = self.model_tester.num_labels, problem_type
        model = AutoModelForSequenceClassification.from_config(config).eval()
        result = model(**inputs, labels=labels)
        self.assertEqual(result.logits.shape, (self.model_tester.batch_size, self.model_tester.num_labels))
        self.assertTrue(torch.isfinite(result.loss))

    def test_sequence_classification_single_label(self):
        targets = torch.arange(self.model_tester.batch_size) % self.model_tester.num_labels
        self.check_classification(targets, "single_label_classification")

    def test_sequence_classification_multi_label(self):
        targets = torch.arange(self.model_tester.batch_size) % self.model_tester.num_labels
        self.check_classification(torch.eye(self.model_tester.num_labels)[targets], "multi_label_classification")
