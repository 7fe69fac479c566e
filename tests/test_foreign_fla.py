"""Folders of flash-linear-attention load through the Auto classes as they are, and ours become such folders."""

import json

import pytest
import torch
from folder_cases import FLA6_CONFIG, FLA7_CONFIG, assert_loads, assert_saves_as_ours, case, write_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wkv.checkpoints import convert


def as_fla6(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """RWKV-6 in the layout of flash-linear-attention, written out by hand."""
    weights = {"model.embeddings.weight": official["emb.weight"], "lm_head.weight": official["head.weight"]}
    norms = {"ln_out": "norm", "blocks.0.ln0": "layers.0.pre_norm"}
    for layer in range(3):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        ours = f"model.layers.{layer}."
        norms |= {f"blocks.{layer}.ln1": f"layers.{layer}.attn_norm", f"blocks.{layer}.ln2": f"layers.{layer}.ffn_norm"}
        norms[f"blocks.{layer}.att.ln_x"] = f"layers.{layer}.attn.g_norm"
        w, k, v, r, g = official[att + "time_maa_w1"].T.chunk(5)  # (R, C) each
        weights[ours + "attn.x_proj.0.linear.weight"] = torch.cat([r, w, k, v, g])
        weights[ours + "attn.x_proj.0.mu"] = official[att + "time_maa_x"].flatten()
        w, k, v, r, g = official[att + "time_maa_w2"]  # (R, C) each
        weights[ours + "attn.x_proj.2.weight"] = torch.cat([r, w, k, v, g]).T
        weights[ours + "attn.x_bias"] = torch.stack([official[f"{att}time_maa_{x}"].flatten() for x in "rwkvg"])
        for x, name in {"r": "receptance", "k": "key", "v": "value", "g": "gate"}.items():
            weights[ours + f"attn.{x}_proj.linear.weight"] = official[f"{att}{name}.weight"]
        weights[ours + "attn.o_proj.weight"] = official[att + "output.weight"]
        weights[ours + "attn.w_proj.linear.lora.0.weight"] = official[att + "time_decay_w1"].T
        weights[ours + "attn.w_proj.linear.lora.2.weight"] = official[att + "time_decay_w2"].T
        weights[ours + "attn.w_proj.linear.lora.2.bias"] = official[att + "time_decay"].flatten()
        weights[ours + "attn.bonus"] = official[att + "time_faaaa"]
        for name in ("key", "receptance"):
            weights[ours + f"ffn.{name}.linear.weight"] = official[f"{ffn}{name}.weight"]
            weights[ours + f"ffn.{name}.mu"] = official[f"{ffn}time_maa_{name[0]}"].flatten()
        weights[ours + "ffn.value.weight"] = official[ffn + "value.weight"]
    for name, theirs in norms.items():
        weights |= {f"model.{theirs}.{leaf}": official[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    return weights


def test_flash_linear_attention_rwkv6(tmp_path):
    official, ours, expected = case("6")
    folder = write_folder(tmp_path / "fla", as_fla6(official), FLA6_CONFIG)
    model = assert_loads(folder, expected)
    assert model.config.group_norm_eps == pytest.approx(64e-5) and model.config.head_size == 64
    assert_saves_as_ours(model, ours, expected, tmp_path / "saved")
    # What `wkv convert --to fla` writes is the same.
    convert(ours, tmp_path / "written", to="fla", tokenizer=False)
    found, by_hand = load_file(tmp_path / "written/model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == by_hand.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in by_hand.items())
    settings = json.loads((tmp_path / "written/config.json").read_text())
    same = FLA6_CONFIG.keys() - {"bos_token_id", "eos_token_id", "intermediate_size"}
    assert {name: settings[name] for name in same} == {name: FLA6_CONFIG[name] for name in same}


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
def test_flash_linear_attention_rwkv7(change, tmp_path):
    official, ours, expected = case("7")
    weights = load_file(ours / "model.safetensors")
    if change:
        change(weights)
    folder = write_folder(tmp_path / "fla", weights, FLA7_CONFIG)
    assert_saves_as_ours(assert_loads(folder, expected), ours, expected, tmp_path / "saved")
    convert(folder, tmp_path / "back.pth", to="pth", check=True)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items())


@pytest.mark.parametrize("generation_config", [False, True])
@pytest.mark.parametrize("version, config", [("6", FLA6_CONFIG), ("7", FLA7_CONFIG)], ids=["6", "7"])
def test_world_config_with_byte_ids_as_special_tokens(version, config, generation_config, tmp_path):
    weights = as_fla6(case("6")[0]) if version == "6" else load_file(case("7")[1] / "model.safetensors")
    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = torch.zeros(65536, 128)
    folder = write_folder(tmp_path / "fla", weights, config | {"vocab_size": 65536})
    if generation_config:
        settings = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 0)
    assert model.generation_config.eos_token_id == 0
