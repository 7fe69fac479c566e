"""How `wkv convert` writes: files as torch writes them, shards, all or nothing, and in the memory of one tensor."""

import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoint_cases import assert_identical, save
from oracle.official import random_official
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wkv import writing
from wkv.checkpoints import CheckpointError, convert
from wkv.tensor_files import LazyTensor, open_checkpoint, write_pth, write_safetensors


def test_pth_variants_that_torch_writes(tmp_path):
    """A state dict, parameters, tensors that share storage or are strided, and the format of before PyTorch 1.6."""
    weights = random_official("7")
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
    weights = random_official("7", dtype=torch.bfloat16, layer0_v=True)
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


def test_shards_and_index(tmp_path, monkeypatch):
    weights = random_official("7")
    save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "one", tokenizer=False)
    monkeypatch.setattr(writing, "SHARD_BYTES", 60_000)
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


def test_destination_is_never_overwritten(tmp_path):
    save(random_official("7", L=1), tmp_path / "model.pth")
    (tmp_path / "hub").mkdir()
    (tmp_path / "file.pth").write_text("precious")
    for name, to in (("hub", "hf"), ("file.pth", "pth")):
        with pytest.raises(CheckpointError, match=f"{name}: exists already"):
            convert(tmp_path / "model.pth", tmp_path / name, to=to, tokenizer=False)
    assert (tmp_path / "file.pth").read_text() == "precious" and not list((tmp_path / "hub").iterdir())
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        convert(tmp_path / "model.pth", tmp_path / "nowhere" / "hub", tokenizer=False)


def test_full_disk(tmp_path, monkeypatch):
    save(random_official("7", L=1), tmp_path / "model.pth")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: _Usage(1000))
    with pytest.raises(CheckpointError, match=r"GB are needed, 0\.0 GB are free"):
        convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_safetensors", full)
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
    small = random_official("7", L=L, C=2, N=2, V=64, F=8, dtype=torch.bfloat16)
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
