"""PEFT in front of the blocks: learned prompts, embeddings as inputs; and the methods that cannot work."""

import copy

import peft
import pytest
import torch
from conftest import assert_close, random_ids
from peft import PeftModel, get_peft_model
from peft_cases import adapted, train

IDS = random_ids(2, 7)
MASKS = {"plain": torch.ones(2, 7, dtype=torch.long), "padded": torch.tensor([[0] * 3 + [1] * 4, [1] * 7])}
# RWKV-4 to 6 have no field of this name in their configuration, and no such method uses it here.
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_attention_heads": 1}
PROMPTS = {
    "prompt-tuning": lambda: peft.PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=16),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=PROMPTS.values(), ids=PROMPTS)
def prompted(request, own_model):
    """A model with a trained prompt, and the same model without."""
    plain = copy.deepcopy(own_model)
    model = get_peft_model(own_model, request.param())
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    assert all(parameter.requires_grad == ("prompt" in name) for name, parameter in model.named_parameters())
    return model, plain


@torch.no_grad()
def test_a_prompt_is_its_embeddings_before_the_text(prompted, tmp_path):
    model, plain = prompted
    embeds = torch.cat([model.get_prompt(batch_size=2), plain.get_input_embeddings()(IDS)], 1)
    expected = plain(inputs_embeds=embeds).logits
    assert_close(model(IDS).logits, expected)
    assert_close(model.train()(IDS).logits, expected)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(plain, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation_with_a_prompt(prompted, mask, beams):
    """As the plain model goes on from the prompt's embeddings, each row as if it were alone."""
    model, plain = prompted
    ids, settings = IDS * mask, GREEDY | {"num_beams": beams}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    for row, own, real in zip(together, ids, mask.bool(), strict=True):
        text = own[real][None]
        embeds = torch.cat([model.get_prompt(batch_size=1), plain.get_input_embeddings()(text)], 1)
        assert torch.equal(row[7:], plain.generate(inputs_embeds=embeds, **settings)[0])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_embeddings_as_inputs_under_an_adapter(own_model, mask):
    model = adapted(own_model)
    ids = IDS * mask
    embeds = model.get_input_embeddings()(ids)
    found = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert_close(found, model(ids, attention_mask=mask).logits)
    written = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(written, model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, 7:])


def test_gradients_reach_embeddings_under_an_adapter(own_model):
    model = adapted(own_model).train()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=IDS).loss.backward()
    assert embeds.grad[:, :-1].abs().amax(-1).min() > 0


@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.CartridgeConfig])
def test_methods_that_make_keys_and_values_are_refused(own_model, config):
    model = get_peft_model(own_model, config(**PROMPT))
    with pytest.raises(ValueError, match="RWKV states"):
        model(IDS, labels=IDS)
    with pytest.raises(ValueError, match="RWKV states"):
        model.generate(input_ids=IDS, max_new_tokens=2)


def test_methods_that_need_attention_or_other_sizes_are_refused(own_model):
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt"):
        get_peft_model(own_model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1))
    with pytest.raises(ValueError, match="divisible by group_size"):
        get_peft_model(own_model, peft.RoadConfig(task_type="CAUSAL_LM"))
