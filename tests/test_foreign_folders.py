"""Folders written by others load through the Auto classes as they are, and without their code."""

import json

import pytest
import torch
from folder_cases import (
    FLA6_CONFIG,
    FLA7_CONFIG,
    FORK_CONFIG,
    IDS,
    MODEL_TYPES,
    REMOTE_CONFIG,
    assert_loads,
    assert_saves_as_ours,
    case,
    write_folder,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.rwkv.configuration_rwkv import RwkvConfig as NativeConfig
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM as NativeRwkv

from wkv.checkpoints import CheckpointError, convert


@pytest.mark.parametrize(
    "config, fields",
    [
        (FLA6_CONFIG | {"num_heads": 4}, {"head_size": 32, "time_mix_extra_dim": 3, "time_decay_extra_dim": 5}),
        (FLA6_CONFIG | {"norm_eps": 1e-3}, {"layer_norm_epsilon": 1e-3, "intermediate_size": 448}),
        (FORK_CONFIG | {"group_norm_epsilon": 1e-3}, {"head_dim": 32, "num_heads": 4, "group_norm_eps": 1e-3}),
        (FORK_CONFIG | {"layer_norm_epsilon": 1e-3, "lora_rank_gate": 9}, {"norm_eps": 1e-3, "gate_low_rank_dim": 9}),
        (REMOTE_CONFIG | {"model_type": "rwkv5"}, {"head_size": 64, "num_heads": 2, "intermediate_size": 448}),
        (REMOTE_CONFIG | {"model_type": "rwkv6"}, {"head_size": 64, "num_heads": 2, "time_decay_extra_dim": 64}),
    ],
)
def test_configs_without_tensors(config, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize(
    "config, culprit",
    [
        (FLA6_CONFIG | {"expand_k": 0.5}, "expand_k"),
        (FLA6_CONFIG | {"attn": {"layers": [1]}}, "attn"),
        (FLA7_CONFIG | {"norm_first": False}, "norm_first"),
        (FORK_CONFIG | {"embedding_layer_norm_fused": True}, "embedding_layer_norm_fused"),
    ],
)
def test_configs_of_other_architectures_are_refused(config, culprit, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=culprit):
        AutoConfig.from_pretrained(tmp_path)


def below_model(name):
    return name if name.startswith("head") else "model." + name


def below_rwkv7(name):
    """A fork of transformers."""
    return name if name.startswith("head") else "rwkv7." + name.replace("emb.", "embeddings.")


def as_llama(name):
    """A fork of transformers with the module names of newer models."""
    for official, theirs in {
        ".att.receptance": ".att.r_proj",
        ".att.key": ".att.k_proj",
        ".att.value": ".att.v_proj",
        ".att.output": ".att.o_proj",
        ".att.ln_x": ".att.g_norm",
        ".ffn.key": ".ffn.up_proj",
        ".ffn.value": ".ffn.down_proj",
        "blocks.0.ln0": "embedding_norm",
        ".ln1": ".input_layernorm",
        ".ln2": ".post_attention_layernorm",
        ".att.": ".linear_attn.",
        ".ffn.": ".mlp.",
        "blocks.": "layers.",
        "ln_out.": "norm.",
        "emb.": "embed_tokens.",
    }.items():
        name = name.replace(official, theirs)
    return name.replace("head.", "lm_head.") if name.startswith("head") else "model." + name


def as_attention(name):
    """The style of the older remote code with RWKV-7 inside."""
    return below_rwkv7(name).replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")


def linears(weights):
    """The low-rank pairs as Linear modules: transposed."""
    return {
        name + ".weight" if (low := name[-2:-1] in "wavg" and name[-1] in "12") else name: tensor.T if low else tensor
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize(
    "version, rename",
    [(version, below_model if version in ("5.2", "7") else str) for version in MODEL_TYPES],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_official_names_in_a_folder(version, rename, tmp_path):
    official, ours, expected = case(version)
    weights = {rename(name): tensor for name, tensor in official.items()}
    folder = write_folder(tmp_path / "folder", weights, {"model_type": MODEL_TYPES[version]})
    assert_saves_as_ours(assert_loads(folder, expected), ours, expected, tmp_path / "saved")
    base = AutoModel.from_pretrained(folder)
    torch.testing.assert_close((base.norm if version == "7" else base.ln_out).weight, official["ln_out.weight"])
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    found = dict(classifier.named_parameters()).values()
    assert any(p.shape == (128, 128) and torch.equal(p, official["blocks.2.att.key.weight"]) for p in found)


CALLED_RWKV, CALLED_RWKV7 = {"model_type": "rwkv", "architecture_version": "rwkv7"}, {"model_type": "rwkv7"}


@pytest.mark.parametrize(
    "rename, low_rank, fork",
    [
        (str, dict, CALLED_RWKV7),
        (below_rwkv7, dict, CALLED_RWKV7),
        (below_rwkv7, linears, CALLED_RWKV7),
        (below_model, linears, CALLED_RWKV),
        (as_llama, dict, CALLED_RWKV),
        (as_attention, dict, CALLED_RWKV7),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forks_with_rwkv7(rename, low_rank, fork, tmp_path):
    official, ours, expected = case("7")
    weights = {rename(name): tensor for name, tensor in low_rank(official).items()}
    config = {"head_size": 64, "layer_norm_epsilon": 1e-5, "group_norm_epsilon": 64e-5, "context_length": 512}
    folder = write_folder(tmp_path / "folder", weights, fork | config | {"num_attention_heads": 2, "hidden_size": 128})
    model = assert_loads(folder, expected)
    assert model.config.model_type == "rwkv7" and model.config.max_position_embeddings == 512
    assert_saves_as_ours(model, ours, expected, tmp_path / "saved")
    convert(folder, tmp_path / "back.pth", to="pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items())


def test_a_fork_with_another_epsilon_cannot_become_official(tmp_path):
    folder = write_folder(tmp_path / "folder", case("7")[0], FORK_CONFIG | {"group_norm_epsilon": 1e-3})
    with pytest.raises(CheckpointError, match=r"folder: group_norm_epsilon 0\.001 cannot be kept"):
        convert(folder, tmp_path / "back.pth", to="pth")


@pytest.mark.parametrize("named", ["4", "5.2", "rwkv6", 7])
def test_a_fork_that_calls_every_generation_rwkv(named, tmp_path):
    version = str(named).removeprefix("rwkv")
    official, _, expected = case(version)
    config = {"model_type": "rwkv", "architecture_version": named}
    model = assert_loads(write_folder(tmp_path / "folder", official, config), expected)
    assert model.config.model_type == MODEL_TYPES[version]


def test_a_fork_with_a_generation_that_nobody_knows(tmp_path):
    folder = write_folder(tmp_path / "folder", case("4")[0], {"model_type": "rwkv", "architecture_version": "rwkv9"})
    with pytest.raises(ValueError, match=r"architecture_version.*rwkv9"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", ["6", "7"])
def test_a_missing_or_unknown_tensor_in_official_names_is_named(version, tmp_path):
    config, official = {"model_type": MODEL_TYPES[version]}, case(version)[0]
    weights = {name: tensor for name, tensor in official.items() if name != "blocks.1.ffn.value.weight"}
    with pytest.raises(ValueError, match=r"lacks.*\.1\.(ffn|feed_forward)\.value\.weight"):
        AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "missing", weights, config))
    weights = official | {"blocks.1.att.time_state": torch.zeros(2, 64, 64)}
    with pytest.raises(ValueError, match=r"unknown.*blocks\.1\.att\.time_state"):
        AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "unknown", weights, config))


PLANTED = "from pathlib import Path\n\nPath({marker!r}).touch()\nraise RuntimeError('their code was run')\n"


def by_remote_names(official: dict[str, torch.Tensor], version: str) -> dict[str, torch.Tensor]:
    letters = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
    weights = {}
    for name, tensor in official.items():
        if version[0] == "5":
            name = name[:-1] + letters[name[-1]] if ".time_mix_" in name else name
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.").replace(".ln0.", ".pre_ln.")
        weights[name if name.startswith("head") else "rwkv." + name.replace("emb.", "embeddings.")] = tensor
    return weights


@pytest.mark.parametrize("trust", [None, False, True], ids=["unasked", "refused", "trusted"])
@pytest.mark.parametrize("version", ["5.2", "6"])
def test_remote_code_is_never_run(version, trust, tmp_path):
    official, ours, expected = case(version)
    name = f"Rwkv{version[0]}"
    files = {"AutoConfig": f"configuration_rwkv{version[0]}.{name}Config"}
    files |= {auto: f"modeling_rwkv{version[0]}.{name}{end}" for auto, end in AUTO_ENDS.items()}
    config = REMOTE_CONFIG | {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"], "auto_map": files}
    folder = write_folder(tmp_path / "remote", by_remote_names(official, version), config)
    for file in {value.partition(".")[0] for value in files.values()}:
        (folder / f"{file}.py").write_text(PLANTED.format(marker=str(tmp_path / "planted")))
    model = assert_loads(folder, expected, trust_remote_code=trust)
    assert not (tmp_path / "planted").exists()
    assert_saves_as_ours(model, ours, expected, tmp_path / "saved")


AUTO_ENDS = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}


@pytest.mark.parametrize("version", ["5.0", "5.1", "6", "7"])
def test_pytorch_bin(version, tmp_path):
    """Sizes are read from these too: the config has none."""
    official, ours, expected = case(version)
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": MODEL_TYPES[version]}))
    torch.save(official, tmp_path / "pytorch_model.bin")
    assert_saves_as_ours(assert_loads(tmp_path, expected), ours, expected, tmp_path / "saved")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_native_rwkv_folder(file, tmp_path):
    """Written by transformers' own class, of a size at which it rescales its weights when it runs."""
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, rescale_every=1)
    theirs = NativeRwkv(NativeConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    expected = torch.cat([theirs.eval()(row[None]).logits for row in IDS]).detach()
    assert_loads(tmp_path, expected)
