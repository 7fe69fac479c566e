"""The command `wkv` as a person runs it: exit codes, what goes to which stream, what is left on disk.

What concerns the process itself runs in one of its own; the rest calls the entry point, for importing torch takes
longer than a test.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import COMMAND, PLAIN, assert_refused, process, wkv
from conftest import busy_model
from oracle.official import random_official_rwkv7

from wkv.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer of bytes and a few longer pieces."""
    path = tmp_path_factory.mktemp("model")
    busy_model("rwkv7", vocab_size=320).save_pretrained(path)
    build_tokenizer(pieces=[b" the", b"\n\n", b"User", "é".encode()]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "model.pth"
    torch.save(random_official_rwkv7(dtype=torch.bfloat16, layer0_v=True), path)
    return path


def test_help_does_not_load_torch():
    result = process("--help")
    assert result.returncode == 0
    for command in ("info", "convert", "tokenizer", "generate", "chat", "demo"):
        assert command in result.stdout
    loaded = "import sys, wkv.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0


def test_no_command_shows_the_help():
    result = wkv()
    assert "generate" in result.stdout and result.stderr == ""


def test_info_tells_versions_and_backends():
    from wkv_kernels import info

    result = wkv("info")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    assert info()["isa"] in result.stdout
    assert "op wkv7" in result.stdout


def test_info_without_kernels():
    result = process("info", command=PLAIN)
    assert result.returncode == 0
    assert "plain PyTorch" in result.stdout and "compiled" not in result.stdout


def test_generate_agrees_with_plain_pytorch(folder):
    arguments = ("generate", folder, "-", "--max-new-tokens", 40, "--temperature", 0, "--dtype", "float32")
    compiled = process(*arguments, input="Hello the")
    plain = process(*arguments, input="Hello the", command=PLAIN)
    assert compiled.returncode == plain.returncode == 0, compiled.stderr + plain.stderr
    assert compiled.stdout.startswith("Hello the") and len(compiled.stdout) > len("Hello the\n")
    assert compiled.stdout == plain.stdout
    for word in ("40 tokens", "tok/s", "kernel compiled", "peak memory"):
        assert word in compiled.stderr
    assert len(compiled.stderr.strip().splitlines()) == 1
    assert "kernel plain PyTorch" in plain.stderr


def test_generate_repeats_with_a_seed(folder):
    arguments = ("generate", folder, "Hello", "--max-new-tokens", 20, "--seed")
    first = wkv(*arguments, 7)
    assert first.returncode == 0, first.stderr
    assert first.stdout == wkv(*arguments, 7).stdout != wkv(*arguments, 8).stdout


def test_generate_stops_before_a_stop_string(folder):
    arguments = ("generate", folder, "Hello", "--max-new-tokens", 40, "--temperature", 0)
    whole = wkv(*arguments).stdout
    stop = whole[len("Hello") + 5 : len("Hello") + 7]
    cut = wkv(*arguments, "--stop", stop).stdout
    assert cut == whole[: whole.index(stop, len("Hello"))] + "\n"


def test_demo_compares_with_plain_pytorch(folder, monkeypatch):
    monkeypatch.setattr("wkv.commands.demo_model_path", lambda: folder)
    same = wkv("demo", "--max-new-tokens", 12)
    assert same.returncode == 0, same.stderr
    assert "kernel compiled" in same.stderr and "kernel plain PyTorch" in same.stderr
    assert same.stderr.endswith("Both wrote the same text.\n")
    monkeypatch.setattr("wkv.commands.WITHOUT_KERNELS", "import sys; print('else'); print('speed', file=sys.stderr)")
    other = wkv("demo", "--max-new-tokens", 12)
    assert other.returncode == 1 and "differ" in other.stderr and "else" in other.stderr


def test_convert_there_and_back_is_bit_identical(official, tmp_path):
    hub, back = tmp_path / "hub", tmp_path / "back.pth"
    there = wkv("convert", official, hub, "--no-tokenizer", "--check")
    assert there.returncode == 0, there.stderr
    assert "difference" in there.stdout and str(hub) in there.stdout
    assert wkv("convert", hub, back, "--to", "pth").returncode == 0
    before, after = torch.load(official, weights_only=True), torch.load(back, weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_tokenizer_build_writes_a_folder_that_loads(tmp_path):
    from transformers import AutoTokenizer

    result = wkv("tokenizer", "build", tmp_path / "world", "--chat-template", "g1")
    assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "world")
    assert tokenizer("Hello world").input_ids == [33155, 40213] and "enable_thinking" in tokenizer.chat_template
    result = wkv("tokenizer", "build", tmp_path / "20b", "--20b")
    assert result.returncode == 0 and result.stdout.endswith("50277 ids\n"), result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "20b")
    assert tokenizer("Hello world").input_ids == [12092, 1533] and "Alice" in tokenizer.chat_template


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate"], ["folder"]),
        (["generate", "x", "y", "--top-p", "7"], ["--top-p"]),
        (["generate", "x", "y", "--dtype", "int3"], ["--dtype"]),
        (["paint"], ["paint"]),
        (["generate", "/no/such/folder", "Hi"], ["/no/such/folder"]),
        (["chat", "/no/such/folder"], ["/no/such/folder"]),
        (["convert", "/no/such/file.pth", "out"], ["/no/such/file.pth"]),
        (["tokenizer", "build", "out", "--vocab", "/no/such/vocab.txt"], ["/no/such/vocab.txt"]),
        (["tokenizer", "build", "out", "--vocab", "/no/such/vocab.json"], ["/no/such/vocab.json"]),
        (["tokenizer", "build", "out", "--chat-template", "chatml"], ["chatml"]),
        (["tokenizer", "build", "out", "--20b", "--vocab", "x"], ["--20b", "--vocab"]),
    ],
    ids=lambda value: "-".join(value).replace("/", "_")[:40],
)
def test_bad_arguments_are_refused_in_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(wkv(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["truncated", "missing tensor", "no config", "bad config", "no weights", "no tokenizer"]
)
def test_bad_folders_are_refused_in_one_line(damage, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    weights, culprit = bad / "model.safetensors", str(bad)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "missing tensor":
        tensors, culprit = load_file(weights), "model.layers.1.attn.k_k"
        del tensors[culprit]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "no config":
        (bad / "config.json").unlink()
    elif damage == "bad config":
        (bad / "config.json").write_text("{")
    elif damage == "no weights":
        weights.unlink()
    else:
        for path in bad.glob("*token*"):
            path.unlink()
    assert_refused(wkv("generate", bad, "Hi"), culprit)


def test_a_refusal_is_all_that_a_process_says(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"not weights")
    assert_refused(process("generate", tmp_path / "bad", "Hi"), "model.safetensors")


def test_an_empty_prompt_is_refused(folder):
    assert_refused(wkv("generate", folder, input=""), "prompt")


def test_a_refused_conversion_leaves_nothing_behind(official, tmp_path):
    tensors = torch.load(official, weights_only=True)
    tensors["blocks.1.att.k_k"][..., 3] = float("nan")
    source = tmp_path / "nan.pth"
    torch.save(tensors, source)
    assert_refused(wkv("convert", source, tmp_path / "hub", "--no-tokenizer", "--check"), "blocks.1.att.k_k", "nan.pth")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    assert_refused(wkv("convert", official, occupied, "--no-tokenizer"), "occupied")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.pth", "occupied"]
    assert list(occupied.iterdir()) == []


def test_ctrl_c_ends_quietly(folder):
    command = [*COMMAND, "generate", str(folder), "Hello", "--max-new-tokens", "1000000", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.read(len("Hello") + 20)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_ends_it_quietly(folder):
    command = [*COMMAND, "generate", str(folder), "Hello", "--max-new-tokens", "1000000", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.read(len("Hello") + 20)
        running.stdout.close()
        errors = running.stderr.read()
    assert running.returncode == 1 and errors == ""
