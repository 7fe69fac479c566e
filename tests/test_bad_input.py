"""Bad input to a model: one clear error that names what is wrong and what would be right.

Letters: B rows, T tokens, C width.
"""

import pytest
import torch
from conftest import TINY, busy_model, random_ids, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache


def refuses(*words: str, kind=ValueError):
    """An error of the given kind whose message contains all of `words`, in any order."""
    return pytest.raises(kind, match="(?is)" + "".join(f"(?=.*{word})" for word in words))


# What is passed to the forward, and the words that its error must contain.
FORWARDS = {
    "id too large": (lambda: {"input_ids": torch.tensor([[1, 50]])}, ["50", "vocabulary"]),
    "id negative": (lambda: {"input_ids": torch.tensor([[1, -100]])}, ["-100", "vocabulary"]),
    "no tokens": (lambda: {"input_ids": random_ids(2, 0)}, ["input_ids", "at least one token"]),
    "no token embeddings": (lambda: {"inputs_embeds": torch.zeros(2, 0, 64)}, ["inputs_embeds", "at least one token"]),
    "ids of one axis": (lambda: {"input_ids": random_ids(5)}, ["input_ids", r"\(5,\)"]),
    "ids of three axes": (lambda: {"input_ids": random_ids(2, 5, 1)}, ["input_ids", r"\(2, 5, 1\)"]),
    "ids not integers": (lambda: {"input_ids": torch.rand(2, 5)}, ["input_ids", "float"]),
    "neither ids nor embeddings": (lambda: {}, ["input_ids", "inputs_embeds"]),
    "ids and embeddings": (
        lambda: {"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 64)},
        ["exactly one", "input_ids", "inputs_embeds"],
    ),
    "embeddings of another width": (lambda: {"inputs_embeds": torch.zeros(1, 3, 63)}, ["inputs_embeds", "63", "64"]),
    "mask too long": (
        lambda: {"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 7)},
        ["attention_mask", r"\(2, 7\)", r"\(2, 5\)"],
    ),
    "mask too short": (
        lambda: {"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 4)},
        ["attention_mask", r"\(2, 4\)", r"\(2, 5\)"],
    ),
    "mask of other rows": (
        lambda: {"input_ids": random_ids(2, 5), "attention_mask": torch.ones(3, 5)},
        ["attention_mask", r"\(3, 5\)", r"\(2, 5\)"],
    ),
    "mask of one axis": (
        lambda: {"input_ids": random_ids(1, 5), "attention_mask": torch.ones(5)},
        ["attention_mask", r"\(5,\)"],
    ),
    "mask of attention": (
        lambda: {"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 1, 5, 5)},
        ["attention_mask", r"\(2, 1, 5, 5\)"],
    ),
    "positions of another shape": (
        lambda: {"input_ids": random_ids(2, 5), "position_ids": torch.arange(4)[None]},
        ["position_ids", r"\(1, 4\)", r"\(2, 5\)"],
    ),
    "seq_idx of another shape": (
        lambda: {"input_ids": random_ids(2, 5), "seq_idx": torch.zeros(1, 5, dtype=torch.int32)},
        ["seq_idx", r"\(1, 5\)", r"\(2, 5\)"],
    ),
    "cu_seq_lens with two rows": (
        lambda: {"input_ids": random_ids(2, 5), "cu_seq_lens_q": torch.tensor([0, 5])},
        ["cu_seq_lens_q", "2 rows"],
    ),
    "cu_seq_lens that ends early": (
        lambda: {"input_ids": random_ids(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 4])},
        ["cu_seq_lens_q", "5"],
    ),
    "cu_seq_lens that ends late": (
        lambda: {"input_ids": random_ids(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 9])},
        ["cu_seq_lens_q", "5"],
    ),
    "cu_seq_lens that starts late": (
        lambda: {"input_ids": random_ids(1, 5), "cu_seq_lens_q": torch.tensor([1, 5])},
        ["cu_seq_lens_q", "0"],
    ),
    "cu_seq_lens that goes back": (
        lambda: {"input_ids": random_ids(1, 5), "cu_seq_lens_q": torch.tensor([0, 4, 2, 5])},
        ["cu_seq_lens_q"],
    ),
    "labels of another shape": (
        lambda: {"input_ids": random_ids(2, 5), "labels": random_ids(2, 4)},
        ["labels|batch_size"],
    ),
    "ids without data": (
        lambda: {"input_ids": torch.zeros(1, 3, dtype=torch.long, device="meta")},
        ["input_ids", "meta", "cpu"],
    ),
}


@pytest.mark.parametrize("case", FORWARDS.values(), ids=FORWARDS)
def test_forward(model, case):
    inputs, words = case
    with refuses(*words), torch.no_grad():
        model(**inputs())


def test_refused_forward_leaves_the_cache_alone(model):
    """An error must not leave a half-updated state behind."""
    with torch.no_grad():
        cache = model(random_ids(2, 5), use_cache=True).past_key_values
    before = [t.clone() for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]
    for bad in ({"input_ids": torch.tensor([[99, 1], [1, 1]])}, {"input_ids": random_ids(3, 2)}):
        with pytest.raises(ValueError), torch.no_grad():
            model(**bad, past_key_values=cache)
    after = [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]
    assert all(map(torch.equal, before, after))
    assert int(cache.get_seq_length()) == 5


def cache_of(model, B: int):
    with torch.no_grad():
        return model(random_ids(B, 5), use_cache=True).past_key_values


# Another model (changes to its configuration), or another batch.
FOREIGN = {
    "layers": ({"num_hidden_layers": 2}, 2, ["past_key_values", "3", "2 layers"]),
    "width": ({"hidden_size": 32}, 2, ["past_key_values", r"\(2, 32, 1\)", r"\(2, 64, 1\)"]),
    "batch": ({}, 3, ["past_key_values", r"\(3, 64, 1\)", r"\(2, 64, 1\)"]),
}
HEADS = ["past_key_values", r"\(2, 2, 32, 32\)", r"\(2, 4, 16, 16\)"]
OTHER_STATE = {
    "rwkv": ({"attention_hidden_size": 32}, 2, ["past_key_values", r"\(2, 32, 3\)", r"\(2, 48, 3\)"]),
    "rwkv5": ({"head_size": 32}, 2, HEADS),
    "rwkv6": ({"head_size": 32}, 2, HEADS),
    "rwkv7": ({"head_dim": 32}, 2, HEADS),
}
FOREIGN_CASES = [(kind, case) for kind in TINY for case in (*FOREIGN.values(), OTHER_STATE[kind])]


@pytest.mark.parametrize("model_type, case", FOREIGN_CASES)
def test_state_from_elsewhere(model_type, model, case):
    changes, B, words = case
    cache = cache_of(busy_model(model_type, **changes), B)
    with refuses(*words), torch.no_grad():
        model(random_ids(2, 3), past_key_values=cache)


def test_key_value_cache(model):
    for cache in (DynamicCache(), DynamicCache(config=AutoConfig.for_model("llama", num_hidden_layers=3))):
        with refuses("past_key_values", r"DynamicCache\(config="), torch.no_grad():
            model(random_ids(2, 3), past_key_values=cache)


def test_cache_as_tuple(model):
    with refuses("past_key_values", "tuple"), torch.no_grad():
        model(random_ids(2, 3), past_key_values=((torch.zeros(2, 4),),))


def test_model_without_data(model_type):
    """A model on the meta device runs on nothing but meta tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.is_meta
    with refuses("meta", "cpu"):
        model(random_ids(1, 3))


# Configuration fields, and the words of the error: of all generations, and of each.
CONFIGS = {
    "no layers": ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
    "negative width": ({"hidden_size": -64}, ["hidden_size"]),
    "no vocabulary": ({"vocab_size": 0}, ["vocab_size", "at least 1"]),
    "tied embeddings": ({"tie_word_embeddings": True}, ["tie_word_embeddings", "False"]),
    "text for a number": ({"hidden_size": "64"}, ["hidden_size"]),
    "fraction for a number": ({"num_hidden_layers": 2.5}, ["num_hidden_layers"]),
}
BLOCKS = {
    "negative epsilon": ({"layer_norm_epsilon": -1e-5}, ["layer_norm_epsilon"]),
}
HEADED = BLOCKS | {
    "width not divisible": ({"attention_hidden_size": 65}, ["head_size", "65"]),
    "head size of zero": ({"head_size": 0}, ["head_size", "at least 1"]),
}
OWN_CONFIGS = {
    "rwkv": BLOCKS | {"another version": ({"architecture_version": 9}, ["architecture_version", "9"])},
    "rwkv5": HEADED,
    "rwkv6": HEADED | {"negative rank": ({"time_decay_extra_dim": -3}, ["time_decay_extra_dim"])},
    "rwkv7": {
        "width not divisible": ({"hidden_size": 65}, ["head_dim", "65"]),
        "heads that do not fit": ({"num_heads": 3, "attention_hidden_size": 64}, ["num_heads", "head_dim", "64"]),
        "head size of zero": ({"head_dim": 0}, ["head_dim", "at least 1"]),
        "negative rank": ({"decay_low_rank_dim": -3}, ["decay_low_rank_dim"]),
        "negative epsilon": ({"norm_eps": -1e-5}, ["norm_eps"]),
        "another activation": ({"hidden_act": "silu"}, ["hidden_act", "silu", "sqrelu"]),
        "attention layers": ({"attn": {"layers": [1]}}, ["attn"]),
        "no first norm": ({"norm_first": False}, ["norm_first"]),
        "value width": ({"value_dim": [64, 32, 64]}, ["value_dim", "64"]),
    },
}
CONFIG_CASES = {f"{kind}-{name}": (kind, case) for kind in TINY for name, case in (CONFIGS | OWN_CONFIGS[kind]).items()}


@pytest.mark.parametrize("model_type, case", CONFIG_CASES.values(), ids=CONFIG_CASES)
def test_config(model_type, case):
    changes, words = case
    with refuses(*words, kind=(ValueError, StrictDataclassError)):
        type(tiny_config(model_type)).from_dict(TINY[model_type] | changes)
