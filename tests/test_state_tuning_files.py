"""Tuned states in files and processes: PEFT's folders through every door, the official file there and back."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import assert_refused
from command_line import wkv as command
from conftest import TINY, assert_close, busy_model, random_ids
from oracle.official import Official, random_official
from oracle.ours import our_model, run
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_registration import PARENT
from test_state_tuning import GREEDY, initial_states, logits, tune
from transformers import AutoModelForCausalLM

import wkv
from wkv.states import continue_from, load_state
from wkv.vocabulary import build_tokenizer

IDS = random_ids(2, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each type a model, an adapter for it, and the logits that they give together."""
    root = tmp_path_factory.mktemp("tuned")
    for model_type in TINY:
        folder = root / model_type
        busy_model(model_type, vocab_size=320).save_pretrained(folder / "base")
        build_tokenizer(pieces=[b" the", b"\n\n", b"User"]).save_pretrained(folder / "base")
        tuned = tune(AutoModelForCausalLM.from_pretrained(folder / "base"))
        tuned.save_pretrained(folder / "adapter")
        save_file({"logits": logits(tuned, IDS), "ids": IDS}, folder / "expected.safetensors")
    return root


@pytest.fixture
def folder(folders, model_type):
    return folders / model_type


def test_the_folder(folder, model_type):
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("RWKV_STATE", "CAUSAL_LM")
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    time_mixes = "model.layers.{}.attn" if model_type == "rwkv7" else "rwkv.blocks.{}.attention"
    names = [f"base_model.model.{time_mixes.format(layer)}.initial_state.rwkv_state_S" for layer in range(3)]
    assert sorted(stored) == names and {x.dtype for x in stored.values()} == {torch.float32}


def with_load_adapter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.load_adapter(folder / "adapter")
    return model


DOORS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter"
    ),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter", low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda folder: AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"),
    "AutoModel": lambda folder: AutoModelForCausalLM.from_pretrained(folder / "adapter"),
    "load_adapter": with_load_adapter,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door(door, folder):
    model = DOORS[door](folder)
    assert torch.equal(logits(model, IDS), load_file(folder / "expected.safetensors")["logits"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if "initial_state" in name)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        assert (logits(model, IDS) - logits(base, IDS)).abs().max() > 0.1


def test_half_precision_loads_float32_states(folder):
    stored = load_file(folder / "adapter" / "adapter_model.safetensors").values()
    for model in (
        AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.bfloat16),
        AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.bfloat16),
    ):
        assert model.dtype == torch.bfloat16
        loaded = [p for name, p in model.named_parameters() if "initial_state" in name]
        assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(loaded, stored, strict=True))


def test_training_goes_on_from_a_folder(folder):
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True
    )
    assert sum(p.requires_grad for p in model.parameters()) == 3
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


USE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in FOLDERS:
    expected = load_file(folder + "/expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder + "/adapter")
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
    from peft import AutoPeftModelForCausalLM, PeftConfig
    assert type(PeftConfig.from_pretrained(folder + "/adapter")).__name__ == "StateTuningConfig"
    with torch.no_grad():
        model = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter")
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
"""
PROCESSES = {
    "wkv alone": "import sys, wkv\nassert 'peft' not in sys.modules" + USE,
    "wkv then peft": "import wkv, peft" + USE,
    "peft then wkv": "import peft, wkv" + USE,
    "the configuration first": "import wkv\nwkv.StateTuningConfig()\nimport peft" + USE,
    "without wkv": """
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(FOLDERS[0] + "/adapter")
except KeyError as error:
    assert error.args == ("RWKV_STATE",), error
else:
    raise AssertionError("it was loaded")
""",
}


def test_fresh_processes(folders):
    names = [str(folders / model_type) for model_type in TINY]
    cases = {name: f"FOLDERS = {names}\n{code}" for name, code in PROCESSES.items()}
    answer = subprocess.run(
        [sys.executable, "-c", PARENT], input=json.dumps([cases, ""]), capture_output=True, text=True, timeout=200
    )
    assert answer.returncode == 0, answer.stderr
    results = dict(map(json.loads, filter(lambda line: line.startswith("["), answer.stdout.splitlines())))
    assert results == dict.fromkeys(PROCESSES, "")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2", "6", "7"])
def test_the_official_file(version, suffix, tmp_path):
    """There and back without losing a bit; a cache and the `rwkv` package that begin with it agree with the adapter."""
    weights, ids, path = random_official(version), random_ids(1, 12, vocab_size=37), tmp_path / f"tuned{suffix}"
    model = our_model(weights)
    zero = logits(model, ids)
    tuned = tune(our_model(weights))
    expected, states = logits(tuned, ids), initial_states(tuned)
    wkv.export_time_state(tuned, path)

    stored = load_file(path) if suffix == ".safetensors" else torch.load(path)
    assert list(stored) == [f"blocks.{layer}.att.time_state" for layer in range(3)]
    assert all(torch.equal(x, S.mT) and x.dtype == torch.float32 for x, S in zip(stored.values(), states, strict=True))

    assert_close(run(model, ids[0].tolist(), [7, 1, 4], load_state(path, model))[0], expected[0])
    package = Official(weights)
    state = package.zero_state()
    state[1::3] = states
    assert_close(package.forward(ids[0].tolist(), state)[0], expected[0])
    assert (expected - zero).abs().max() > 0.1

    again = wkv.import_time_state(path, our_model(weights))
    assert all(map(torch.equal, initial_states(again), states)) and torch.equal(logits(again, ids), expected)
    assert sum(p.requires_grad for p in again.parameters()) == 3
    wkv.export_time_state(again, tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


def test_the_package_agrees_for_rwkv4():
    weights, ids = random_official("4"), random_ids(1, 12, vocab_size=37)
    tuned = tune(our_model(weights))
    package = Official(weights)
    state = package.zero_state()
    state[1::3] = initial_states(tuned)
    assert all((S[:, 1] > 0).all() for S in state[1::3])
    assert_close(package.forward(ids[0].tolist(), state)[0], logits(tuned, ids)[0])


def test_a_file_for_an_adapter_in_use(tmp_path):
    first, second = (tune(busy_model("rwkv6"), seed) for seed in (0, 1))
    wkv.export_time_state(second, tmp_path / "a.pth")
    assert wkv.import_time_state(tmp_path / "a.pth", first) is first
    assert torch.equal(logits(first, IDS), logits(second, IDS))
    with first.disable_adapter(), pytest.raises(ValueError, match="does not tune the states of all layers"):
        wkv.import_time_state(tmp_path / "a.pth", first)


def test_what_no_official_file_can_hold(tmp_path):
    path = tmp_path / "a.pth"
    tuned = tune(busy_model("rwkv7"))
    for model, words in {
        tune(busy_model("rwkv")): "RWKV-4 has no official file",
        busy_model("rwkv7"): "no state is tuned",
        get_peft_model(busy_model("rwkv7"), LoraConfig()): "no state is tuned",
        tune(busy_model("rwkv7"), target_modules=["0.attn.initial_state"]): "that of 1 is not tuned",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            wkv.export_time_state(model, path)
        assert str(path) in str(error.value)
    with tuned.disable_adapter(), pytest.raises(ValueError, match="not active"):
        wkv.export_time_state(tuned, path)
    with pytest.raises(ValueError, match=r"ends in \.pth or \.safetensors"):
        wkv.export_time_state(tuned, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())
    # Of a folder, the base model's configuration tells how many layers there are.
    busy_model("rwkv7").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tune(base, target_modules=["0.attn.initial_state", "1.attn.initial_state"]).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="that of 2 is not tuned"):
        wkv.export_time_state(tmp_path / "two", path)
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"blocks\.0\.att\.time_state is missing"):
        wkv.import_time_state(path, busy_model("rwkv7"))


def test_commands(folders, tmp_path):
    """The state of an adapter's folder becomes a file, and an adapter again; both write the same text."""
    adapter, base, file, again = folders / "rwkv7/adapter", folders / "rwkv7/base", tmp_path / "s.pth", tmp_path / "new"
    done = command("state", "export", adapter, file)
    assert (done.returncode, done.stdout) == (0, f"{file} is written\n"), done.stderr
    done = command("state", "import", file, again, "--model", base)
    assert (done.returncode, done.stdout) == (0, f"{again} is written\n"), done.stderr
    stored = [load_file(path / "adapter_model.safetensors") for path in (adapter, again)]
    assert stored[0].keys() == stored[1].keys() and all(
        torch.equal(x, stored[1][name]) for name, x in stored[0].items()
    )
    assert PeftConfig.from_pretrained(again).base_model_name_or_path == str(base)

    build_tokenizer(pieces=[b" the", b"\n\n", b"User"]).save_pretrained(again)
    options = ["the end", "--max-new-tokens", 12, "--temperature", 0]
    tuned, file_only, plain = (
        command("generate", *arguments, *options) for arguments in ([again], [base, "--state", file], [base])
    )
    assert tuned.returncode == file_only.returncode == 0, tuned.stderr + file_only.stderr
    assert tuned.stdout == file_only.stdout != plain.stdout
    talks = [
        command("chat", *arguments, "--max-new-tokens", 5, "--temperature", 0, input="hello\n")
        for arguments in ([again], [base, "--state", file])
    ]
    assert talks[0].returncode == 0 and talks[0].stdout == talks[1].stdout, talks[0].stderr

    assert_refused(command("state", "export", folders / "rwkv/adapter", tmp_path / "4.pth"), "RWKV-4 has no official")
    assert_refused(command("state", "export", base, tmp_path / "b.pth"), "adapter_config.json")
    assert_refused(command("state", "import", file, tmp_path / "c", "--model", folders / "rwkv/base"), "time_state")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "s.pth"]


@pytest.mark.parametrize("model_type", ["rwkv5", "rwkv6", "rwkv7"])
def test_generating_from_an_exported_file(folder, tmp_path):
    wkv.export_time_state(folder / "adapter", tmp_path / "s.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    cache = load_state(tmp_path / "s.safetensors", base)
    expected = base.generate(**continue_from(cache, IDS), **GREEDY)
    assert torch.equal(tuned.generate(input_ids=IDS, **GREEDY), expected)


def test_the_command_names_a_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "wkv.peft_state", raising=False)
    monkeypatch.delattr(sys.modules["wkv"], "peft_state", raising=False)
    assert_refused(command("state", "export", tmp_path, tmp_path / "state.pth"), "peft", "pip install")
