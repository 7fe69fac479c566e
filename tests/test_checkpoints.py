"""`wkv convert`: from every layout of every generation to every other and back, nothing is lost."""

import json
import logging

import pytest
import torch
from checkpoint_cases import FLA, VARIANTS, assert_identical, assert_identical_file, low_rank, save, saved
from oracle.official import RANKS, official_logits, random_official
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from wkv.checkpoints import CheckpointError, convert
from wkv.gguf_files import read_gguf
from wkv.layouts import detect_version
from wkv.models.rwkv_chat_templates import CHAT_TEMPLATES

FORMS = {
    "float32": dict(),
    "bfloat16": dict(dtype=torch.bfloat16, seed=1),
    "one_layer": dict(L=1),
    "wide_attention": dict(A=48),
    "one_head-odd_sizes": dict(C=30, N=30, F=71, V=11),
}


@pytest.fixture(params=VARIANTS)
def variant(request) -> dict:
    return VARIANTS[request.param]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_round_trip_is_bit_identical(variant, form, tmp_path):
    weights = saved(tmp_path / "model.pth", **variant, **form)
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", weights)


@pytest.mark.parametrize("version, ranks", [("6", (32, 1)), ("7", (32, 1, 32, 40))])
@pytest.mark.parametrize("to", ["hf", "fla", "gguf"])
def test_round_trip_where_a_rank_is_one_or_the_width(version, ranks, to, tmp_path):
    heads = dict(C=32, N=8) if to != "fla" or version == "6" else dict(C=64, N=64)
    weights = saved(tmp_path / "model.pth", version=version, ranks=ranks, **heads)
    convert(tmp_path / "model.pth", tmp_path / f"there.{to}", to=to, tokenizer=False)
    convert(tmp_path / f"there.{to}", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", weights)


@pytest.mark.parametrize("layer0_v", [False, True], ids=["", "layer0_v"])
@pytest.mark.parametrize("version", FLA)
def test_round_trip_over_flash_linear_attention(version, layer0_v, tmp_path):
    weights = saved(tmp_path / "model.pth", **FLA[version], dtype=torch.bfloat16, layer0_v=layer0_v)
    convert(tmp_path / "model.pth", tmp_path / "fla", to="fla", tokenizer=False)
    convert(tmp_path / "fla", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", weights)
    if version == "6":
        convert(tmp_path / "fla", tmp_path / "hub", tokenizer=False)
        convert(tmp_path / "hub", tmp_path / "again.pth", to="pth")
        assert_identical_file(tmp_path / "again.pth", weights)


@pytest.mark.parametrize("version", FLA)
def test_round_trip_over_gguf(version, tmp_path):
    weights = saved(tmp_path / "model.pth", **FLA[version])
    convert(tmp_path / "model.pth", tmp_path / "model.gguf", to="gguf", tokenizer=False)
    convert(tmp_path / "model.gguf", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", weights)
    assert read_gguf(tmp_path / "model.gguf").tensors.keys() == weights.keys()


def test_round_trip_of_mixed_dtypes_and_special_values(variant, tmp_path):
    weights = random_official(**variant, dtype=torch.bfloat16)
    for number, name in enumerate(weights):
        weights[name] = weights[name].to((torch.float32, torch.bfloat16, torch.float16, torch.float64)[number % 4])
    weights["blocks.1.ffn.key.weight"][0, 0] = float("nan")
    weights["blocks.1.ffn.key.weight"][1, 0] = -0.0
    weights["head.weight"][0, 0] = float("inf")
    save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", weights)


def mirror(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint as programs for safetensors have it: no singleton axes, low-rank matrices transposed."""
    return {name: tensor.mT if low_rank(name) else tensor.squeeze() for name, tensor in weights.items()}


def test_safetensors_mirror_with_other_axes(variant, tmp_path):
    """It becomes the same folder, and comes back from it as it was."""
    weights = saved(tmp_path / "model.pth", **variant)
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(save(mirror(weights), tmp_path / "mirror.safetensors"), tmp_path / "hub2", tokenizer=False)
    assert_identical(load_file(tmp_path / "hub2/model.safetensors"), load_file(tmp_path / "hub/model.safetensors"))
    convert(tmp_path / "hub2", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", mirror(weights))


def test_an_ambiguous_bonus_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    weights = saved(tmp_path / "model.pth", **VARIANTS["5.2-time_first"])
    convert(save(weights, tmp_path / "model.safetensors"), tmp_path / "back.pth", to="pth")
    assert "time_first is read as the logarithm" in caplog.text


def test_safetensors_mirror_with_other_names_of_rwkv6(tmp_path):
    weights = saved(tmp_path / "model.pth", version="6")
    renamed = {
        name.replace("time_maa", "time_mix").replace("time_faaaa", "time_first"): tensor
        for name, tensor in mirror(weights).items()
    }
    convert(save(renamed, tmp_path / "mirror.safetensors"), tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", mirror(weights))


@pytest.mark.parametrize(
    "version, prefix",
    [("4", "_forward_module."), ("5.2", "model."), ("6", "_orig_mod."), ("7", "_forward_module.model.")],
)
def test_prefixes_of_training_frameworks_are_stripped(version, prefix, tmp_path):
    weights = random_official(version)
    save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical_file(tmp_path / "back.pth", weights)
    convert(tmp_path / "model.pth", tmp_path / "plain.pth", to="pth")
    assert_identical_file(tmp_path / "plain.pth", weights)


def test_keys_stay_in_their_order(variant, tmp_path):
    weights = saved(tmp_path / "model.pth", **variant)
    convert(tmp_path / "model.pth", tmp_path / "plain.pth", to="pth")
    assert list(torch.load(tmp_path / "plain.pth", weights_only=True)) == list(weights)


def test_converted_folder_gives_the_official_logits(variant, tmp_path):
    saved(tmp_path / "model.pth", **variant, L=4, C=64, N=32, V=50)
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    ids = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(0))
    expected, _ = official_logits(tmp_path / "back.pth", ids[0].tolist())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    torch.testing.assert_close(model(ids).logits[0], expected, atol=1e-4, rtol=0)


SIZES = {"vocab_size": 41, "hidden_size": 48, "attention_hidden_size": 64, "num_hidden_layers": 2}
CONFIGS = {
    "4": {"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]},
    "5.0": {"model_type": "rwkv5", "head_size": 16, "use_gate": False, "decay_per_head": True, "bonus_is_log": True},
    "5.0-time_faaaa": {"use_gate": False, "decay_per_head": True, "bonus_is_log": False},
    "5.1": {"use_gate": True, "decay_per_head": True, "bonus_is_log": False},
    "5.1-time_first": {"use_gate": True, "decay_per_head": True, "bonus_is_log": True},
    "5.2": {"use_gate": True, "decay_per_head": False, "bonus_is_log": False, "architectures": ["Rwkv5ForCausalLM"]},
    "5.2-time_first": {"use_gate": True, "decay_per_head": False, "bonus_is_log": True, "head_size": 16},
    "6": {"model_type": "rwkv6", "head_size": 16, "architectures": ["Rwkv6ForCausalLM"]}
    | dict(zip(("time_mix_extra_dim", "time_decay_extra_dim"), RANKS["6"], strict=True)),
    "7": {"model_type": "rwkv7", "num_heads": 4, "head_dim": 16, "architectures": ["RWKV7ForCausalLM"]}
    | {f"{x}_low_rank_dim": rank for x, rank in zip(("decay", "a", "v", "gate"), RANKS["7"], strict=True)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_comes_from_the_tensors(name, tmp_path):
    weights = random_official(**VARIANTS[name], L=2, C=48, A=64, N=16, V=41, F=100, dtype=torch.float16)
    weights["head.weight"] = weights["head.weight"].float()
    convert(save(weights, tmp_path / "model.pth"), tmp_path / "hub", tokenizer=False)
    written = json.loads((tmp_path / "hub/config.json").read_text())
    special = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    assert written.items() >= (CONFIGS[name] | SIZES | special | {"intermediate_size": 100, "dtype": "float16"}).items()
    assert json.loads((tmp_path / "hub/generation_config.json").read_text())["eos_token_id"] == 0


def test_flash_linear_attention_has_no_older_generations(tmp_path):
    for version in ("4", "5.2"):
        saved(tmp_path / f"{version}.pth", version=version)
        with pytest.raises(CheckpointError, match=rf"has RWKV-6 and RWKV-7, not RWKV-{version[0]}"):
            convert(tmp_path / f"{version}.pth", tmp_path / "fla", to="fla", tokenizer=False)
    saved(tmp_path / "model.pth", version="7")
    with pytest.raises(CheckpointError, match="heads have 8 channels"):
        convert(tmp_path / "model.pth", tmp_path / "fla", to="fla", tokenizer=False)


@pytest.mark.parametrize(
    "rows, ids", [(65536, [24281, 59, 4571]), (50277, [6989, 27, 14260]), (50304, [6989, 27, 14260])]
)
def test_tokenizer_follows_the_embedding_rows(rows, ids, tmp_path):
    saved(tmp_path / "model.pth", version="4" if rows == 50277 else "7", L=1, C=16, V=rows)
    convert(tmp_path / "model.pth", tmp_path / "hub")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert tokenizer("User: hi")["input_ids"] == ids
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(tmp_path / "hub").eos_token_id == 0


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_template_is_the_one_asked_for(name, tmp_path):
    """Also of a GGUF file, which names one itself."""
    save(random_official("7", C=64, N=64, V=65536, L=1), tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "folder", chat_template=name)
    convert(tmp_path / "model.pth", tmp_path / "model.gguf", to="gguf")
    convert(tmp_path / "model.gguf", tmp_path / "again", chat_template=name)
    for folder in ("folder", "again"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == CHAT_TEMPLATES[name]


def test_wrong_vocabulary(tmp_path):
    saved(tmp_path / "model.pth", version="7", L=1, V=300)
    with pytest.raises(CheckpointError, match=r"300 embedding rows.*--vocab.*--no-tokenizer"):
        convert(tmp_path / "model.pth", tmp_path / "hub")
    pieces = [repr(bytes([byte])) + " 1" for byte in range(256)] + [repr(f"piece{n:03d}") + " 8" for n in range(100)]
    (tmp_path / "vocab.txt").write_text("".join(f"{number} {piece}\n" for number, piece in enumerate(pieces, start=1)))
    with pytest.raises(CheckpointError, match=r"vocab\.txt: has 357 ids, the model only 300"):
        convert(tmp_path / "model.pth", tmp_path / "hub", vocab=tmp_path / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"none\.txt"):
        convert(tmp_path / "model.pth", tmp_path / "hub", vocab=tmp_path / "none.txt")
    assert not (tmp_path / "hub").exists()
    saved(tmp_path / "larger.pth", version="7", L=1, V=400)
    convert(tmp_path / "larger.pth", tmp_path / "hub", vocab=tmp_path / "vocab.txt")
    assert AutoTokenizer.from_pretrained(tmp_path / "hub")("piece007piece")["input_ids"][0] == 264


@pytest.mark.parametrize("name", VARIANTS)
def test_versions_are_detected(name):
    shapes = {tensor: tuple(value.shape) for tensor, value in random_official(**VARIANTS[name]).items()}
    assert detect_version(shapes) == VARIANTS[name]["version"]
