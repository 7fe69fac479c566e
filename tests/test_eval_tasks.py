"""The offline tasks in lm-eval: they load without a network from anywhere, and score right what is right."""

import logging
import math
import re
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import wkv
from wkv.eval_tasks import eval_folder, published_figures, tasks_path

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
# Where lm-eval keeps what we name: reading all of its fifteen thousand tasks takes long.
FAMILIES = ("lambada", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "sciq", "super_glue", "headqa", "mmlu")
RECALL = [f"state_recall_{length}" for length in ("1k", "4k", "16k", "64k")]
# Making the rows of niah_single_1_offline takes a quarter of a minute.
NEEDLES = ["ruler_vt_offline", "ruler_cwe_offline", "ruler_fwe_offline"]
QUICK = ["mmlu_dev_offline", "last_word_speeches", "bits_per_byte_speeches", *RECALL, *NEEDLES]
ALL = [*QUICK, "niah_single_1_offline"]


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(tasks_path()), include_defaults=False)


@pytest.fixture(scope="module")
def tasks(manager, tmp_path_factory):
    """The tasks by name, loaded in a folder that has nothing to do with them, and where the Hub must not be asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setattr("socket.socket.connect", lambda *_: pytest.fail("a task wants the network"))
        return manager.load(QUICK)["tasks"]


def run(model: LM, tasks, limit: int | None = None) -> dict[str, dict]:
    """Results by task; `simple_evaluate` would spend seconds on a description of the machine each time."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    made = lm_eval.evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=False)
    return made["results"]


class Oracle(LM):
    """Answers right: recall from the text of the request alone, the rest from the row."""

    def loglikelihood(self, requests):
        answers = []
        for request in requests:
            context, continuation = request.args
            if asked := re.search(r"(The word of the \w+ is)\Z", context):
                told = re.search(rf"{asked[1]} (\w+)\.", context)[1]
                right = continuation == f" {told}"
            elif "choices" in request.doc:
                right = request.idx == request.doc["answer"]
            else:
                right = continuation.strip().lower() in context.lower()
            answers.append((0.0 if right else -1.0, right))
        return answers

    def loglikelihood_rolling(self, requests):
        return [0.0 for _ in requests]

    def generate_until(self, requests):
        return [" ".join(request.doc["outputs"]) for request in requests]


class Constant(LM):
    """Prefers the first choice, gives every byte half a chance, and says nothing."""

    def loglikelihood(self, requests):
        return [(-float(request.idx), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [-math.log(2) * len(request.args[0].encode()) for request in requests]

    def generate_until(self, requests):
        return ["" for _ in requests]


def test_whoever_answers_right_scores_1(tasks):
    results = run(Oracle(), tasks)
    for name in set(QUICK) - {"bits_per_byte_speeches"}:
        assert results[name]["acc,none"] == 1.0, name
    assert results["last_word_speeches"]["perplexity,none"] == 1.0
    for name in NEEDLES:
        assert [results[name][f"{length},none"] for length in (1024, 2048, 4096)] == [1.0] * 3
    assert [results["bits_per_byte_speeches"][f"{m},none"] for m in ("bits_per_byte", "byte_perplexity")] == [0, 1]


def test_who_always_answers_alike_scores_by_chance(tasks):
    results = run(Constant(), tasks)
    assert abs(results["mmlu_dev_offline"]["acc,none"] - 0.25) < 0.05
    assert [results[name]["acc,none"] for name in RECALL] == [1 / 8] * 4
    assert [results[name]["acc,none"] for name in ("last_word_speeches", *NEEDLES)] == [0] * 4
    assert results["bits_per_byte_speeches"]["bits_per_byte,none"] == pytest.approx(1.0)
    assert results["bits_per_byte_speeches"]["byte_perplexity,none"] == pytest.approx(2.0)


def in_range(results: dict[str, dict]) -> None:
    for name, scores in results.items():
        for key, value in scores.items():
            if key.startswith(("acc,", "1024,", "2048,", "4096,")):
                assert 0 <= value <= 1, (name, key, value)
            elif key.startswith(("perplexity,", "word_perplexity,", "byte_perplexity,")):
                assert value > 1, (name, key, value)


def test_the_shipped_model_runs_them(tasks):
    model = lm_eval.api.registry.get_model("hf")(str(wkv.demo_model_path()), device="cpu", batch_size=2)
    results = run(model, tasks, limit=1)
    assert set(results) == set(QUICK)
    in_range(results)
    # Windows of 512 tokens; with one state through the whole speech the model's card has 1.418.
    assert results["bits_per_byte_speeches"]["bits_per_byte,none"] == pytest.approx(1.425, abs=0.01)


@pytest.mark.slow
def test_the_shipped_model_runs_the_group_in_minutes(manager):
    from wkv.evaluation import WkvLM

    results = run(WkvLM(str(wkv.demo_model_path())), manager.load(["offline"])["tasks"])
    assert set(ALL) == set(results)
    in_range(results)
    assert results["bits_per_byte_speeches"]["bits_per_byte,none"] == pytest.approx(1.5577, abs=0.001)
    assert results["last_word_speeches"]["acc,none"] > 0.1


def members(index, name: str) -> list[str]:
    inner = index[name].cfg["task"]
    return [inner] if isinstance(inner, str) else [task for n in inner for task in members(index, n)]


def test_the_group_offline_has_every_task_of_ours(manager):
    index = manager.task_index
    assert sorted(members(index, "offline")) == sorted(ALL)
    assert sorted(members(index, "state_recall")) == sorted(RECALL)
    assert sorted(members(index, "needle_offline")) == sorted([*NEEDLES, "niah_single_1_offline"])
    files = {path.stem for path in tasks_path().glob("*.yaml")}
    assert files == set(manager.all_tasks) == {*ALL, "offline", "state_recall", "needle_offline", "rwkv_zero_shot"}
    for name in ALL:
        assert index[name].cfg["metadata"]["version"] == 1.0
        assert "dataset_path" not in index[name].cfg


def test_mmlu_dev_asks_as_lm_eval_asks_mmlu(tasks):
    default = LM_EVAL_TASKS / "mmlu" / "default"
    ours, theirs = tasks["mmlu_dev_offline"].config, load_yaml(default / "mmlu_abstract_algebra.yaml")
    assert (ours.doc_to_text, ours.doc_to_choice, ours.doc_to_target) == tuple(
        theirs[key] for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
    )
    task = tasks["mmlu_dev_offline"]
    prompt = task.fewshot_context(task.test_docs()[0], num_fewshot=0)
    assert prompt.startswith(theirs["description"] + "Statement 1 | Every element of a group")
    assert prompt.endswith("\nC. True, False\nD. False, True\nAnswer:")
    assert "few-shot" in ours.metadata["description"]


@pytest.fixture(scope="module")
def theirs():
    paths = [str(LM_EVAL_TASKS / family) for family in (*FAMILIES, "storycloze")]
    return TaskManager(include_path=paths, include_defaults=False).task_index


def test_the_suite_of_the_papers_is_made_of_lm_evals_tasks(manager, theirs):
    group = manager.task_index["rwkv_zero_shot"].cfg
    assert len(group["task"]) == 13 and set(group["task"]) <= set(theirs)
    # A mean over different metrics of different tasks would mean nothing.
    assert set(group) == {"group", "task", "metadata"}


def test_published_figures_can_be_found_in_results(theirs):
    figures = published_figures()
    required = {"model", "generation", "size", "task", "metric", "value", "source", "status"}
    for figure in figures:
        assert required <= set(figure) <= required | {"num_fewshot", "stderr"}, figure
        assert figure["generation"] in (4, 7) and figure["status"] in ("read", "secondary") and figure["source"]
        cfg = theirs[figure["task"]].cfg
        metrics = cfg.get("metric_list") or cfg["aggregate_metric_list"]
        metric, _, chosen = figure["metric"].partition(",")
        assert chosen == "none" and metric in [m["metric"] for m in metrics]
        assert figure["value"] > 1 if metric == "perplexity" else 0.2 < figure["value"] < 1
    keys = [tuple(figure[k] for k in ("model", "task", "metric", "source")) for figure in figures]
    assert len(keys) == len(set(keys)) == 46
    assert {figure["generation"] for figure in figures} == {4, 7}
    head = (eval_folder() / "published.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(field in head for field in required)
    assert yaml.safe_load(head) is None


def test_without_a_checkout_and_a_wheel_nothing_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr("wkv.eval_tasks.__file__", str(tmp_path / "a" / "b" / "c" / "eval_tasks.py"))
    with pytest.raises(FileNotFoundError, match="the evaluation tasks are missing"):
        tasks_path()
    packaged = tmp_path / "a" / "b" / "c" / "eval" / "tasks"
    packaged.mkdir(parents=True)
    assert tasks_path() == packaged
