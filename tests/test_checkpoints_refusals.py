"""What `wkv convert` does not take: the message is one line with file and culprit, and nothing is left behind."""

import json
import os
import zipfile

import pytest
import torch
from checkpoint_cases import save, saved
from oracle.official import random_official

from wkv.checkpoints import CheckpointError, convert

# What tells versions without a table from their neighbours; the rest of the tensors does not matter.
OTHERS = {
    "6 (x060a)": ("6", "att.gate_w1"),
    "6 (x060b)": ("6", "att.time_maa_rkvw_w1"),
    "7a": ("7", "ffn.s_emb.weight"),
    "7b": ("7", "qkv.q.weight"),
    "8 (rc00)": ("7", "ffn.enn.weight"),
}


@pytest.mark.parametrize("version", OTHERS)
def test_other_versions_are_refused_by_name(version, tmp_path):
    neighbour, tensor = OTHERS[version]
    weights = random_official(neighbour) | {f"blocks.0.{tensor}": torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        convert(save(weights, tmp_path / "model.pth"), tmp_path / "hub")
    expected = f"{tmp_path / 'model.pth'}: this is RWKV-{version}; `wkv` supports RWKV-4, 5, 6 and 7 so far"
    assert str(error.value) == expected


def missing(weights):
    del weights["blocks.1.ffn.key.weight"], weights["ln_out.bias"]


def block_gap(weights):
    for name in [name for name in weights if name.startswith("blocks.1.")]:
        del weights[name]


def unknown(weights):
    weights["blocks.2.att.time_state"] = torch.zeros(4, 8, 8)


def second_ln0(weights):
    weights["blocks.1.ln0.weight"] = torch.ones(32)


def wrong_matrix(weights):
    weights["blocks.1.att.key.weight"] = torch.zeros(32, 33)


def wrong_vector(weights):
    weights["blocks.2.ln1.weight"] = torch.zeros(31)


def folded_embedding(weights):
    norm = weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
    weights["emb.weight"] = torch.nn.functional.layer_norm(weights["emb.weight"], (32,), *norm)


def twice(weights):
    weights["model.emb.weight"] = weights["emb.weight"]


def preconverted(weights):
    weights["_strategy"] = "cpu fp32"


def optimizer(weights):
    weights["optimizer"] = {"lr": 1e-4}


def no_model(weights):
    weights.clear()
    weights["fc.weight"] = torch.zeros(3, 3)


def of_another_version(weights):
    weights["blocks.0.att.time_decay_w9"] = torch.zeros(32, 32)


def wrong_rank(weights):
    name = "blocks.1.att.w1" if "blocks.1.att.w1" in weights else "blocks.1.att.time_decay_w1"
    weights[name] = torch.zeros(32, 7)


def wrong_list(weights):
    weights["blocks.1.att.time_maa_w2"] = torch.zeros(4, 3, 32)


def wrong_heads(weights):
    for layer in range(3):
        for name in (f"blocks.{layer}.att.{leaf}" for leaf in ("r_k", "time_faaaa", "time_decay")):
            if name in weights and weights[name].shape[0] == 4:
                weights[name] = torch.zeros(5, *weights[name].shape[1:])


def two_names_of_the_bonus(weights):
    weights["blocks.1.att.time_first"] = weights.pop("blocks.1.att.time_faaaa")


def no_gate_in_one_block(weights):
    del weights["blocks.1.att.gate.weight"]


ALL = ("4", "5.0", "5.1", "5.2", "6", "7")
# What is wrong, in which versions, and what is said of it.
REFUSALS = {
    missing: (ALL, r"lacks tensors of RWKV-\d: blocks\.1\.ffn\.key\.weight, ln_out\.bias"),
    block_gap: (ALL, r"has 2 blocks but none with the number 1"),
    unknown: (ALL, r"has tensors that RWKV-\d does not know: blocks\.2\.att\.time_state"),
    second_ln0: (ALL, r"does not know: blocks\.1\.ln0\.weight"),
    wrong_matrix: (ALL, r"blocks\.1\.att\.key\.weight has shape \(32, 33\).* \(A, C\) = \(32, 32\)"),
    wrong_vector: (ALL, r"blocks\.2\.ln1\.weight has shape \(31,\).* \(32,\)"),
    folded_embedding: (ALL, r"emb\.weight has ln0 folded in"),
    twice: (ALL, r"emb\.weight twice"),
    preconverted: (ALL, r"converted by the `rwkv` package.*_strategy"),
    optimizer: (ALL, r"'optimizer' is not a tensor"),
    no_model: (ALL, r"holds no RWKV model"),
    of_another_version: (ALL, r"does not know: blocks\.0\.att\.time_decay_w9"),
    wrong_rank: (("6", "7"), r"blocks\.1\.att\.(time_decay_)?w1 has shape \(32, 7\).* \(C, R[dw]\) = \(32, 5\)"),
    wrong_list: (("6",), r"time_maa_w2 has shape \(4, 3, 32\).* \(wkvrg, R, C\) = \(5, 3, 32\)"),
    wrong_heads: (("5.1", "5.2", "6", "7"), r"5 heads of size \d, the attention width is 32"),
    two_names_of_the_bonus: (("5.1", "5.2"), r"does not know: blocks\.0\.att\.time_faaaa"),
    no_gate_in_one_block: (("5.1", "5.2", "6"), r"lacks tensors of RWKV-\d: blocks\.1\.att\.gate\.weight"),
}


@pytest.mark.parametrize(
    "spoil, version",
    [(spoil, version) for spoil, (versions, _) in REFUSALS.items() for version in versions],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_refusals_name_file_and_culprit(spoil, version, tmp_path):
    weights = random_official(version)
    spoil(weights)
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=REFUSALS[spoil][1]) as error:
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    assert str(error.value).startswith(f"{tmp_path / 'model.pth'}: ") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix, tmp_path):
    whole = save(random_official("7", L=1), tmp_path / f"whole{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"cut{suffix}: ") as error:
            convert(cut, tmp_path / "hub", tokenizer=False)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "hub").exists()


def test_flipped_bit_in_a_pth_is_noticed(tmp_path):
    weights = random_official("7", L=1)
    data = bytearray(save(weights, tmp_path / "model.pth").read_bytes())
    data[data.index(weights["head.weight"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "model.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.pth: tensor head\.weight is corrupt"):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    assert not list(tmp_path.glob("hub*"))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_that_wants_to_run_code_is_refused(zipped, tmp_path):
    weights = random_official("7", L=1) | {"blocks.0.att.x_r": Malicious(tmp_path / "pwned")}
    torch.save(weights, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"model\.pth: refused.*only tensors|model\.pth: refused.*more than tensors"
    ):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_files_of_other_kinds(tmp_path):
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    (tmp_path / "folder").mkdir()
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, message in {
        "text.pth": "neither",
        "archive.pth": "not one written by torch.save",
        "folder": "holds no model.safetensors",
        "list.pth": "holds a list",
        "absent.pth": "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
            convert(tmp_path / name, tmp_path / "hub")


def test_check_reports_nonfinite_weights(tmp_path):
    weights = random_official("7")
    weights["blocks.1.att.w0"][0, 0, 3] = float("nan")
    weights["blocks.2.ffn.key.weight"][:2, 0] = float("inf")
    save(weights, tmp_path / "model.pth")
    expected = r"NaN or infinite values in blocks\.1\.att\.w0 \(1\), blocks\.2\.ffn\.key\.weight \(2\)"
    with pytest.raises(CheckpointError, match=expected):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False, check=True)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("version", ALL)
def test_folders_that_cannot_be_converted(version, tmp_path):
    saved(tmp_path / "model.pth", version=version)
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    with pytest.raises(CheckpointError, match="loads without conversion"):
        convert(tmp_path / "hub", tmp_path / "hub2")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* name the folder"):
        convert(tmp_path / "hub/model.safetensors", tmp_path / "back.pth", to="pth")
    path = tmp_path / "hub/config.json"
    config = json.loads(path.read_text())
    epsilon = "norm_eps" if version == "7" else "layer_norm_epsilon"
    other = "rwkv7" if version == "4" else "rwkv"
    changes = {
        epsilon: (1e-3, f"{epsilon} 0.001 cannot be kept"),
        "model_type": (other, rf"model_type {other}, its tensors are those of RWKV-{version[0]}|cannot be used"),
    }
    if version == "7":
        changes["group_norm_eps"] = 1e-3, "group_norm_eps 0.001 cannot be kept"
    elif version != "4":
        changes["head_size_divisor"] = 4, "group_norm_eps 0.00016.* cannot be kept"
    for key, (value, message) in changes.items():
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"hub: its config\.json cannot be used"):
        convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert not (tmp_path / "back.pth").exists()


def test_layouts_that_do_not_exist(tmp_path):
    saved(tmp_path / "model.pth", version="5.2")
    with pytest.raises(CheckpointError, match="cannot convert to 'onnx': one of hf, pth, fla, gguf"):
        convert(tmp_path / "model.pth", tmp_path / "model.onnx", to="onnx")
    with pytest.raises(CheckpointError, match=r"model\.pth: .*GGUF|llama"):
        convert(tmp_path / "model.pth", tmp_path / "model.gguf", to="gguf", tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
