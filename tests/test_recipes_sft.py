"""The supervised recipes, run as their docstrings say on a few rows: what they leave, and what stopping them loses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe_cases
import torch
from peft import AutoPeftModelForCausalLM
from recipe_cases import RECIPES, finish, stop_after
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import wkv
from wkv.models.rwkv_chat_templates import CHAT_TEMPLATES

sys.path.insert(0, str(RECIPES))

STEPS = 6
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": 2,
    "logging_steps": 1,
    "max_length": 128,
    "warmup_steps": 0,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """24 questions with answers of one form."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ["peace", "people", "country", "government", "nation", "congress", "union", "law", "justice", "liberty"]
    with path.open("w") as file:
        for n in range(24):
            first, second = words[n % 10], words[(3 * n + 1) % 10]
            turns = [("user", f"What is {first} {n}?"), ("assistant", f"The {first} is the {second} of our people.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return path


def start(recipe: str, output: Path, rows: Path, **changes) -> subprocess.Popen:
    return recipe_cases.start(recipe, output_dir=output, data=rows, **{**OPTIONS, **changes})


def losses(output: Path) -> list[tuple[int, float]]:
    """Every step's loss, as the last checkpoint remembers them."""
    history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def assert_same_run(expected: Path, actual: Path) -> None:
    assert losses(expected) == losses(actual) and len(losses(expected)) == STEPS
    (weights,) = (expected / "final").glob("*.safetensors")
    a, b = load_file(weights), load_file(actual / "final" / weights.name)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    results = [json.loads((run / "results.json").read_text()) for run in (expected, actual)]
    assert results[0]["before"] == results[1]["before"] and results[0]["after"] == results[1]["after"]


def assert_improved(output: Path) -> dict:
    results = json.loads((output / "results.json").read_text())
    assert results["after"]["loss"] < 0.9 * results["before"]["loss"]
    assert results["steps"] == STEPS and results["tokens_per_second"] > 0 and results["peak_resident_mb"] > 100
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    return results


def leave_unfinished(output: Path) -> None:
    """What kills in the middle of saving leave behind: checkpoints without an end, half a final model."""
    newest = output / "checkpoint-2"
    for number in (5, 30):
        broken = output / f"checkpoint-{number}"
        shutil.copytree(newest, broken)
        (broken / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:1000])
    (output / "checkpoint-5" / "trainer_state.json").unlink()
    (output / "checkpoint-30" / "trainer_state.json").write_text('{"epoch": 1.0, "glob')
    (output / "checkpoint-tmp").mkdir()
    (output / "final.tmp").mkdir()
    (output / "final.tmp" / "model.safetensors").write_bytes(b"half")


def test_sft_killed_between_checkpoints_ends_as_an_uninterrupted_run(tmp_path, rows):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start("sft", whole, rows))
    assert_improved(whole)

    assert stop_after(start("sft", parts, rows), 3, signal.SIGKILL) == -signal.SIGKILL
    assert (parts / "checkpoint-2").exists() and not (parts / "final").exists()
    leave_unfinished(parts)
    log = finish(start("sft", parts, rows))
    assert STEPS - 4 <= log.count("{'loss'") <= STEPS - 2
    assert_same_run(whole, parts)

    groups = torch.load(parts / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=False)["param_groups"]
    assert {group["name"]: group["weight_decay"] for group in groups} == {"matrices": 0.1, "decay": 0, "rest": 0}
    assert [group["initial_lr"] for group in groups] == [3e-4, 6e-4, 3e-4]
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.9, 0.99, 1e-18)}

    tokenizer = AutoTokenizer.from_pretrained(parts / "final")
    model = AutoModelForCausalLM.from_pretrained(parts / "final")
    assert model.dtype == torch.float32 and tokenizer.chat_template
    assert not list(parts.glob("*.tmp*"))


def test_state_tuning_leaves_the_states_in_both_forms(tmp_path, rows):
    finish(start("state_tuning", tmp_path, rows))
    assert_improved(tmp_path)
    official = torch.load(tmp_path / "time_state.pth", weights_only=True)
    adapter = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert len(official) == len(adapter) == 6
    for layer in range(6):
        (S,) = (value for name, value in adapter.items() if f".{layer}." in name)
        assert S.abs().max() > 0
        torch.testing.assert_close(official[f"blocks.{layer}.att.time_state"], S.transpose(1, 2))


def test_lora_by_a_yaml_file_leaves_an_adapter(tmp_path, rows):
    settings = {**OPTIONS, "data": str(rows), "lora_r": 4, "learning_rate": 0.01}
    (tmp_path / "lora.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    command = [
        sys.executable,
        RECIPES / "lora.py",
        "--config",
        tmp_path / "lora.yaml",
        "--output_dir",
        tmp_path / "run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr
    assert_improved(tmp_path / "run")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    ranks = {value.shape[0] for name, value in model.state_dict().items() if "lora_A" in name}
    assert ranks == {4}


@pytest.fixture
def recipe(monkeypatch):
    """Run a recipe in this process, for what needs no process of its own: it imports TRL once."""

    def call(name: str, **options) -> None:
        from importlib import import_module

        arguments = [str(text) for key, value in options.items() for text in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        module = import_module(name)
        module.run(module.main)

    return call


def test_distill_asks_the_teacher_once_for_every_prompt(tmp_path, rows, recipe, capsys):
    options = {**OPTIONS, "max_steps": 2, "prompts": 6, "teacher_tokens": 8, "teacher_batch": 4, "held_out": 0.4}
    options |= {"teacher": wkv.demo_model_path(), "data": rows, "output_dir": tmp_path, "adam_beta2": 0.95}
    answers = tmp_path / f"teacher-{wkv.demo_model_path().name}-8.jsonl"
    recipe("distill", **options)
    complete = answers.read_text()
    assert len(complete.splitlines()) == 6 and (tmp_path / "final" / "model.safetensors").exists()
    groups = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=False)["param_groups"]
    assert len(groups) == 3 and {group["betas"] for group in groups} == {(0.9, 0.95)}
    # A crash leaves a line without an end: it alone is asked for again.
    lines = complete.splitlines(keepends=True)
    kept = json.loads(lines[0])
    kept["messages"][1]["content"] = "Kept."
    answers.write_text(json.dumps(kept) + "\n" + lines[1] + lines[2][:9])
    shutil.rmtree(tmp_path / "checkpoint-2")
    recipe("distill", **options)
    assert answers.read_text() == json.dumps(kept) + "\n" + "".join(lines[1:])
    with pytest.raises(SystemExit) as end:
        answers.write_text("".join(lines[1:]))
        recipe("distill", **options)
    assert end.value.code == 2 and "its prompts are others than those of --data" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_model_or_other_data(tmp_path):
    from recipe import ScoresBefore
    from rows import DataError

    def begin(**changes) -> ScoresBefore:
        run = {"model_name_or_path": "small", "data": ["a.jsonl"], "held_out": 0.1, "seed": 7, "task": "chain_sum"}
        args = SimpleNamespace(output_dir=tmp_path, **{**run, **changes})
        return ScoresBefore(SimpleNamespace(args=args), lambda: {"eval_loss": 2.0})

    start = begin()
    start.on_train_begin(start.trainer.args, SimpleNamespace(is_world_process_zero=True), None)
    assert begin().scores == {"loss": 2.0}
    changes = {"model_name_or_path": "large", "data": ["b.jsonl"], "held_out": 0.2, "seed": 8, "task": "maze"}
    for name, value in {**changes, "teacher": "smollm2"}.items():
        with pytest.raises(DataError, match=f"holds a run with {name} "):
            begin(**{name: value})


def test_a_kill_while_the_old_folder_is_removed_leaves_the_new_one_whole(tmp_path, monkeypatch):
    from checkpoints import new_folder

    def write(text: str) -> None:
        with new_folder(tmp_path / "final") as folder:
            folder.mkdir()
            (folder / "a").write_text(text)
            (folder / "b").write_text(text)

    def killed(folder: Path, **options) -> None:
        if (folder / "a").exists():
            (folder / "a").unlink()
            raise KeyboardInterrupt

    write("old")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        write("new")
    assert [(tmp_path / "final" / name).read_text() for name in "ab"] == ["new", "new"]
    write("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_long_context_wants_steps_that_are_more_than_the_warmup(tmp_path, recipe, capsys):
    for steps, message in ((-1, "--max_steps -1: epochs are not counted here"), (5, "below total_steps=5, got 10")):
        with pytest.raises(SystemExit) as end:
            recipe("long_context", output_dir=tmp_path, max_steps=steps)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, rows, recipe, capsys):
    (tmp_path / "wrong.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"messages": []}\n')
    run = {"output_dir": tmp_path / "run", "data": rows}
    mistakes = [
        ({**run, "learning_rat": 1}, "learning_rat"),
        ({**run, "learning_rate": "fast"}, "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({**run, "config": tmp_path / "wrong.yaml"}, "learning_rat"),
        ({**run, "config": tmp_path / "broken.yaml"}, "broken.yaml"),
        ({**run, "config": tmp_path / "none.yaml"}, "none.yaml"),
        ({**run, "data": bad}, f"{bad}, line 25: empty conversation: 'messages' has no messages"),
        ({**run, "model_name_or_path": tmp_path}, str(tmp_path)),
    ]
    for options, message in mistakes:
        with pytest.raises(SystemExit) as end:
            recipe("sft", **options)
        error = capsys.readouterr().err.strip()
        assert "usage:" not in error and "Traceback" not in error
        error = error.splitlines()[-1]
        assert end.value.code == 2 and error.startswith("sft.py: error: ") and message in error, error
        assert not (tmp_path / "run" / "before.json").exists()


@pytest.mark.parametrize("template", [None, *CHAT_TEMPLATES])
def test_loss_is_on_the_assistants_words_and_the_blank_line_that_ends_them(template):
    tokenizer = AutoTokenizer.from_pretrained(wkv.demo_model_path())
    answers = ["I’m a “bot” — 你好 🎉👍.", "Because I said so."]
    messages = [
        {"role": role, "content": text}
        for answer in answers
        for role, text in (("user", "Wer bist du? 你好 🎉"), ("assistant", answer))
    ]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    if template:
        options["chat_template"] = CHAT_TEMPLATES[template]
    encoded = tokenizer.apply_chat_template(messages, **options)
    kept = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "".join(f" {answer}\n\n" for answer in answers)
    # What the model sees when it is asked is what it saw in training.
    del options["return_assistant_tokens_mask"]
    asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, **options)["input_ids"]
    assert encoded["input_ids"][: len(asked)] == asked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "state_tuning"])
def test_interrupted_and_killed_adapters_end_as_an_uninterrupted_run(tmp_path, rows, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(name, whole, rows))
    assert stop_after(start(name, parts, rows), 1, signal.SIGINT) == 128 + signal.SIGINT
    assert list(parts.glob("checkpoint-*")) and not (parts / "final").exists()
    assert stop_after(start(name, parts, rows), 2, signal.SIGKILL) == -signal.SIGKILL
    finish(start(name, parts, rows))
    assert_same_run(whole, parts)
    # Once more when all is done: no step, the same result.
    shutil.rmtree(parts / "final")
    assert "{'loss'" not in finish(start(name, parts, rows))
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_distill_from_smollm2(tmp_path):
    process = start(
        "distill", tmp_path, Path("chatterbot"), prompts=40, teacher_tokens=24, held_out=0.2, max_length=1024
    )
    finish(process)
    assert_improved(tmp_path)
    answers = [json.loads(line)["messages"][1]["content"] for line in next(tmp_path.glob("teacher-*")).open()]
    assert len(answers) == 40 and len(set(answers)) > 30
