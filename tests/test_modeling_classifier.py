"""The sequence classifier: it reads the state at the last real token of every row.

Letters: B rows, T tokens.
"""

import pytest
import torch
from conftest import assert_close, busy_model, random_ids
from transformers import AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def _classifiers():
    return {}


@pytest.fixture
def classifier(model_type, _classifiers):
    if model_type not in _classifiers:
        _classifiers[model_type] = busy_model(model_type, AutoModelForSequenceClassification, num_labels=3)
    return _classifiers[model_type]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_classifier_pools_the_last_real_token(classifier, side):
    lengths, T = [5, 9, 1, 12], 12
    ids, mask = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T, dtype=torch.long)
    texts = [random_ids(n, seed=n) for n in lengths]
    for row, text in enumerate(texts):
        start = {"left": T - len(text), "right": 0, "both": (T - len(text)) // 2}[side]
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    with torch.no_grad():
        alone = torch.cat([classifier(text[None]).logits for text in texts])
        assert_close(classifier(ids, attention_mask=mask).logits, alone)
        embeds = classifier.get_input_embeddings()(ids)
        if side == "left":
            assert_close(classifier(inputs_embeds=embeds, attention_mask=mask).logits, alone)


def test_classifier_counts_a_final_id_0_that_is_not_padding(classifier):
    """Id 0 ends a text and pads: the mask tells which."""
    text = torch.cat([random_ids(6), torch.tensor([0])])
    ids = torch.cat([text, torch.zeros(5, dtype=torch.long)])[None]
    mask = torch.tensor([[1] * 7 + [0] * 5])
    with torch.no_grad():
        hidden = classifier.base_model(text[None]).last_hidden_state
        assert_close(classifier(ids, attention_mask=mask).logits, classifier.score(hidden[:, -1]))
