"""GGUF files: what is damaged, of another model or of unknown meaning is refused in one line that names it."""

import struct

import pytest
import torch
from gguf_cases import by_hand, lazy, taken_apart, written
from oracle.official import random_official
from transformers import AutoModelForCausalLM

from wkv.checkpoints import convert
from wkv.gguf_files import read_gguf, write_gguf
from wkv.tensor_files import CheckpointError
from wkv.vocabulary import build_tokenizer


def llama(metadata, tensors):
    metadata["general.architecture"] = "llama"


def arwkv7(metadata, tensors):
    metadata["general.architecture"] = "arwkv7"


def no_ranks(metadata, tensors):
    del metadata["rwkv7.attention.iclr_lora_rank"]


def epsilon(metadata, tensors):
    metadata["rwkv7.attention.layer_norm_epsilon"] = 1e-6


def unknown(metadata, tensors):
    tensors["blk.1.attn_q.weight"] = (2,), 0, bytes(8)


def wrong_rank(metadata, tensors):
    metadata["rwkv7.attention.iclr_lora_rank"] = 8


def no_gate(metadata, tensors):
    tensors["blk.1.time_mix_lerp_fused.weight"] = (5, 1, 1, 32), 0, bytes(5 * 32 * 4)


def q5(metadata, tensors):
    tensors["blk.1.time_mix_key.weight"] = (32, 32), 6, bytes(32 * 22)


def ragged(metadata, tensors):
    tensors["blk.1.time_mix_key.weight"] = (64, 16), 8, bytes(32 * 34)


REFUSALS = {
    llama: "is a GGUF file of 'llama'; read are rwkv6 and rwkv7",
    arwkv7: "is a GGUF file of 'arwkv7'",
    no_ranks: r"lacks the metadata rwkv7\.attention\.iclr_lora_rank",
    epsilon: "epsilon 1e-06",
    unknown: r"tensor blk\.1\.attn_q\.weight does not belong to rwkv7",
    wrong_rank: r"tensor blk\.0\.time_mix_a1\.weight has shape \(3, 32\); the metadata ask for 256",
    no_gate: r"time_mix_lerp_fused\.weight has shape \(5, 1, 1, 32\); the metadata ask for 192",
    q5: r"tensor blk\.1\.time_mix_key\.weight has the quantisation type Q5_0",
    ragged: r"time_mix_key\.weight of shape \(64, 16\) is said to be Q8_0, in blocks of 32",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__)
def test_refusals_name_file_and_culprit(spoil, tmp_path):
    _, path = written("7", tmp_path)
    metadata, tensors = taken_apart(path)
    spoil(metadata, tensors)
    by_hand(path, metadata, tensors)
    with pytest.raises(CheckpointError, match=REFUSALS[spoil]) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    _, path = written("7", tmp_path, build_tokenizer(pieces=[b"\n\n", b" hello"]), V=300, L=1)
    whole = path.read_bytes()
    for length in [0, 3, 4, 20, 50, 200, 3000, 12000, len(whole) // 2, len(whole) - 1000]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf: truncated or corrupt GGUF file") as error:
            read_gguf(path)
        assert "\n" not in str(error.value)
    for place, damage in ((0, b"GGML"), (4, struct.pack("<I", 1)), (24, b"\xff" * 8), (60, b"\xff" * 40)):
        path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
        with pytest.raises(CheckpointError, match=r"model\.gguf: "):
            read_gguf(path)
    path.write_bytes(whole)
    opened = read_gguf(path).tensors["head.weight"]
    path.write_bytes(whole[:4000])
    with pytest.raises(CheckpointError, match="cut short"):
        opened.read()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")


def test_what_llama_cpp_cannot_run_is_not_written(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"this is RWKV-5\.2; llama\.cpp runs RWKV-6 and RWKV-7"):
        write_gguf(path, "5.2", lazy(random_official("5.2")))
    torch.save(random_official("4"), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth: this is RWKV-4; llama\.cpp"):
        convert(tmp_path / "model.pth", path, to="gguf", tokenizer=False)
    with pytest.raises(CheckpointError, match="attention width 48"):
        write_gguf(path, "7", lazy(random_official("7", A=48)))
    weights = random_official("7")
    with pytest.raises(CheckpointError, match=r"tensor head\.weight is torch\.float64"):
        write_gguf(path, "7", lazy(weights | {"head.weight": weights["head.weight"].double()}))
    with pytest.raises(CheckpointError, match=r"lacks tensors of RWKV-7: ln_out\.bias"):
        write_gguf(path, "7", lazy({name: t for name, t in weights.items() if name != "ln_out.bias"}))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_missing_tensors_are_not_made_up(tmp_path):
    _, path = written("7", tmp_path)
    metadata, tensors = taken_apart(path)
    del tensors["blk.1.time_mix_w1.weight"]
    by_hand(path, metadata, tensors)
    with pytest.raises(ValueError, match=r"lacks tensors .*layers\.1\.attn\.w_lora\.lora\.0\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
