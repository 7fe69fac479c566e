"""GGUF files: official weights come back bit for bit, models load the same from them, as llama.cpp asks for them."""

import json
import weakref

import numpy as np
import pytest
import torch
from gguf_cases import VERSIONS, assert_identical, by_hand, is_wide, lazy, read, taken_apart, written
from oracle.official import random_official
from transformers import AutoModel, AutoModelForCausalLM

from wkv import gguf_format
from wkv.checkpoints import convert
from wkv.gguf_files import write_gguf
from wkv.gguf_tables import TABLES
from wkv.tensor_files import LazyTensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip_is_bit_identical(version, dtype, tmp_path):
    weights, path = written(version, tmp_path, dtype=dtype)
    assert_identical(read(path), weights)
    types = {name: tensor.dtype for name, tensor in gguf_format.read(path).tensors.items()}
    wide = {name for name in types if any(part in name for part in ("token_embd.", "output.", "key", "value", "gate"))}
    wide |= {name for name in types if "receptance" in name}
    assert types == {name: dtype if name in wide else torch.float32 for name in types}


@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip_of_a_mirror_with_mixed_types(version, tmp_path):
    # Sizes that leave gaps between aligned tensors.
    weights = random_official(version, C=30, N=15, V=41, F=71)
    for number, (name, tensor) in enumerate(weights.items()):
        tensor = tensor.to((torch.float32, torch.bfloat16, torch.float16)[number % 3])
        low_rank = name[-2:] in {"w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"}
        weights[name] = tensor.transpose(-1, -2).contiguous() if low_rank else tensor.squeeze()
    write_gguf(tmp_path / "model.gguf", version, lazy(weights))
    assert_identical(read(tmp_path / "model.gguf"), weights)


def as_llama_cpp_asks(version: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of block 1 after llama.cpp's graphs; numbers of a tensor's axes from the slowest."""
    att = {n.split(".att.")[1]: t for n, t in weights.items() if n.startswith("blocks.1.att.")}
    ffn = {n.split(".ffn.")[1]: t for n, t in weights.items() if n.startswith("blocks.1.ffn.")}
    matrices = [name for name in ("receptance", "key", "value", "gate", "output") if f"{name}.weight" in att]
    block = {f"time_mix_{name}.weight": att[f"{name}.weight"] for name in matrices}
    block |= {f"channel_mix_{name}": t for name, t in ffn.items() if name.endswith(".weight")}
    for leaf in ("weight", "bias"):
        for theirs, ours in {"attn_norm": "ln1", "attn_norm_2": "ln2", "time_mix_ln": "att.ln_x"}.items():
            block[f"{theirs}.{leaf}"] = weights[f"blocks.1.{ours}.{leaf}"]
    if version == "6":
        mixes = [att[f"time_maa_{x}"] for x in ("w", "k", "v", "r", "g")]
        block["time_mix_lerp_x.weight"] = att["time_maa_x"].flatten()
        block["time_mix_w1.weight"] = att["time_maa_w1"].T
        block["time_mix_w2.weight"] = torch.stack([matrix.T for matrix in att["time_maa_w2"]])
        block["time_mix_decay.weight"] = att["time_decay"].flatten()
        block["time_mix_decay_w1.weight"] = att["time_decay_w1"].T
        block["time_mix_decay_w2.weight"] = att["time_decay_w2"].T
        block["time_mix_first.weight"] = att["time_faaaa"]
        block |= {f"channel_mix_lerp_{x}.weight": ffn[f"time_maa_{x}"].flatten() for x in "kr"}
    else:
        mixes = [att[f"x_{x}"] for x in ("r", "w", "k", "v", "a", "g")]
        block |= {f"time_mix_{x}.weight": att[x].flatten() for x in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
        block |= {f"time_mix_{x}.weight": att[x].T for x in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")}
        block["channel_mix_lerp_k.weight"] = ffn["x_k"].flatten()
    block["time_mix_lerp_fused.weight"] = torch.stack(mixes)
    return block


@pytest.mark.parametrize("version", VERSIONS)
def test_tensors_are_as_llama_cpp_asks(version, tmp_path):
    weights, path = written(version, tmp_path)
    found = {name: tensor.read() for name, tensor in gguf_format.read(path).tensors.items()}
    block = {name[6:]: found.pop(name) for name in list(found) if name.startswith("blk.1.")}
    assert_identical(block, as_llama_cpp_asks(version, weights))
    top = {name: found.pop(name) for name in list(found) if not name.startswith("blk.")}
    names = {"token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out"}
    expected = {f"{theirs}.{x}": weights[f"{ours}.{x}"] for theirs, ours in names.items() for x in ("weight", "bias")}
    expected |= {"token_embd.weight": weights["emb.weight"], "output.weight": weights["head.weight"]}
    assert_identical(top, expected)
    assert found.keys() == {f"blk.{number}.{name}" for number in (0, 2) for name in block}


def test_unused_tensors_of_block_0_are_left_out(tmp_path):
    weights, path = written("7", tmp_path, layer0_v=True, ranks=(5, 3, 4, 6))
    unused = {f"blocks.0.att.v{i}": weights.pop(f"blocks.0.att.v{i}") for i in range(3)}
    assert len(unused) == 3
    assert_identical(read(path), weights)
    tensors = gguf_format.read(path).tensors
    assert tensors["blk.0.time_mix_v1.weight"].shape == (3, 32) and tensors["blk.1.time_mix_v1.weight"].shape == (4, 32)
    weights, path = written("7", tmp_path, L=1)
    assert_identical(read(path), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_models_are_those_of_the_official_file(version, dtype, tmp_path):
    weights, _ = written(version, tmp_path, dtype=dtype)
    torch.save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        expected = auto_class.from_pretrained(tmp_path / "hub")
        found = auto_class.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert type(found) is type(expected) and found.dtype == dtype
        assert_identical(found.state_dict(), expected.state_dict())
        found.config._name_or_path = expected.config._name_or_path
        assert found.config.to_dict() == expected.config.to_dict()
    direct = type(expected).from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert_identical(direct.state_dict(), {name: t.float() for name, t in expected.state_dict().items()})
    # A loaded model is saved as any other.
    found.save_pretrained(tmp_path / "again")
    assert_identical(auto_class.from_pretrained(tmp_path / "again").state_dict(), expected.state_dict())


@pytest.mark.parametrize("version", VERSIONS)
def test_conversions_are_compared(version, tmp_path):
    weights = random_official(version, C=64, N=16)
    torch.save(weights, tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "model.gguf", to="gguf", tokenizer=False, check=True) < 1e-4
    assert convert(tmp_path / "model.gguf", tmp_path / "back.pth", to="pth", check=True) < 1e-4
    assert_identical(torch.load(tmp_path / "back.pth"), weights)
    assert convert(tmp_path / "model.gguf", tmp_path / "hub", tokenizer=False, check=True) < 1e-4
    convert(tmp_path / "hub", tmp_path / "again.gguf", to="gguf", tokenizer=False)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_old_files_with_halved_matrices_and_single_mixes(tmp_path):
    """Files of RWKV-6 as llama.cpp's converter made them at first; every second block halves what comes after it."""
    weights, path = written("6", tmp_path, L=5)
    metadata, tensors = taken_apart(path)
    metadata |= {"rwkv6.rescale_every_n_layers": 2, "general.architecture": "rwkv6"}
    for name, (shape, kind, data) in list(tensors.items()):
        block = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if name.endswith(("time_mix_output.weight", "channel_mix_value.weight")):
            halved = np.frombuffer(data, "<f4") / 2 ** (block // 2)
            tensors[name] = shape, kind, halved.astype("<f4").tobytes()
        if name.endswith("time_mix_lerp_fused.weight"):
            del tensors[name]
            for x, mix in zip("wkvrg", np.frombuffer(data, "<f4").reshape(5, -1), strict=True):
                tensors[name.replace("fused", x)] = (1, 1, shape[-1]), 0, mix.tobytes()
    by_hand(tmp_path / "old.gguf", metadata, tensors)
    assert_identical(read(tmp_path / "old.gguf"), weights)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name) for name in ("old.gguf", "model.gguf")]
    assert_identical(models[0].state_dict(), models[1].state_dict())
    assert models[0].config.rescale_every == models[1].config.rescale_every == 6


def quantised(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Q8_0: 32 values share a float16, the step, before 32 signed bytes. Returns data and what the data stand for."""
    rows = values.reshape(-1, 32)
    blocks = np.zeros(len(rows), np.dtype([("step", "<f2"), ("levels", "i1", 32)]))
    blocks["step"] = np.abs(rows).max(1) / 127
    blocks["levels"] = np.clip(np.rint(rows / blocks["step"][:, None].astype("f4")), -127, 127)
    meant = np.array([[np.float32(b["step"]) * np.float32(level) for level in b["levels"]] for b in blocks], "f4")
    return blocks.tobytes(), meant.reshape(values.shape)


@pytest.mark.parametrize("version", VERSIONS)
def test_q8_0_is_read_as_what_it_stands_for(version, tmp_path):
    weights, path = written(version, tmp_path, L=2)
    metadata, tensors = taken_apart(path)
    official = {row.ours: row.official for row in TABLES[f"rwkv{version}"].rows.values()}
    for name, (shape, _, data) in list(tensors.items()):
        block = name.split(".")[1]
        theirs = official.get(name.replace(f".{block}.", ".*.", 1) if name.startswith("blk.") else name, "")
        if is_wide(theirs):
            content, meant = quantised(np.frombuffer(data, "<f4").reshape(shape))
            tensors[name] = shape, 8, content
            weights[theirs.replace("*", block)] = torch.from_numpy(meant)
    by_hand(tmp_path / "q8.gguf", metadata, tensors)
    assert sum(kind == 8 for _, kind, _ in tensors.values()) == {"6": 2 + 2 * 8, "7": 2 + 2 * 6}[version]
    assert_identical(read(tmp_path / "q8.gguf"), weights)
    write_gguf(tmp_path / "dense.gguf", version, lazy(weights))
    for auto_class in (AutoModelForCausalLM, AutoModel):
        names = ("q8.gguf", "dense.gguf")
        models = [auto_class.from_pretrained(tmp_path, gguf_file=name).state_dict() for name in names]
        assert_identical(*models)


def test_tensors_are_read_one_after_the_other(tmp_path):
    alive, most = [], 0

    def counted(tensor: torch.Tensor) -> LazyTensor:
        def read() -> torch.Tensor:
            nonlocal most
            fresh = tensor.clone()
            alive.append(weakref.ref(fresh))
            most = max(most, sum(reference() is not None for reference in alive))
            return fresh

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read)

    write_gguf(tmp_path / "model.gguf", "7", {n: counted(t) for n, t in random_official("7").items()})
    # A stack of six mixes and its parts.
    assert len(alive) > 80 and most <= 7


def test_metadata_is_what_llama_cpp_asks_for(tmp_path):
    _, path = written("6", tmp_path, L=2, C=64, N=16, V=41, F=96, ranks=(3, 5))
    metadata = gguf_format.read(path).metadata
    assert {key.removeprefix("rwkv6."): value for key, value in metadata.items() if key.startswith("rwkv6.")} == {
        "vocab_size": 41,
        "context_length": 1048576,
        "attention.head_count": 0,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
        "wkv.head_size": 16,
        "time_mix_extra_dim": 3,
        "time_decay_extra_dim": 5,
    }
    assert metadata["tokenizer.ggml.model"] == "no_vocab" and "wkv.official_dtypes" not in metadata
    _, path = written("7", tmp_path, dtype=torch.bfloat16)
    metadata = gguf_format.read(path).metadata
    assert metadata["general.file_type"] == 32
    ranks = ("decay", "iclr", "value_residual_mix", "gate")
    assert [metadata[f"rwkv7.attention.{rank}_lora_rank"] for rank in ranks] == [5, 3, 4, 6]
    assert set(json.loads(metadata["wkv.official_dtypes"]).values()) == {"bfloat16"}
