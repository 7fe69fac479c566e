"""What people do with LoRA adapters: several at once, swapped, combined, on parts of a model, in other dtypes."""

import copy

import pytest
import torch
from conftest import TINY, assert_close, assert_gradients_close, busy_model, gradients, random_ids
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from peft_cases import adapted, drawn, one_by_one, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TorchAoConfig

IDS = random_ids(2, 7)
# The linear layers that PEFT adapts unless it is told otherwise.
LORA_TARGETS = {
    "rwkv": {"time-mix": {"receptance", "key", "value", "output"}, "channel-mix": {"receptance", "key", "value"}},
    "rwkv7": {"time-mix": {"r_proj", "k_proj", "v_proj", "o_proj"}, "channel-mix": {"key", "value"}},
}
LORA_TARGETS["rwkv5"] = LORA_TARGETS["rwkv6"] = {
    "time-mix": {"receptance", "key", "value", "gate", "output"},
    "channel-mix": {"receptance", "key", "value"},
}


@pytest.fixture(scope="module")
def _folders(tmp_path_factory):
    folders = {model_type: tmp_path_factory.mktemp(model_type) for model_type in TINY}
    for model_type, folder in folders.items():
        busy_model(model_type, num_hidden_layers=2).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def _bases(_folders):
    return {model_type: AutoModelForCausalLM.from_pretrained(folder) for model_type, folder in _folders.items()}


@pytest.fixture
def base(model_type, _bases):
    """A model of two layers, loaded from a folder; the test may change it."""
    return copy.deepcopy(_bases[model_type])


def head_name(model) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


@torch.no_grad()
def logits_of(model, ids=IDS, **options):
    return model(ids, **options).logits


def test_goes_on_the_projections(base, model_type):
    found = {"time-mix": [], "channel-mix": []}
    for name, _ in adapted(base).named_parameters():
        if "lora_A" in name:
            part, module = name.split(".")[-5:-3]
            found["time-mix" if part.startswith("att") else "channel-mix"].append(module)
    for part, targets in LORA_TARGETS[model_type].items():
        assert sorted(found[part]) == sorted(2 * list(targets))


def test_transformers_own_adapters(base, tmp_path):
    plain, expected = logits_of(base), logits_of(adapted(copy.deepcopy(base)))
    base.add_adapter(LoraConfig(), "first")
    base.add_adapter(LoraConfig(), "second")
    drawn(base, seed=3, adapter="first").eval()
    base.set_adapter("first")
    assert_close(logits_of(base), expected)
    base.disable_adapters()
    assert_close(logits_of(base), plain)
    base.enable_adapters()
    base.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    base.delete_adapter("first")
    base.set_adapter("second")
    assert_close(logits_of(base), plain)


def test_is_swapped_in_place(base, tmp_path):
    other = adapted(copy.deepcopy(base), seed=4)
    other.save_pretrained(tmp_path)
    model = adapted(base)
    before = logits_of(model)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits_of(model), logits_of(other))
    assert (logits_of(model) - before).abs().max() > 0.1


def test_several_at_once(base):
    """A batch whose rows have different adapters, or none, gives each row what its adapter alone gives."""
    model = adapted(base)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=4))
    drawn(model, seed=4, adapter="other").eval()
    names, rows = ["other", "__base__", "default"], IDS[:1].expand(3, -1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected, written = [], []
    for name in names:
        model.set_adapter("default" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            expected.append(logits_of(model, rows[:1]))
            written.append(model.generate(input_ids=rows[:1], **options))
    assert_close(logits_of(model, rows, adapter_names=names), torch.cat(expected))
    assert torch.equal(model.generate(input_ids=rows, adapter_names=names, **options), torch.cat(written))
    assert len({tuple(ids.flatten().tolist()) for ids in written}) > 1


@pytest.mark.parametrize("how, options", [("cat", {}), ("svd", {"svd_rank": 16}), ("ties", {"density": 0.5})])
def test_weighted_combination(base, how, options):
    """Two adapters as one: the weighted sum of both, exact where the new rank has room for it."""
    model = adapted(base)
    alone = logits_of(model)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM"))
    drawn(model, seed=4, adapter="other")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=how, **options)
    model.set_adapter("both")
    both = logits_of(model.eval())
    model.delete_adapter("both")
    model.set_adapter("default")
    assert_close(logits_of(model), alone)
    model.base_model.set_adapter(["default", "other"])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.5)
    if how != "ties":
        assert_close(both, logits_of(model))
    assert (both - alone).abs().max() > 0.1


def test_modules_to_save(base, tmp_path):
    """Head and embeddings are trained whole beside the adapter, and saved with it."""
    plain, head = logits_of(base), head_name(base)
    model = adapted(copy.deepcopy(base), modules_to_save=[head, "embeddings"])
    train(model, IDS)
    expected = logits_of(model)
    assert_close(one_by_one(model, IDS), expected)
    with model.disable_adapter():
        assert_close(logits_of(model), plain)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("by_name", [False, True], ids=["default", "by-name"])
def test_trainable_tokens(base, by_name, tmp_path):
    """Rows of the embeddings are trained beside the adapter, and no other."""
    tokens = sorted({1, IDS[0, 0].item(), IDS[1, 3].item()})
    before = base.get_input_embeddings().weight.detach().clone()
    model = adapted(copy.deepcopy(base), trainable_token_indices={"embeddings": tokens} if by_name else tokens)
    train(model, IDS)
    expected = logits_of(model)
    assert_close(one_by_one(model, IDS), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path)), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    merged = model.merge_and_unload()
    assert_close(logits_of(merged), expected)
    moved = (merged.get_input_embeddings().weight != before).any(1).nonzero().flatten().tolist()
    assert set(moved) == set(tokens) & set(IDS.flatten().tolist())


@pytest.mark.parametrize(
    "model_type, name",
    [
        ("rwkv", "feed_forward.key.weight"),
        ("rwkv5", "attention.time_decay"),
        ("rwkv6", "attention.time_maa_w1"),
        ("rwkv6", "attention.time_maa_w2"),
        ("rwkv6", "attention.time_decay_w2"),
        ("rwkv7", "attn.r_k"),
    ],
)
def test_parameters_that_are_no_linear_layers(base, name, tmp_path):
    model = adapted(copy.deepcopy(base), target_modules=[], target_parameters=[name])
    with model.disable_adapter():
        assert_close(logits_of(model), logits_of(base))
    losses = train(model, IDS)
    expected = logits_of(model)
    assert losses[-1] < losses[0] and (expected - logits_of(base)).abs().max() > 1e-3
    assert_close(one_by_one(model, IDS), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path)), expected)
    assert_close(logits_of(model.merge_and_unload()), expected)


def test_some_layers(base, model_type):
    blocks = "layers" if model_type == "rwkv7" else "blocks"
    for pattern in (None, blocks):
        model = adapted(copy.deepcopy(base), layers_to_transform=[1], layers_pattern=pattern)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names and all(f".{blocks}.1." in name for name in names)


def test_embeddings_and_head_after_resizing(base, tmp_path):
    """New tokens need new rows on loading too; the adapter holds them."""
    head, ids = head_name(base), random_ids(2, 7, vocab_size=60)
    base.resize_token_embeddings(60)
    model = adapted(copy.deepcopy(base), target_modules=["embeddings", head, "key"])
    train(model, ids)
    expected = logits_of(model, ids)
    assert_close(one_by_one(model, ids), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(base.name_or_path)
    again.resize_token_embeddings(60)
    assert torch.equal(logits_of(PeftModel.from_pretrained(again, tmp_path), ids), expected)
    assert_close(logits_of(model.merge_and_unload(), ids), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(base, reentrant):
    model = adapted(base).train()
    model(IDS, labels=IDS).loss.backward()
    expected = {name: g for name, g in gradients(model).items() if g is not None}
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(IDS, labels=IDS).loss.backward()
    assert_gradients_close({name: g for name, g in gradients(model).items() if g is not None}, expected)


def test_adapters_in_float32_on_a_model_in_bfloat16(base):
    expected = logits_of(adapted(copy.deepcopy(base)))
    model = adapted(base.to(torch.bfloat16))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert logits_of(model).dtype == torch.bfloat16
    assert_close(logits_of(model), expected, torch.bfloat16)
    assert_close(one_by_one(model, IDS), expected, torch.bfloat16)
    losses = train(model, IDS)
    assert losses[-1] < losses[0] - 1
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values() if g is not None)


def test_on_a_classifier(base, tmp_path):
    """PEFT trains and saves the new head along with the adapter."""
    folder, labels = base.name_or_path, torch.tensor([0, 2])
    model = adapted(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3), task_type="SEQ_CLS")
    model.train()(IDS, labels=labels).loss.backward()
    assert {name for name, g in gradients(model).items() if g is not None and "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    expected = logits_of(model.eval())
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(logits_of(PeftModel.from_pretrained(plain, tmp_path).eval()), expected)
    assert_close(logits_of(model.merge_and_unload()), expected)


@pytest.mark.slow
def test_on_a_model_in_int8(base, model_type, tmp_path):
    """The base model's linear layers in torchao's weight-only int8: trains, decodes, and comes back."""
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())

    def quantised():
        return AutoModelForCausalLM.from_pretrained(base.name_or_path, quantization_config=config, dtype=torch.float32)

    assert_close(logits_of(quantised()) / 5, logits_of(base) / 5, torch.bfloat16)
    model = adapted(quantised())
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    expected = logits_of(model)
    assert_close(one_by_one(model, IDS), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(quantised(), tmp_path)), expected)
