"""Bad model folders: a missing, unknown, misshapen or unreadable thing is an error that names it, never a guess."""

import json
import re

import pytest
import torch
from conftest import busy_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(model_type, tmp_path):
    busy_model(model_type).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Apply `change` to the dict of tensors of a saved model."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_every_missing_tensor_is_named(folder, subtests):
    """Nothing is silently drawn anew, whichever tensor it is."""
    whole = load_file(folder / WEIGHTS)
    for name in [n for n in whole if not re.search(r"\.(0|2)\.", n)]:
        with subtests.test(name):
            save_file({n: t for n, t in whole.items() if n != name}, folder / WEIGHTS, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=rf"lacks.*{name}") as error:
                load(folder)
            assert str(folder) in str(error.value)


def test_unknown_tensor(folder):
    for name in ("model.layers.0.attn.unheard_of", "rwkv.blocks.0.attention.unheard_of", "blocks.0.att.unheard_of"):
        edit(folder, lambda tensors, name=name: tensors.update({name: torch.zeros(3)}))
        with pytest.raises(ValueError, match=rf"unknown.*{re.escape(name)}"):
            load(folder)


def test_tensor_of_another_generation(folder):
    for name in ("blocks.0.att.time_maa_q", "blocks.0.att.x_q", "rwkv.blocks.0.attention.time_mix_q"):
        edit(folder, lambda tensors, name=name: tensors.update({name: torch.zeros(64)}))
        with pytest.raises(ValueError, match=re.escape(name)):
            load(folder)


def test_every_wrong_shape_is_named(folder, subtests):
    whole = load_file(folder / WEIGHTS)
    for name in [n for n in whole if not re.search(r"\.(0|2)\.", n)]:
        with subtests.test(name):
            wrong = torch.cat([whole[name], whole[name][..., :1]], -1)
            save_file({**whole, name: wrong}, folder / WEIGHTS, metadata={"format": "pt"})
            message = f"tensor {name} has shape {tuple(wrong.shape)}, expected {tuple(whole[name].shape)}"
            with pytest.raises(RuntimeError, match=re.escape(message)) as error:
                load(folder)
            assert str(folder) in str(error.value)


def test_a_missing_layer(folder):
    """Layer 1 of 3 is gone altogether."""

    def drop(tensors):
        for name in [n for n in tensors if ".1." in n]:
            del tensors[name]

    edit(folder, drop)
    with pytest.raises(ValueError, match=r"lacks.*(layers|blocks)\.1\."):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999], ids=str)
def test_truncated_weights(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(OSError, match=rf"{WEIGHTS}.*safetensors"):
        load(folder)


def test_weights_that_are_something_else(folder):
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(OSError, match=rf"{WEIGHTS}.*safetensors"):
        load(folder)


def test_missing_shard(model_type, tmp_path):
    busy_model(model_type).save_pretrained(tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(OSError, match=gone.name):
        load(tmp_path)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        load(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        load(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        load(tmp_path / "nowhere")


def test_sizes_are_read_from_the_tensors(folder):
    """A config that misstates a size does not matter; the tensors know."""
    expected = load(folder).state_dict()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 7, "intermediate_size": 999, "vocab_size": 3}))
    loaded = load(folder)
    assert loaded.config.num_hidden_layers == 3
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_base_model_and_classifier_need_no_language_model_head(folder, tmp_path):
    assert AutoModel.from_pretrained(folder).config.hidden_size == 64
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(tmp_path / "classifier")
    AutoModel.from_pretrained(tmp_path / "classifier")
    # But a language model needs one, and a classifier's folder has none.
    with pytest.raises(ValueError, match=r"lacks.*head\.weight"):
        load(tmp_path / "classifier")
