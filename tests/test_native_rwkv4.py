"""Known faults of transformers' own RWKV-4, right in ours: both classes run on the same weights.

Each test also says that the native class is still wrong: when one fails on that, transformers has mended it.

Letters: L layers, C width, A attention width, V vocabulary.
"""

import pytest
import torch
from conftest import assert_close, random_ids
from oracle.official import random_official
from oracle.ours import our_config, our_model
from oracle.rwkv_numpy import Rwkv4
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.rwkv.configuration_rwkv import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM

# Fields that both configurations have.
FIELDS = (
    "vocab_size",
    "hidden_size",
    "attention_hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "layer_norm_epsilon",
    "rescale_every",
)
# Further from right than any rounding: logits have a scale of 5.
WRONG = 0.1


def native_config(config) -> RwkvConfig:
    return RwkvConfig(**{name: getattr(config, name) for name in FIELDS})


def pair(weights: dict | None = None, **changes):
    """Ours and the native model in eval mode with the same weights; `changes` are configuration fields."""
    ours = our_model(weights or random_official("4"), **changes)
    assert type(ours).__module__.startswith("wkv.")
    native = RwkvForCausalLM(native_config(ours.config)).eval()
    native.load_state_dict(ours.state_dict(), strict=True)
    return ours, native


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def error(actual, expected) -> float:
    """The largest difference; infinite where the shapes differ."""
    return (actual - expected).abs().max().item() if actual.shape == expected.shape else float("inf")


IDS = random_ids(3, 9, vocab_size=37)


def test_equal_where_the_native_class_is_right():
    ours, native = pair()
    assert_close(logits(ours, IDS), logits(native, IDS))


def test_cached_step_of_a_batch():
    """The native one broadcasts its shift state (B, C) against (B, 1, C): the logits are (B, B, V)."""
    ours, native = pair()
    expected = logits(native, IDS)[:, -1:]
    with torch.no_grad():
        cache = ours(IDS[:, :-1], use_cache=True).past_key_values
        state = native(IDS[:, :-1], use_cache=True).state
    assert_close(logits(ours, IDS[:, -1:], past_key_values=cache), expected)
    assert logits(native, IDS[:, -1:], state=state).shape == (3, 3, 37)


def test_generating_for_a_batch():
    """So every text of a batch goes on differently than alone, silently."""

    def alone_and_together(model):
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        alone = torch.cat([model.generate(row[None], **settings) for row in IDS])
        return alone, model.generate(IDS, **settings)

    ours, native = map(alone_and_together, pair())
    assert torch.equal(ours[0], native[0])
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(native[0], native[1])


def test_left_padding():
    """The native one ignores the mask, and says so once."""
    ours, native = pair()
    expected = logits(native, IDS)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
    assert_close(logits(ours, padded, attention_mask=mask)[:, 4:], expected)
    assert error(logits(native, padded, attention_mask=mask)[:, 4:], expected) > WRONG


def test_packed_documents():
    """The native one reads the second document as the first one's continuation."""
    ours, native = pair()
    first, second = IDS[:1, :5], IDS[1:2, :4]
    expected = torch.cat([logits(native, first), logits(native, second)], 1)
    packed, position_ids = torch.cat([first, second], 1), torch.cat([torch.arange(5), torch.arange(4)])[None]
    assert_close(logits(ours, packed, position_ids=position_ids), expected)
    found = logits(native, packed, position_ids=position_ids)
    assert error(found[:, :5], expected[:, :5]) < WRONG < error(found[:, 5:], expected[:, 5:])


def test_saving_after_a_forward(tmp_path):
    """The native one divides weights in eval mode and saves what it then has; read again, it divides once more."""
    ours, native = pair(rescale_every=1)
    expected, before = logits(ours, IDS), {name: t.clone() for name, t in ours.state_dict().items()}
    assert error(logits(native, IDS), expected) < WRONG
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    changed = {name for name, t in native.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {
        f"rwkv.blocks.{i}.{end}.weight" for i in (1, 2) for end in ("attention.output", "feed_forward.value")
    }
    ours.save_pretrained(tmp_path / "ours")
    native.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, IDS), expected)
    assert error(logits(RwkvForCausalLM.from_pretrained(tmp_path / "native").eval(), IDS), expected) > WRONG


def test_lora_in_training_and_in_eval():
    """The native one rescales the weights under an adapter, but not the adapter."""

    def train_and_eval(model):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["output", "value"], init_lora_weights=False)
        model = get_peft_model(model, lora)
        return logits(model.train(), IDS), logits(model.eval(), IDS)

    ours, native = map(train_and_eval, pair(rescale_every=1))
    assert_close(ours[0], native[0])
    assert_close(ours[0], ours[1])
    assert error(*native) > WRONG


def test_beam_search_with_the_cache():
    """The native state cannot be reordered, so beam search refuses it."""
    ours, native = pair()
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **settings), native.generate(IDS, use_cache=False, **settings))
    with pytest.raises(ValueError, match="cannot be reordered"):
        native.generate(IDS, **settings)


def test_initial_bonus():
    """The native `time_first` is 1 in every channel, for a misplaced parenthesis; it should be log 0.3 and a zigzag."""
    config = our_config(random_official("4"))
    ours, native = AutoModelForCausalLM.from_config(config), RwkvForCausalLM(native_config(config))
    expected = torch.tensor([0.0, 0.5, -0.5]).repeat(11)[:32] + torch.tensor(0.3).log()
    for layer in range(3):
        assert_close(ours.rwkv.blocks[layer].attention.time_first, expected)
        assert (native.rwkv.blocks[layer].attention.time_first == 1).all()


def test_initialising_one_layer():
    """The native one divides by L - 1."""
    config = our_config(random_official("4", L=1))
    assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_config(config).parameters())
    with pytest.raises(ZeroDivisionError):
        RwkvForCausalLM(native_config(config))


def test_epsilon_of_the_last_norm():
    """The native one has 1e-5 there, whatever the configuration says."""
    weights = random_official("4")
    oracle = Rwkv4(weights)
    oracle.layer_norm_eps = 0.5
    expected = torch.tensor(oracle.forward(IDS[0].tolist())[0])[None]
    ours, native = pair(weights, layer_norm_epsilon=0.5)
    assert_close(logits(ours, IDS[:1]), expected)
    assert error(logits(native, IDS[:1]), expected) > WRONG


def test_attention_of_another_width():
    """The native state has the residual's width throughout."""
    weights = random_official("4", C=32, A=48)
    ours, native = pair(weights)
    expected = torch.tensor(Rwkv4(weights).forward(IDS[0].tolist())[0])[None]
    assert_close(logits(ours, IDS[:1], use_cache=True), expected)
    assert_close(logits(native, IDS[:1], use_cache=False), expected)
    with pytest.raises(RuntimeError, match="size"):
        logits(native, IDS[:1], use_cache=True)
