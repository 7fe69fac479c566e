"""What `wkv eval` refuses: in one line, before any model is loaded, and with nothing written."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub.constants
import pytest
import yaml
from command_line import assert_refused, process, wkv
from eval_command_cases import save_rwkv, write_tasks
from lm_eval.tasks import TaskManager

from wkv import eval_run, eval_selection
from wkv.results import weights_sha256

RESULTS = {
    "results": {"small_text": {"bits_per_byte,none": 2.0, "bits_per_byte_stderr,none": "N/A"}},
    "configs": {"small_text": {}},
    "versions": {"small_text": 1},
    "n-shot": {"small_text": 0},
    "higher_is_better": {"small_text": {"bits_per_byte": False}},
    "n-samples": {"small_text": {"original": 3, "effective": 3}},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """`model`, `tasks`, and `remote` with a task whose data are on the Hub."""
    path = tmp_path_factory.mktemp("eval")
    save_rwkv(path / "model")
    write_tasks(path / "tasks")
    task = {
        "task": "far_away",
        "dataset_path": "nobody/no-such-data",
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (path / "tasks" / "far_away.yaml").write_text(yaml.safe_dump(task))
    (path / "tasks" / "all.yaml").write_text(yaml.safe_dump({"group": "everything", "task": ["small", "far_away"]}))
    return path


@pytest.fixture
def refused(cases, tmp_path, monkeypatch):
    """Run the command; it must refuse with these words, load nothing and write nothing."""
    monkeypatch.setattr(eval_run, "load_model", None)

    def refused(words: list[str], *models, tasks: str = "small", **options) -> None:
        line = [*models, "--tasks", tasks, "--include-path", cases / "tasks", "--output", tmp_path / "out"]
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        line += [part for pair in pairs for part in pair if part is not None]
        assert_refused(wkv("eval", *line), *words)
        assert not (tmp_path / "out").exists()

    return refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": "0"}, ["--limit 0"]),
        ({"limit": "-3"}, ["--limit -3"]),
        ({"limit": "2.5"}, ["--limit 2.5"]),
        ({"limit": "all"}, ["--limit all"]),
        ({"limit": "nan"}, ["--limit nan"]),
        ({"batch_size": "0"}, ["--batch-size 0"]),
        ({"batch_size": "many"}, ["--batch-size many"]),
        ({"device": "abacus"}, ["--device abacus"]),
        ({"device": "cuda:99"}, ["--device cuda:99"]),
        ({"device": "meta"}, ["--device meta", "computes nothing"]),
        ({"device": "xpu"}, ["--device xpu: "]),
        ({"context_lengths": "512,x"}, ["--context-lengths 512,x"]),
        ({"tasks": " ,"}, ["--tasks"]),
        ({"published": "RWKV-4 Pile 168M"}, ["RWKV-4 Pile 168M", "RWKV-4 Pile 169M"]),
        ({"num_fewshot": "-1"}, ["num-fewshot"]),
        ({"include_path": "nowhere"}, ["nowhere"]),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options(refused, cases, options, words):
    refused(words, cases / "model", **options)


def test_an_unknown_task_and_those_like_it(refused, cases, monkeypatch):
    """Without lm-eval's own tasks, which take it seconds to list; the slow test below has them."""
    short = lambda **options: TaskManager(**options | {"include_defaults": False})  # noqa: E731
    monkeypatch.setattr(eval_selection, "TaskManager", short)
    refused(["no task small_choice;", "small_choices"], cases / "model", tasks="small_text,small_choice")
    refused(["no task zzz;", "lm_eval ls tasks"], cases / "model", tasks="zzz")


@pytest.mark.slow
def test_tasks_of_lm_eval(offline, refused, cases):
    refused(["no task lambada_opena;", "lambada_openai"], cases / "model", tasks="lambada_opena")
    refused(
        ["arc_challenge, arc_easy, boolq", "more: the data are on the Hub"], cases / "model", tasks="rwkv_zero_shot"
    )


@pytest.fixture(autouse=True)
def ask_again():
    eval_selection.why_offline.cache_clear()
    yield
    eval_selection.why_offline.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    """The flags as HF_HUB_OFFLINE=1 sets them; the command may set them, and a test must not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["far_away", "everything", "small_text,far_away"])
def test_a_task_that_needs_the_network_while_offline(offline, refused, cases, name):
    refused(["far_away:", "HF_HUB_OFFLINE", "--tasks offline"], cases / "model", tasks=name)


def test_a_task_that_needs_the_network_while_the_hub_is_away(offline, refused, cases, monkeypatch):
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(["far_away:", "http://127.0.0.1:9 cannot be reached"], cases / "model", tasks="far_away")


@pytest.mark.parametrize("failing", ["raise_for_status", "json"])
def test_an_error_or_a_page_is_not_the_hub(offline, monkeypatch, failing):
    """The reason stays the same once it is known, though the flags are set then."""
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    session = Mock()
    getattr(session.get.return_value, failing).side_effect = ValueError("a page of the proxy")
    monkeypatch.setattr(eval_selection, "get_session", lambda: session)
    for _ in range(2):
        assert "cannot be reached (a page of the proxy)" in eval_selection.why_offline()
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_folders_that_are_no_models(offline, refused, cases, tmp_path):
    refused(["runs/nowhere/final", "no such folder"], "runs/nowhere/final")
    refused(["./nowhere", "no such folder"], "./nowhere")
    refused(["runs/nowhere", "no such folder", "Hub"], "runs/nowhere")
    bare = shutil.copytree(cases / "model", tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    refused(["bare", "no tokenizer", "wkv tokenizer build"], bare)
    one = shutil.copytree(cases / "model", tmp_path / "one")
    whole = (one / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes(whole[:-100])
    refused(["model.safetensors: damaged"], cases / "model", one)
    (one / "model.safetensors").write_bytes(whole)
    (one / "chat_template.jinja").unlink()
    refused(["one: its tokenizer has no chat template"], cases / "model", one, apply_chat_template=None)
    (one / "tokenizer_config.json").write_text("{")
    refused(["one: "], cases / "model", one)
    (bare / "config.json").unlink()
    refused(["bare", "no config.json"], bare)
    empty = shutil.copytree(cases / "model", tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    refused(["empty", "no weights"], empty)
    (empty / "config.json").write_text("{")
    refused(["empty"], empty)
    weights = tmp_path / "model.pth"
    weights.write_bytes(b"")
    refused(["model.pth", "wkv convert"], weights)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for text in ("{", "[]", "{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": "runs/gone/away"}'):
        (adapter / "adapter_config.json").write_text(text)
        refused(["adapter: its base model"], adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    refused(["adapter: its base model cannot be had", "is an adapter too"], adapter)
    # One bad model among good ones is found before the good ones run.
    refused(["bare"], cases / "model", bare)


def save(path: Path, results, **facts) -> Path:
    path.write_text(json.dumps(results | ({"wkv": facts} if facts else {})))
    return path


def test_results_of_another_model(refused, cases, tmp_path):
    digest = weights_sha256(cases / "model")
    path = save(tmp_path / "a.json", RESULTS, model="stranger", model_sha256="0" * 64)
    refused(["a.json", "another model", "stranger", "000000000000", digest[:12]], cases / "model", **{"from": path})
    save(path, RESULTS)
    refused(["a.json", "another model", "unknown"], cases / "model", **{"from": path})
    refused(["--from", "model"], path, **{"from": path})
    refused(["--tasks, --limit, --include-path: there is no model to run"], path, limit=3)
    refused(["--output", "a.json is a file"], path, output=path)


def test_damaged_results(refused, tmp_path):
    refused(["a.json", "no such file"], tmp_path / "a.json")
    whole = json.dumps(RESULTS)
    for text in ("", whole[: len(whole) // 2], "[]", "{}", json.dumps(RESULTS | {"results": [1]})):
        (tmp_path / "a.json").write_text(text)
        refused(["a.json"], tmp_path / "a.json")
    for key in RESULTS:
        save(tmp_path / "a.json", {k: v for k, v in RESULTS.items() if k != key})
        refused(["a.json", key], tmp_path / "a.json")
    save(tmp_path / "a.json", RESULTS | {"versions": {}})
    refused(["a.json", "small_text", "version"], tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{}")
    refused(["a.json"], tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"small_text": 2}}, ["version 1", "2 in"]),
        ({"n-shot": {"small_text": 5}}, ["few-shot examples 0", "5 in"]),
        ({"wkv": {"tasks_sha256": {"small_text": "b" * 64}}}, ["definition aaaaaaaaaaaa", "bbbbbbbbbbbb"]),
    ],
    ids=["version", "few-shot", "definition"],
)
def test_results_that_cannot_stand_side_by_side(refused, tmp_path, change, words):
    first = save(tmp_path / "a.json", RESULTS, tasks_sha256={"small_text": "a" * 64})
    second = tmp_path / "b.json"
    second.write_text(json.dumps(RESULTS | change))
    refused(["small_text", "a.json", "b.json", *words], first, second)


def test_results_of_another_version_than_the_task_has_now(cases, tmp_path, monkeypatch):
    """The new results are kept: they are whole, and not to blame."""
    old = save(tmp_path / "old.json", RESULTS | {"versions": {"small_text": 7}})
    line = ["--tasks", "small_text", "--include-path", cases / "tasks", "--limit", 1, "--context-lengths", ""]
    result = wkv("eval", old, cases / "model", *line, "--output", tmp_path / "out")
    assert result.returncode == 2 and result.stdout == ""
    assert "small_text cannot be compared: version 7 in" in result.stderr.splitlines()[-1]
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


def test_without_lm_eval(cases):
    code = "import sys; sys.modules['lm_eval'] = None; from wkv.cli import main; sys.exit(main())"
    result = process("eval", cases / "model", command=[sys.executable, "-c", code])
    assert_refused(result, "this needs lm_eval: pip install 'wkv[eval]'")
