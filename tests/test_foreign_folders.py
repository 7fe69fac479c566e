"""Hub folders written by others load through the Auto classes as they are, and ours load in theirs."""

import json

import pytest
import rwkv7_hf
import torch
from oracle.official import official_logits, random_official_rwkv7
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from wkv.checkpoints import convert

IDS = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def official():
    # Heads of 64, for which the others' group norm epsilon (1e-5 times the head size) is the official one.
    return random_official_rwkv7(L=3, C=128, N=64, V=50)


@pytest.fixture(scope="module")
def expected(official):
    return torch.stack([official_logits(official, row.tolist())[0] for row in IDS])


@pytest.fixture(scope="module")
def ours(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    torch.save(official, folder / "model.pth")
    convert(folder / "model.pth", folder / "hub", tokenizer=False)
    return folder / "hub"


def write_folder(folder, weights: dict[str, torch.Tensor], config: dict):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_loads(folder, expected):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
    return model


# A config of fla-hub/rwkv7-*, less the sizes that can be read from the tensors, plus what such configs say wrongly.
FLA_CONFIG = {
    "architectures": ["RWKV7ForCausalLM"],
    "attn": None,
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "fuse_norm": False,
    "head_dim": 64,
    "hidden_act": "sqrelu",
    "hidden_ratio": 4.0,
    "hidden_size": 128,
    "initializer_range": 0.006,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "model_type": "rwkv7",
    "norm_bias": True,
    "norm_eps": 1e-05,
    "norm_first": True,
    "num_heads": None,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 50,
}


def fused_mixes(weights):
    """Early flash-linear-attention: the six mixes of a layer in one tensor."""
    for layer in range(3):
        prefix = f"model.layers.{layer}.attn."
        weights[prefix + "x_x"] = torch.stack([weights.pop(f"{prefix}x_{x}").flatten() for x in "rwkvag"])


def flat_mixes(weights):
    for name in list(weights):
        weights[name] = weights[name].flatten() if ".attn.x_" in name else weights[name]


def extra_axes(weights):
    for name in list(weights):
        if name.endswith(("k_k", "k_a", "lora.2.bias", "ffn.x_k")):
            weights[name] = weights[name][None, None]


def unused_value_residual(weights):
    for leaf in ("0.weight", "2.weight", "2.bias"):
        weights[f"model.layers.0.attn.v_lora.lora.{leaf}"] = weights[f"model.layers.1.attn.v_lora.lora.{leaf}"] + 1


@pytest.mark.parametrize(
    "change",
    [None, fused_mixes, flat_mixes, extra_axes, unused_value_residual],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_flash_linear_attention_layouts(change, ours, expected, tmp_path):
    weights = load_file(ours / "model.safetensors")
    if change:
        change(weights)
    model = assert_loads(write_folder(tmp_path / "fla", weights, FLA_CONFIG), expected)
    # Whatever was read, our own layout is written.
    model.save_pretrained(tmp_path / "saved")
    saved, canonical = load_file(tmp_path / "saved/model.safetensors"), load_file(ours / "model.safetensors")
    assert saved.keys() == canonical.keys()
    assert all(
        torch.equal(saved[name], tensor) and saved[name].shape == tensor.shape for name, tensor in canonical.items()
    )
    assert_loads(tmp_path / "saved", expected)


@pytest.mark.parametrize("generation_config", [False, True])
def test_world_config_with_byte_ids_as_special_tokens(generation_config, ours, tmp_path):
    weights = load_file(ours / "model.safetensors")
    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = torch.zeros(65536, 128)
    folder = write_folder(tmp_path / "fla", weights, FLA_CONFIG | {"vocab_size": 65536})
    if generation_config:
        settings = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 0)
    assert model.generation_config.eos_token_id == 0


def below_model(name):
    return name if name.startswith("head") else "model." + name


def below_rwkv7(name):
    return name if name.startswith("head") else "rwkv7." + name.replace("emb.", "embeddings.")


@pytest.mark.parametrize("rename", [str, below_model, below_rwkv7])
@pytest.mark.parametrize("linear", [False, True], ids=["parameters", "linears"])
def test_official_names_in_a_folder(rename, linear, official, ours, expected, tmp_path):
    weights = {}
    for name, tensor in official.items():
        if linear and name[-2:] in {letter + digit for letter in "wavg" for digit in "12"}:
            name, tensor = name + ".weight", tensor.t()
        weights[rename(name)] = tensor
    folder = write_folder(tmp_path / "folder", weights, {"model_type": "rwkv7", "layer_norm_epsilon": 1e-5})
    model = assert_loads(folder, expected)
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == load_file(ours / "model.safetensors").keys()
    base = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(base.norm.weight, official["ln_out.weight"])
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.testing.assert_close(classifier.model.layers[2].ffn.key.weight, official["blocks.2.ffn.key.weight"])


def test_a_missing_or_unknown_tensor_in_official_names_is_named(official, tmp_path):
    config = {"model_type": "rwkv7"}
    weights = {name: tensor for name, tensor in official.items() if name != "blocks.1.att.k_a"}
    with pytest.raises(ValueError, match=r"lacks.*layers\.1\.attn\.k_a"):
        AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "missing", weights, config))
    weights = official | {"blocks.1.att.time_state": torch.zeros(2, 64, 64)}
    with pytest.raises(ValueError, match=r"unknown.*blocks\.1\.att\.time_state"):
        AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "unknown", weights, config))


def test_our_folder_loads_in_rwkv7_hf_and_its_folder_in_ours(ours, expected, tmp_path):
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(ours)
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/model.safetensors").keys() == load_file(ours / "model.safetensors").keys()
    assert_loads(tmp_path / "theirs", expected)
    convert(tmp_path / "theirs", tmp_path / "back.pth", to="pth", check=True)
