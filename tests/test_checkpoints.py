"""`wkv convert`: nothing is lost in either direction, nothing wrong is taken, and nothing half-done is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from oracle.official import TINY_RANKS, official_logits, random_official_rwkv7
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from wkv import checkpoints
from wkv.checkpoints import CheckpointError, convert
from wkv.layouts import GENERATIONS, detect_version
from wkv.tensor_files import LazyTensor, open_checkpoint, write_pth, write_safetensors


def save(weights: dict[str, torch.Tensor], path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*as_bytes), name


def low_rank(name: str) -> bool:
    return name[-2:] in {letter + digit for letter in "wavg" for digit in "12"}


CHECKPOINTS = {
    "float32": dict(),
    "bfloat16": dict(dtype=torch.bfloat16, seed=1),
    "float16-layer0_v": dict(dtype=torch.float16, layer0_v=True),
    "one_layer": dict(L=1),
    "one_layer-layer0_v": dict(L=1, layer0_v=True),
    "wide_attention": dict(A=48),
    "rank_is_width": dict(ranks=(32, 1, 32, 40)),
    "one_head-odd_sizes": dict(C=30, N=30, F=71, V=11),
}


@pytest.mark.parametrize("arguments", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_round_trip_is_bit_identical(arguments, tmp_path):
    weights = random_official_rwkv7(**arguments)
    save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical(torch.load(tmp_path / "back.pth", weights_only=True), weights)


def test_round_trip_of_mixed_dtypes_and_special_values(tmp_path):
    weights = random_official_rwkv7(dtype=torch.bfloat16, layer0_v=True)
    for number, name in enumerate(weights):
        weights[name] = weights[name].to((torch.float32, torch.bfloat16, torch.float16, torch.float64)[number % 4])
    weights["blocks.1.att.w1"][0, 0] = float("nan")
    weights["blocks.1.att.w1"][1, 0] = -0.0
    weights["head.weight"][0, 0] = float("inf")
    save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical(torch.load(tmp_path / "back.pth", weights_only=True), weights)


def test_safetensors_mirror_with_other_axes(tmp_path):
    """Files made for other programs lack singleton axes and have low-rank matrices transposed; so they come back."""
    weights = random_official_rwkv7(layer0_v=True)
    mirror = {name: tensor.t() if low_rank(name) else tensor.squeeze() for name, tensor in weights.items()}
    convert(save(weights, tmp_path / "model.pth"), tmp_path / "hub", tokenizer=False)
    convert(save(mirror, tmp_path / "mirror.safetensors"), tmp_path / "hub2", tokenizer=False)
    assert_identical(load_file(tmp_path / "hub2/model.safetensors"), load_file(tmp_path / "hub/model.safetensors"))
    convert(tmp_path / "hub2", tmp_path / "back.pth", to="pth")
    assert_identical(torch.load(tmp_path / "back.pth", weights_only=True), mirror)


@pytest.mark.parametrize("prefix", ["_forward_module.", "model.", "_forward_module.model."])
def test_prefixes_of_training_frameworks_are_stripped(prefix, tmp_path):
    weights = random_official_rwkv7()
    save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert_identical(torch.load(tmp_path / "back.pth", weights_only=True), weights)
    convert(tmp_path / "model.pth", tmp_path / "plain.pth", to="pth")
    assert_identical(torch.load(tmp_path / "plain.pth", weights_only=True), weights)


def test_pth_variants_that_torch_writes(tmp_path):
    """A state dict, parameters, tensors that share storage or are strided, and the format of before PyTorch 1.6."""
    weights = random_official_rwkv7()
    variant = OrderedDict(weights)
    variant["emb.weight"] = torch.nn.Parameter(weights["emb.weight"])
    stacked = torch.stack([weights["blocks.0.ln1.weight"], weights["blocks.0.ln1.bias"]])
    variant["blocks.0.ln1.weight"], variant["blocks.0.ln1.bias"] = stacked
    variant["head.weight"] = weights["head.weight"].t().contiguous().t()
    variant._metadata = OrderedDict(version=1)
    torch.save(variant, tmp_path / "zip.pth")
    torch.save(variant, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "legacy.pth"):
        found = open_checkpoint(tmp_path / name).tensors
        assert_identical({key: tensor.read() for key, tensor in found.items()}, weights)


def test_written_pth_is_what_torch_writes(tmp_path):
    weights = random_official_rwkv7(dtype=torch.bfloat16, layer0_v=True)
    weights |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "flags": torch.tensor([True, False])}
    read = open_checkpoint(save(weights, tmp_path / "model.pth")).tensors
    write_pth(tmp_path / "again.pth", read)
    for mapped in (False, True):
        found = torch.load(tmp_path / "again.pth", weights_only=True, mmap=mapped)
        assert list(found) == list(weights)
        assert_identical(found, weights)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if mapped and tensor.numel())
    with zipfile.ZipFile(tmp_path / "again.pth") as archive:
        assert archive.testzip() is None
    write_safetensors(tmp_path / "again.safetensors", read, {"key": "value"})
    assert_identical(load_file(tmp_path / "again.safetensors"), weights)


def test_converted_folder_gives_the_official_logits(tmp_path):
    weights = random_official_rwkv7(L=4, C=64, N=32, V=50, layer0_v=True)
    save(weights, tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False, check=True) < 1e-4
    assert convert(tmp_path / "hub", tmp_path / "back.pth", to="pth", check=True) < 1e-4
    ids = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(0))
    expected, _ = official_logits(tmp_path / "back.pth", ids[0].tolist())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    torch.testing.assert_close(model(ids).logits[0], expected, atol=1e-4, rtol=0)


def test_config_comes_from_the_tensors(tmp_path):
    weights = random_official_rwkv7(L=2, C=48, A=64, N=16, V=41, F=100, dtype=torch.float16)
    weights["head.weight"] = weights["head.weight"].float()
    convert(save(weights, tmp_path / "model.pth"), tmp_path / "hub", tokenizer=False)
    written = json.loads((tmp_path / "hub/config.json").read_text())
    w, a, v, g = TINY_RANKS
    assert (
        written.items()
        >= {
            "model_type": "rwkv7",
            "architectures": ["RWKV7ForCausalLM"],
            "vocab_size": 41,
            "hidden_size": 48,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "intermediate_size": 100,
            "decay_low_rank_dim": w,
            "a_low_rank_dim": a,
            "v_low_rank_dim": v,
            "gate_low_rank_dim": g,
            "dtype": "float16",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        }.items()
    )
    assert json.loads((tmp_path / "hub/generation_config.json").read_text())["eos_token_id"] == 0


def test_shards_and_index(tmp_path, monkeypatch):
    weights = random_official_rwkv7()
    save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "one", tokenizer=False)
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 60_000)
    convert(tmp_path / "model.pth", tmp_path / "many", tokenizer=False)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "many" / name).stat().st_size < 80_000 for name in files)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many")]
    assert_identical(models[1].state_dict(), models[0].state_dict())
    convert(tmp_path / "many", tmp_path / "back.pth", to="pth")
    assert_identical(torch.load(tmp_path / "back.pth", weights_only=True), weights)
    (tmp_path / "many" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=files[1]):
        convert(tmp_path / "many", tmp_path / "lost.pth", to="pth")


def test_world_tokenizer(tmp_path):
    weights = random_official_rwkv7(L=1, C=16, V=65536)
    convert(save(weights, tmp_path / "model.pth"), tmp_path / "hub")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert tokenizer("User: hi\n\nAssistant:")["input_ids"] == [24281, 59, 4571, 261, 5585, 41693, 59]
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(tmp_path / "hub").eos_token_id == 0


def test_wrong_vocabulary(tmp_path):
    save(random_official_rwkv7(L=1, V=300), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"300 embedding rows.*--vocab.*--no-tokenizer"):
        convert(tmp_path / "model.pth", tmp_path / "hub")
    pieces = [repr(bytes([byte])) + " 1" for byte in range(256)] + [repr(f"piece{n:03d}") + " 8" for n in range(100)]
    (tmp_path / "vocab.txt").write_text("".join(f"{number} {piece}\n" for number, piece in enumerate(pieces, start=1)))
    with pytest.raises(CheckpointError, match=r"vocab\.txt: has 357 ids, the model only 300"):
        convert(tmp_path / "model.pth", tmp_path / "hub", vocab=tmp_path / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"none\.txt"):
        convert(tmp_path / "model.pth", tmp_path / "hub", vocab=tmp_path / "none.txt")
    assert not (tmp_path / "hub").exists()
    save(random_official_rwkv7(L=1, V=400), tmp_path / "larger.pth")
    convert(tmp_path / "larger.pth", tmp_path / "hub", vocab=tmp_path / "vocab.txt")
    assert AutoTokenizer.from_pretrained(tmp_path / "hub")("piece007piece")["input_ids"][0] == 264


# The shapes that tell the versions apart, in the order of the official layout; the rest of the tensors does not matter.
VERSIONS = {
    "4": {"att.time_decay": (32,), "att.time_first": (32,)},
    "5.0": {"att.time_decay": (4,), "att.time_first": (4,), "att.ln_x.weight": (32,)},
    "5.1": {"att.time_decay": (4,), "att.ln_x.weight": (32,), "att.gate.weight": (32, 32)},
    "5.2": {"att.time_decay": (4, 8), "att.ln_x.weight": (32,), "att.gate.weight": (32, 32)},
    "6": {"att.time_decay": (1, 1, 32), "att.ln_x.weight": (32,), "att.gate.weight": (32, 32), "att.time_maa_x": (32,)},
    "6 (x060a)": {"att.time_decay": (1, 1, 32), "att.time_maa_x": (32,), "att.gate_w1": (32, 4)},
    "6 (x060b)": {"att.time_decay": (1, 1, 32), "att.time_maa_x": (32,), "att.time_maa_rkvw_w1": (32, 4)},
    "7a": {"att.r_k": (4, 8), "ffn.s_emb.weight": (37, 1024)},
    "7b": {"att.r_k": (4, 8), "ffn.s_emb.weight": (37, 1024), "qkv.q.weight": (32, 32)},
    "8 (rc00)": {"att.r_k": (4, 8), "ffn.enn.weight": (37, 32)},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_other_versions_are_refused_by_name(version, tmp_path):
    weights = {"emb.weight": torch.zeros(37, 32)}
    weights |= {f"blocks.0.{name}": torch.zeros(shape) for name, shape in VERSIONS[version].items()}
    with pytest.raises(CheckpointError) as error:
        convert(save(weights, tmp_path / "model.pth"), tmp_path / "hub")
    expected = f"{tmp_path / 'model.pth'}: this is RWKV-{version}; `wkv convert` supports RWKV-7 so far"
    assert str(error.value) == expected


def test_version_7_is_detected():
    shapes = {name: tuple(tensor.shape) for name, tensor in random_official_rwkv7().items()}
    assert detect_version(shapes) == "7" and "7" in GENERATIONS


def missing(weights):
    del weights["blocks.1.att.w1"], weights["ln_out.bias"]


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
    weights["blocks.2.att.x_r"] = torch.zeros(1, 1, 31)


def wrong_rank(weights):
    weights["blocks.1.att.w1"] = torch.zeros(32, 7)


def wrong_heads(weights):
    for layer in range(3):
        weights[f"blocks.{layer}.att.r_k"] = torch.zeros(5, 8)


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


def pile(weights):
    weights["blocks.0.ffn.receptance.weight"] = torch.zeros(32, 32)


REFUSALS = {
    missing: r"lacks tensors of RWKV-7: blocks\.1\.att\.w1, ln_out\.bias",
    block_gap: r"has 2 blocks but none with the number 1",
    unknown: r"has tensors that RWKV-7 does not know: blocks\.2\.att\.time_state",
    second_ln0: r"does not know: blocks\.1\.ln0\.weight",
    wrong_matrix: r"blocks\.1\.att\.key\.weight has shape \(32, 33\).* \(A, C\) = \(32, 32\)",
    wrong_vector: r"blocks\.2\.att\.x_r has shape \(1, 1, 31\).* \(1, 1, 32\)",
    wrong_rank: r"blocks\.1\.att\.w1 has shape \(32, 7\).* \(C, Rw\) = \(32, 5\)",
    wrong_heads: r"5 heads of size 8, the attention width is 32",
    folded_embedding: r"emb\.weight has ln0 folded in",
    twice: r"emb\.weight twice",
    preconverted: r"converted by the `rwkv` package.*_strategy",
    optimizer: r"'optimizer' is not a tensor",
    no_model: r"no official tensor names",
    pile: r"does not know: blocks\.0\.ffn\.receptance\.weight",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__)
def test_refusals_name_file_and_culprit(spoil, tmp_path):
    weights = random_official_rwkv7()
    spoil(weights)
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=REFUSALS[spoil]) as error:
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    assert str(error.value).startswith(f"{tmp_path / 'model.pth'}: ") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix, tmp_path):
    whole = save(random_official_rwkv7(L=1), tmp_path / f"whole{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"cut{suffix}: ") as error:
            convert(cut, tmp_path / "hub", tokenizer=False)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "hub").exists()


def test_flipped_bit_in_a_pth_is_noticed(tmp_path):
    weights = random_official_rwkv7(L=1)
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
    weights = random_official_rwkv7(L=1) | {"blocks.0.att.x_r": Malicious(tmp_path / "pwned")}
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
    weights = random_official_rwkv7()
    weights["blocks.1.att.w0"][0, 0, 3] = float("nan")
    weights["blocks.2.ffn.key.weight"][:2, 0] = float("inf")
    save(weights, tmp_path / "model.pth")
    expected = r"NaN or infinite values in blocks\.1\.att\.w0 \(1\), blocks\.2\.ffn\.key\.weight \(2\)"
    with pytest.raises(CheckpointError, match=expected):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False, check=True)
    assert not (tmp_path / "hub").exists()


def test_check_notices_a_wrong_conversion(tmp_path, monkeypatch):
    """The comparison is between programs, not between tables: exchange two mixes in the table and it fails."""
    rows = list(GENERATIONS["7"].rows)
    k, v = (next(i for i, row in enumerate(rows) if row.official == f"blocks.*.att.x_{x}") for x in "kv")
    rows[k], rows[v] = rows[k]._replace(ours=rows[v].ours), rows[v]._replace(ours=rows[k].ours)
    monkeypatch.setitem(GENERATIONS, "7", GENERATIONS["7"]._replace(rows=tuple(rows)))
    save(random_official_rwkv7(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="logits differ"):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_hub_folders_that_cannot_become_official(tmp_path):
    save(random_official_rwkv7(), tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    with pytest.raises(CheckpointError, match="loads without conversion"):
        convert(tmp_path / "hub", tmp_path / "hub2")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    for change, message in {
        "group_norm_eps": "group_norm_eps 0.001 cannot be kept",
        "model_type": "model_type rwkv, which has no official layout",
    }.items():
        changed = config | {change: {"group_norm_eps": 1e-3, "model_type": "rwkv"}[change]}
        (tmp_path / "hub/config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    (tmp_path / "hub/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"hub: its config\.json cannot be used"):
        convert(tmp_path / "hub", tmp_path / "back.pth", to="pth")
    assert not (tmp_path / "back.pth").exists()


def test_destination_is_never_overwritten(tmp_path):
    save(random_official_rwkv7(L=1), tmp_path / "model.pth")
    (tmp_path / "hub").mkdir()
    (tmp_path / "file.pth").write_text("precious")
    for name, to in (("hub", "hf"), ("file.pth", "pth")):
        with pytest.raises(CheckpointError, match=f"{name}: exists already"):
            convert(tmp_path / "model.pth", tmp_path / name, to=to, tokenizer=False)
    assert (tmp_path / "file.pth").read_text() == "precious" and not list((tmp_path / "hub").iterdir())
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        convert(tmp_path / "model.pth", tmp_path / "nowhere" / "hub", tokenizer=False)


def test_full_disk(tmp_path, monkeypatch):
    save(random_official_rwkv7(L=1), tmp_path / "model.pth")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: _Usage(1000))
    with pytest.raises(CheckpointError, match=r"GB are needed, 0\.0 GB are free"):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(CheckpointError, match=r"hub: cannot be written .*No space left"):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


class _Usage:
    def __init__(self, free):
        self.free = free


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """A `.pth` of 300 MB, written a tensor at a time."""
    L, C = 12, 1024
    path = tmp_path_factory.mktemp("large") / "model.pth"
    small = random_official_rwkv7(L=L, C=2, N=2, V=64, F=8, dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in small.items():
        shape = tuple({2: C, 8: 4 * C}.get(size, size) for size in tensor.shape)
        if name.endswith("r_k"):
            shape = (C // 64, 64)
        tensors[name] = LazyTensor(
            shape, torch.bfloat16, lambda shape=shape: torch.full(shape, 0.5, dtype=torch.bfloat16)
        )
    write_pth(path, tensors)
    return path


CONVERT = """
import resource, sys
from wkv.checkpoints import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, *destinations = sys.argv[1:]
for destination in destinations:
    convert(source, destination, to="pth" if destination.endswith(".pth") else "hf", tokenizer=False)
    source = destination
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def start_conversion(*paths):
    command = [sys.executable, "-c", CONVERT, *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_memory_does_not_grow_with_the_model(large_checkpoint, tmp_path):
    process = start_conversion(large_checkpoint, tmp_path / "hub", tmp_path / "back.pth")
    megabytes, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    # The file has 300 MB, its largest tensor 8 MB.
    assert (tmp_path / "back.pth").stat().st_size > 300e6
    assert int(megabytes) < 60


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_interrupted_conversion_leaves_no_destination(stop, large_checkpoint, tmp_path):
    process = start_conversion(large_checkpoint, tmp_path / "hub")
    partial = tmp_path / "hub.partial" / "model.safetensors"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 1e6) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(stop)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "hub").exists()
    if stop == signal.SIGKILL:
        with pytest.raises(CheckpointError, match=r"hub\.partial: exists.*remove it"):
            convert(large_checkpoint, tmp_path / "hub", tokenizer=False)
    else:
        assert not list(tmp_path.iterdir())
