"""`wkv convert --check`: source and result run on tokens, for every pair of layouts, and a wrong result is noticed."""

import gc
import importlib.util
import logging

import psutil
import pytest
import torch
from checkpoint_cases import FLA, assert_identical_file, save, saved
from oracle.official import random_official

from wkv import checks
from wkv.checkpoints import CheckpointError, convert
from wkv.layouts import GENERATIONS

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")
SOURCES = {version: ["pth", "safetensors", "hf"] + ["fla", "gguf"] * (version in FLA) for version in VERSIONS}
TARGETS = {version: ["hf", "pth"] + ["fla", "gguf"] * (version in FLA) for version in VERSIONS}
PAIRS = [
    (version, source, target)
    for version in VERSIONS
    for source in SOURCES[version]
    for target in TARGETS[version]
    # A folder that `from_pretrained` reads as it is; flash-linear-attention's RWKV-7 is one.
    if not (target == "hf" and (source == "hf" or (version, source) == ("7", "fla")))
]


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """The `rwkv` package collects garbage four times a model: spare it what other tests left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of every version in every layout: paths by (version, layout), and the official tensors."""
    folder, paths, official = tmp_path_factory.mktemp("sources"), {}, {}
    for version in VERSIONS:
        path = folder / f"{version}.pth"
        official[version] = saved(path, **FLA.get(version, dict(version=version)) | dict(L=2))
        paths[version, "pth"] = path
        paths[version, "safetensors"] = save(official[version], path.with_suffix(".safetensors"))
        for layout in SOURCES[version][2:]:
            paths[version, layout] = folder / f"{version}.{layout}"
            convert(path, paths[version, layout], to=layout, tokenizer=False)
    return paths, official


@pytest.mark.parametrize("version, source, target", PAIRS, ids=map("-".join, PAIRS))
def test_every_pair_of_layouts(version, source, target, sources, tmp_path):
    paths, official = sources
    result = tmp_path / f"result.{target}"
    assert convert(paths[version, source], result, to=target, tokenizer=False, check=True) < 1e-4
    if target == "pth":
        assert_identical_file(result, official[version])


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_and_what_the_package_cannot_run(version, tmp_path):
    """Each is compared too: bfloat16, attention of another width, and names with a prefix."""
    for number, arguments in enumerate([dict(dtype=torch.bfloat16), dict(A=48)]):
        weights = random_official(version, L=2, **arguments)
        path = save({"model." + key: tensor for key, tensor in weights.items()}, tmp_path / f"{number}.pth")
        assert convert(path, tmp_path / f"hub{number}", tokenizer=False, check=True) < 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_without_the_package(version, sources, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rwkv" else find_spec(name))
    assert convert(sources[0][version, "pth"], tmp_path / "hub", tokenizer=False, check=True) < 1e-4


MIXES = {"4": "att.time_mix_", "5.2": "att.time_mix_", "6": "att.time_maa_", "7": "att.x_"}


@pytest.mark.parametrize("version, target", [(v, to) for v in MIXES for to in ("hf", "fla") if to in TARGETS[v]])
def test_a_wrong_conversion_is_noticed(version, target, tmp_path, monkeypatch):
    """The comparison is between programs, not between tables: exchange two mixes in the table and it fails."""
    generation, table = GENERATIONS[version], "rows" if target == "hf" else "fla"
    rows = list(getattr(generation, table))
    k, v = (next(i for i, row in enumerate(rows) if row.official == f"blocks.*.{MIXES[version]}{x}") for x in "kv")
    rows[k], rows[v] = rows[k]._replace(ours=rows[v].ours), rows[v]._replace(ours=rows[k].ours)
    wrong = generation._replace(**{table: tuple(rows)})
    monkeypatch.setitem(GENERATIONS, version, wrong)
    monkeypatch.setattr("wkv.layouts.rwkv5", lambda *_: wrong)
    saved(tmp_path / "model.pth", **FLA.get(version, dict(version=version)))
    with pytest.raises(CheckpointError, match="logits differ"):
        convert(tmp_path / "model.pth", tmp_path / "result", to=target, tokenizer=False, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_wrong_file_is_noticed(sources, tmp_path, monkeypatch):
    write = checks.write_pth

    def write_wrong(path, tensors):
        write(path, tensors | {"blocks.1.att.key.weight": tensors["blocks.1.att.value.weight"]})

    monkeypatch.setattr("wkv.checkpoints.write_pth", write_wrong)
    with pytest.raises(CheckpointError, match="logits differ"):
        convert(sources[0]["6", "pth"], tmp_path / "result.pth", to="pth", check=True)
    assert not list(tmp_path.iterdir())


def test_short_memory_is_said(sources, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: psutil._ntuples.svmem(*[1000] * 11))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert convert(sources[0]["7", "pth"], tmp_path / "hub", tokenizer=False, check=True) is None
    assert "not compared: that takes" in caplog.text
