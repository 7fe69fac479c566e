"""The preference recipes as users run them, on a tiny model: what they leave behind, resume after a kill, refuse."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_cases
import torch
from conftest import busy_model
from recipe_cases import RECIPES, finish, stop_after
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import wkv

sys.path.insert(0, str(RECIPES))

from data import split

PAIRED = ("dpo", "orpo", "kto", "reward")
# So many that a run is still there when a signal reaches it.
STEPS = 20
SMALL = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "bf16": False, "disable_tqdm": True}
GROUPS = {"num_generations": 2, "problems": 12, "per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    busy_model("rwkv7", vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(wkv.demo_model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """A reward model that likes some answers better than others."""
    folder = tmp_path_factory.mktemp("judge")
    busy_model("rwkv7", AutoModelForSequenceClassification, vocab_size=4096, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(wkv.demo_model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [pair(f"What is {n} and {n}?", f"It is {2 * n}.", f"What is {n}?") for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def labels(pairs) -> Path:
    """The same answers one by one, the chosen ones good and the rejected ones bad."""
    rows = []
    for row in map(json.loads, pairs.read_text().splitlines()):
        for answer, label in (("chosen", True), ("rejected", False)):
            rows.append({"prompt": row["prompt"], "completion": row[answer], "label": label})
    path = pairs.with_name("labels.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def pair(question: str, *answers: str) -> dict[str, list]:
    roles = dict(zip(("prompt", "chosen", "rejected"), ("user", "assistant", "assistant"), strict=True))
    texts = (question, *answers)
    return {name: [{"role": role, "content": text}] for (name, role), text in zip(roles.items(), texts, strict=False)}


def start(recipe: str, output: Path, model: Path, **options) -> subprocess.Popen:
    options = {"output_dir": output, "model_name_or_path": model, "max_steps": 2, **SMALL, **options}
    return recipe_cases.start(recipe, **options)


def results(output: Path, metric: str) -> dict:
    """The scores of a complete run, of which `metric` has changed."""
    values = json.loads((output / "results.json").read_text())
    assert values["before"][metric] != values["after"][metric]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    return values


def margins(model: Path, rows: list[dict]) -> list[float]:
    """How much likelier a token of the chosen answer is, in nats, by the model's logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)

    def mean(question: str, answer: str) -> float:
        start = tokenizer(f"User: {question}\n\nAssistant:")["input_ids"]
        ids = torch.tensor(start + tokenizer(f" {answer}\n\n")["input_ids"])
        likely = model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
        return likely[len(start) - 1 :].mean().item()

    texts = ([row[name][0]["content"] for name in ("prompt", "chosen", "rejected")] for row in rows)
    return [mean(question, chosen) - mean(question, rejected) for question, chosen, rejected in texts]


@pytest.mark.parametrize("recipe", ["dpo", "orpo", "kto"])
def test_recipe_trains_the_whole_model(recipe, tmp_path, tiny, pairs):
    options = {"data": pairs, "held_out": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    printed = finish(start(recipe, tmp_path, tiny, **options))
    assert "'eval_loss'" in printed
    if recipe == "kto":
        # A batch has good and bad answers.
        assert "'rewards/chosen'" in printed and "'rewards/rejected'" in printed
    values = results(tmp_path, "preference_margin")
    assert values["steps"] == 2 and f"{values['after']['preference_margin']:.4f}" in printed
    _, held_out = split([json.loads(line) for line in pairs.read_text().splitlines()], 0.2)
    for model, scores in ((tiny, values["before"]), (tmp_path / "final", values["after"])):
        expected = torch.tensor(margins(model, held_out))
        assert scores["preference_margin"] == pytest.approx(expected.mean().item(), abs=1e-3)
        assert scores["preference_accuracy"] == pytest.approx((expected > 0).float().mean().item())


def test_a_reward_model_is_the_reward_of_grpo(tmp_path, tiny, pairs):
    finish(start("reward", tmp_path / "reward", tiny, data=pairs, use_peft=True, learning_rate=1e-2))
    results(tmp_path / "reward", "margin")
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward" / "merged")
    assert judge.config.num_labels == 1
    options = {"data": pairs, "reward_model": tmp_path / "reward" / "merged", "beta": 0.1, **GROUPS}
    finish(start("grpo", tmp_path / "grpo", tiny, **options))
    results(tmp_path / "grpo", "reward")
    assert "rewards/merged/mean" in (tmp_path / "grpo" / "results.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*PAIRED, "grpo"])
def test_recipe_trains_an_adapter(recipe, tmp_path, tiny, judge, pairs, labels):
    special = {
        "grpo": {"data": pairs, "reward_model": judge, "beta": 0.1, **GROUPS},
        "kto": {"data": labels, "per_device_eval_batch_size": 4},
    }
    options = special.get(recipe, {"data": pairs})
    finish(start(recipe, tmp_path, tiny, use_peft=True, learning_rate=1e-2, **options))
    results(tmp_path, {"grpo": "reward", "reward": "margin", "kto": "loss"}.get(recipe, "preference_margin"))
    adapter = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*PAIRED, "grpo"])
def test_killed_run_ends_as_an_uninterrupted_one(recipe, tmp_path, tiny, judge, pairs):
    """Of GRPO, completions that serve four steps are in use when it is killed."""
    options = {"data": pairs, "max_steps": STEPS, "save_steps": 1}
    if recipe == "grpo":
        options |= {"reward_model": judge, "steps_per_generation": 2, "num_iterations": 2, **GROUPS}
    finish(start(recipe, tmp_path / "whole", tiny, **options))
    assert stop_after(start(recipe, tmp_path / "parts", tiny, **options), 2, signal.SIGINT) == 128 + signal.SIGINT
    assert not (tmp_path / "parts" / "final").exists()
    assert stop_after(start(recipe, tmp_path / "parts", tiny, **options), 2, signal.SIGKILL) == -signal.SIGKILL
    printed = finish(start(recipe, tmp_path / "parts", tiny, **options))
    assert 0 < len(re.findall("{'loss'", printed)) < STEPS - 2
    whole, parts = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    begun = load_file(tiny / "model.safetensors")
    assert any(name in begun and not torch.equal(whole[name], begun[name]) for name in whole)
    whole, parts = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "parts"))
    assert whole["before"] == parts["before"] and whole["after"] == parts["after"]
    # Once more when all is done: no step, the same scores.
    assert "{'loss'" not in finish(start(recipe, tmp_path / "parts", tiny, **options))
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["after"] == whole["after"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PAIRED)
def test_wrong_pairs_are_refused_by_file_and_row(recipe, tmp_path, tiny):
    path = tmp_path / "mine.jsonl"
    bad = {
        "no 'rejected'": pair("Why?", "So."),
        "chosen equals rejected": pair("Why?", "So.", "So."),
        "empty": pair("Why?", "", "So."),
    }
    for reason, row in bad.items():
        path.write_text("\n".join(map(json.dumps, [pair("Who?", "I.", "You."), row])))
        errors = finish(start(recipe, tmp_path / "out", tiny, data=path), code=2)
        (line,) = (line for line in errors.splitlines() if line.startswith(f"{recipe}.py: error: {path}, line 2: "))
        assert reason in line and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_unknown_task_is_refused(tmp_path, tiny):
    errors = finish(start("grpo", tmp_path / "out", tiny, task="chain_of_sums", **GROUPS), code=2)
    assert errors.splitlines()[-1].startswith("grpo.py: error: --task chain_of_sums")
