"""State tuning as a PEFT method: it trains the states alone, and every text begins with them, however it is fed."""

import copy

import pytest
import torch
from conftest import assert_close, assert_gradients_close, busy_model, gradients, random_ids, time_mix
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.cache_utils import DynamicCache

import wkv
from wkv.models import rwkv_sequences

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LENGTHS = [5, 1, 7, 4]
PACKED = {
    "cu_seq_lens_q": torch.tensor([0, 5, 6, 13, 17], dtype=torch.int32),
    "seq_idx": torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None],
    "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
}


def tune(model, seed: int = 0, **options) -> PeftModel:
    """The model with a state that matters."""
    tuned = get_peft_model(model, wkv.StateTuningConfig(**options)).eval()
    fill(tuned, seed)
    return tuned


def fill(tuned, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))


@pytest.fixture
def tuned(own_model) -> PeftModel:
    return tune(own_model)


def logits(model, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def initial_states(tuned) -> list[torch.Tensor]:
    return [time_mix(tuned.get_base_model(), layer).initial_state().detach() for layer in range(3)]


def cache_with(tuned, rows: int = 1) -> DynamicCache:
    """A cache that a model without an adapter begins with as the tuned one does."""
    config = tuned.config
    cache = DynamicCache(config=config)
    for layer, S in enumerate(initial_states(tuned)):
        cache.update_recurrent_state(S.expand(rows, *S.shape).clone(), layer)
        for shift in range(2):
            cache.update_conv_state(torch.zeros(rows, config.hidden_size, 1, dtype=tuned.dtype), layer, shift)
    return cache


def test_a_fresh_adapter_trains_states_alone_and_changes_nothing(model_type, own_model):
    ids = random_ids(3, 12)
    before, expected = copy.deepcopy(own_model.state_dict()), logits(own_model, ids)
    tuned = get_peft_model(own_model, wkv.StateTuningConfig())
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in trained.values()] == [own_model.config.state_shape] * 3
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(".initial_state.rwkv_state_S." in name for name in trained)
    # RWKV-4 begins with a weight of nearly 0 and not with none: rounding differs.
    error = (logits(tuned, ids) - expected).abs().max()
    assert error <= (1e-6 * expected.abs().max() if model_type == "rwkv" else 0)

    optimizer, losses = torch.optim.Adam(trained.values(), lr=1), []
    for step in range(15):
        losses.append(tuned(ids, labels=ids).loss)
        losses[-1].backward()
        assert step or all(p.grad.abs().max() > 1e-4 for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    after = tuned.unload().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(own_model, ids), expected)


def test_the_operator_starts_from_it(model, tuned):
    ids = random_ids(2, 9)
    expected = logits(model, ids, past_key_values=cache_with(tuned, 2))
    assert_close(logits(tuned, ids), expected)
    assert (expected - logits(model, ids)).abs().max() > 0.1
    # One token has a path of its own.
    assert_close(logits(tuned, ids[:, :1]), expected[:, :1])


def test_a_cache_that_continues_does_not_start_again(tuned):
    ids = random_ids(2, 12)
    whole = logits(tuned, ids)
    for sizes in ([12], [1, 11], [7, 1, 1, 3]):
        cache, parts = DynamicCache(config=tuned.config), []
        for part in ids.split(sizes, 1):
            parts.append(logits(tuned, part, past_key_values=cache, use_cache=True))
        assert_close(torch.cat(parts, 1), whole)
    cache.reset()
    assert_close(logits(tuned, ids, past_key_values=cache), whole)


def test_long_prompts_begin_once_with_it(tuned, monkeypatch):
    ids = random_ids(2, 12)
    whole = logits(tuned, ids)
    monkeypatch.setattr(rwkv_sequences, "SLICE_TOKENS", 10)
    assert_close(logits(tuned, ids), whole)


def test_padding_before_and_after_changes_nothing(tuned):
    ids = random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 6:] = 0
    out = logits(tuned, ids, attention_mask=mask)
    assert_close(out[0, 4:], logits(tuned, ids[:1, 4:])[0])
    assert_close(out[1, :6], logits(tuned, ids[1:, :6])[0])


@pytest.mark.parametrize("packing", PACKED)
def test_every_packed_document_starts_from_it(packing, tuned):
    ids, weights = random_ids(1, sum(LENGTHS)), torch.randn(1, sum(LENGTHS), 50)
    alone = torch.cat([tuned(part).logits for part in ids.split(LENGTHS, 1)], 1)
    (alone * weights).sum().backward()
    expected = {name: g for name, g in gradients(tuned).items() if g is not None}
    packed = tuned(ids, **{packing: PACKED[packing]}).logits
    assert_close(packed, alone)
    (packed * weights).sum().backward()
    actual = {name: g for name, g in gradients(tuned).items() if g is not None}
    assert len(actual) == 3
    assert_gradients_close(actual, expected)


def test_packed_documents_behind_a_cache(tuned):
    """The first document continues the cache, the others begin anew."""
    ids = random_ids(1, 12)
    cache = DynamicCache(config=tuned.config)
    logits(tuned, ids[:, :4], past_key_values=cache)
    out = logits(tuned, ids[:, 4:], past_key_values=cache, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))
    assert_close(out, torch.cat([logits(tuned, ids[:, :7])[:, 4:], logits(tuned, ids[:, 7:])], 1))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, tuned):
    ids = random_ids(2, 9)
    tuned(ids, labels=ids).loss.backward()
    expected = {name: g for name, g in gradients(tuned).items() if g is not None}
    assert len(expected) == 3
    options = {"use_reentrant": reentrant}
    tuned.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    tuned.get_base_model().enable_input_require_grads()
    tuned.train()
    tuned(ids, labels=ids).loss.backward()
    assert_gradients_close({name: g for name, g in gradients(tuned).items() if g is not None}, expected)


def test_half_precision_keeps_a_float32_state(own_model):
    ids, expected = random_ids(2, 9), logits(tune(copy.deepcopy(own_model)), random_ids(2, 9))
    tuned = tune(own_model.bfloat16())
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    assert_close(logits(tuned, ids).float(), expected, torch.bfloat16)
    tuned(ids, labels=ids).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in tuned.parameters() if p.requires_grad)
    # Cast with the model, it loses digits but still works.
    assert_close(logits(tuned.to(torch.bfloat16), ids).float(), expected, torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3, "top_k": 5}],
    ids=["greedy", "beams", "samples"],
)
def test_generation(options, model, tuned):
    ids, options = random_ids(1, 2), GREEDY | options
    torch.manual_seed(0)
    written = tuned.generate(input_ids=ids, **options)
    torch.manual_seed(0)
    rows = options.get("num_beams") or options.get("num_return_sequences", 1)
    expected = model.generate(ids, past_key_values=cache_with(tuned, rows), **options)
    assert torch.equal(written, expected)
    torch.manual_seed(0)
    assert not torch.equal(written, model.generate(ids, **options))


def test_generation_in_a_padded_batch(tuned):
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    written = tuned.generate(input_ids=ids * mask, attention_mask=mask, **GREEDY)
    assert torch.equal(written[0, 7:], tuned.generate(input_ids=ids[:1, 3:], **GREEDY)[0, 4:])
    assert torch.equal(written[1], tuned.generate(input_ids=ids[1:], **GREEDY)[0])


@pytest.mark.parametrize("prompt", [5, 1])
def test_decoding_takes_the_fused_step(prompt, tuned, monkeypatch):
    """All tokens but the prompt's, for which the modules put the state into the cache."""
    kernel = pytest.importorskip("wkv_kernels.rwkv_step")
    calls, step = [], kernel.rwkv_step
    monkeypatch.setattr(kernel, "rwkv_step", lambda *args: calls.append(args) or step(*args))
    tuned.generate(input_ids=random_ids(1, prompt), **GREEDY)
    assert len(calls) == GREEDY["max_new_tokens"] - 1


def test_several_adapters(tuned, tmp_path):
    ids = random_ids(2, 9)
    one = logits(tuned, ids)
    tuned.save_pretrained(tmp_path / "one")
    tuned.add_adapter("fresh", wkv.StateTuningConfig())
    assert torch.equal(logits(tuned, ids), one)
    tuned.set_adapter("fresh")
    zero = logits(tuned, ids)
    assert (zero - one).abs().max() > 0.1
    fill(tuned, seed=1)
    two = logits(tuned, ids)
    tuned.load_adapter(tmp_path / "one", "loaded")
    assert torch.equal(logits(tuned, ids), two)
    for name, expected in (("loaded", one), ("default", one), ("fresh", two)):
        tuned.set_adapter(name)
        assert torch.equal(logits(tuned, ids), expected)
        assert {p.split(".")[-1] for p, x in tuned.named_parameters() if x.requires_grad} == {name}
    with pytest.raises(ValueError, match="a text begins with one state, but fresh, default are"):
        tuned.base_model.set_adapter(["fresh", "default"])
    with tuned.disable_adapter():
        assert_close(logits(tuned, ids), zero)
        assert not torch.equal(logits(tuned, ids), two)
    assert torch.equal(logits(tuned, ids), two)
    tuned.delete_adapter("fresh")
    tuned.set_adapter("loaded")
    assert list(tuned.peft_config) == ["default", "loaded"] and torch.equal(logits(tuned, ids), one)


def test_an_adapter_for_each_row_is_refused(tuned):
    with pytest.raises(ValueError, match="leave out adapter_names"):
        tuned(random_ids(2, 5), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
def test_merging_is_refused(method, tuned):
    with pytest.raises(ValueError, match=r"cannot be merged.*export_time_state|is never merged"):
        getattr(tuned, method)()
    assert tuned.base_model.tuner_layer_cls is type(time_mix(tuned.get_base_model()).initial_state)


def test_together_with_lora(own_model):
    """LoRA merged beforehand, or both at once as adapters of transformers."""
    ids, plain = random_ids(2, 9), copy.deepcopy(own_model)
    lora = LoraConfig(init_lora_weights=False, target_modules=["key", "value"])
    torch.manual_seed(0)
    merged = tune(get_peft_model(plain, lora).merge_and_unload())
    torch.manual_seed(0)
    own_model.add_adapter(lora, "lora")
    own_model.add_adapter(wkv.StateTuningConfig(), "state")
    own_model.set_adapter(["lora", "state"])
    for layer in range(3):
        S = time_mix(merged.get_base_model(), layer).initial_state.rwkv_state_S["default"]
        time_mix(own_model, layer).initial_state.rwkv_state_S["state"].data.copy_(S)
    assert_close(logits(own_model, ids), logits(merged, ids))
    own_model.set_adapter("lora")
    assert (logits(own_model, ids) - logits(merged, ids)).abs().max() > 0.1


def test_some_layers_only(own_model):
    tuned = tune(own_model, target_modules=r".*\.[02]\.att\w*\.initial_state")
    assert [time_mix(own_model, layer).initial_state() is None for layer in range(3)] == [False, True, False]
    assert sum(p.requires_grad for p in tuned.parameters()) == 2


def test_what_has_no_state_is_refused(own_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="a model of type llama has no WKV state"):
        get_peft_model(LlamaForCausalLM(llama), wkv.StateTuningConfig())
    with pytest.raises(ValueError, match="is no initial state"):
        get_peft_model(own_model, wkv.StateTuningConfig(target_modules=["value"]))


def test_a_classifier(model_type):
    from transformers import AutoModelForSequenceClassification

    model, ids = busy_model(model_type, AutoModelForSequenceClassification, num_labels=2), random_ids(2, 9)
    expected = logits(model, ids)
    tuned = tune(model, task_type="SEQ_CLS")
    assert (logits(tuned, ids) - expected).abs().max() > 0.1
    tuned(ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.any() for p in tuned.parameters() if p.requires_grad)
