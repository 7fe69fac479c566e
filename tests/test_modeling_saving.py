"""Saving, loading, placing: what comes back is bit for bit what went away, and no forward changes a weight.

Letters: B rows, T tokens.
"""

import re

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import assert_close, busy_model, random_ids, time_mix
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

T = 21


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), f"{name} was modified"


def test_forwards_modify_no_weight(own_model):
    before, ids = snapshot(own_model), random_ids(2, T)
    own_model(ids)
    own_model.train()(ids, labels=ids).loss.backward()
    own_model.eval().generate(ids, max_new_tokens=3)
    own_model.to(torch.bfloat16)
    own_model(ids)
    own_model.to(torch.float32)
    rounded = {name: tensor.bfloat16().float() for name, tensor in before.items()}
    assert_unchanged(own_model, rounded)


def test_reload_equals_saved(own_model, tmp_path):
    """Also after an evaluation forward, and the weights are the same bits."""
    ids = random_ids(2, T)
    before = snapshot(own_model)
    with torch.no_grad():
        expected = own_model(ids).logits
    own_model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_unchanged(reloaded, before)
    assert type(reloaded) is type(own_model)
    assert not reloaded.training
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, expected)
    mine, theirs = own_model.config.to_dict(), reloaded.config.to_dict()
    skip = {"_name_or_path", "transformers_version", "dtype", "architectures"}
    assert {k: v for k, v in mine.items() if k not in skip} == {k: v for k, v in theirs.items() if k not in skip}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reload_in_half_precision(own_model, tmp_path, dtype):
    own_model.to(dtype).save_pretrained(tmp_path)
    before = snapshot(own_model)
    assert_unchanged(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), before)
    # Full precision holds every half-precision number.
    widened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_unchanged(widened, {name: tensor.float() for name, tensor in before.items()})


def test_sharded_reload(own_model, tmp_path):
    own_model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_unchanged(AutoModelForCausalLM.from_pretrained(tmp_path), snapshot(own_model))


def test_resize_token_embeddings(own_model, tmp_path):
    ids = random_ids(2, T)
    with torch.no_grad():
        expected = own_model(ids).logits
        own_model.resize_token_embeddings(61)
        logits = own_model(ids).logits
    assert logits.shape[-1] == 61 == own_model.config.vocab_size
    assert torch.equal(logits[..., :50], expected)
    assert own_model.get_output_embeddings().weight.data_ptr() != own_model.get_input_embeddings().weight.data_ptr()
    own_model(torch.tensor([[60, 3]]))
    own_model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
        own_model.resize_token_embeddings(50)
        assert torch.equal(own_model(ids).logits, expected)


def test_device_map(own_model, tmp_path):
    ids = random_ids(2, T)
    with torch.no_grad():
        expected = own_model(ids).logits
        own_model.save_pretrained(tmp_path)
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        assert torch.equal(placed(ids).logits, expected)
        # Everything on the CPU but the second block.
        parts = {name: "cpu" for name, module in own_model.named_modules() if not list(module.children())}
        inside = re.compile(r"^(\w+\.(?:layers|blocks)\.\d+)\..*")
        parts = {inside.sub(r"\1", name): place for name, place in parts.items()}
        parts |= {name: "disk" for name in parts if name.endswith(".1")}
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "offload")
        assert next(time_mix(placed, 1).parameters()).is_meta
        assert_close(placed(ids).logits, expected)
        assert placed.generate(ids, max_new_tokens=4).tolist() == own_model.generate(ids, max_new_tokens=4).tolist()


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_offload_of_every_leaf_module(own_model, tmp_path, offload):
    """Accelerate brings a module's own weights when that module is called, and takes them away afterwards."""
    ids = random_ids(2, T)
    with torch.no_grad():
        expected = own_model(ids).logits
        if offload == "memory":
            cpu_offload(own_model, execution_device="cpu")
        else:
            disk_offload(own_model, tmp_path, execution_device="cpu")
        assert all(p.is_meta for p in own_model.parameters())
        assert_close(own_model(ids).logits, expected)


def test_model_and_cache_can_be_pickled(model_type, tmp_path):
    model, ids, new = busy_model(model_type), random_ids(2, T), random_ids(2, 3, seed=1)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    with torch.no_grad():
        expected = model(new, past_key_values=cache).logits
        assert torch.equal(model(new, past_key_values=loaded).logits, expected)
