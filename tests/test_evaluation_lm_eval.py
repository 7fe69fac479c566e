"""lm-eval finds the model `wkv`, by its own command too, and its tasks come out as with `hf`, item by item."""

import json
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from evaluation_cases import assert_same_scores, direct_choices
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_activation import Environment

import wkv
from wkv.evaluation import WkvLM

TASKS = Path(__file__).parents[1] / "eval" / "tasks"
# What a process imports first, before it asks lm-eval for a model.
ORDERS = {
    "wkv-first": "import wkv; assert not {'lm_eval', 'torch'} & sys.modules.keys(); from lm_eval.api import registry",
    "lm_eval-first": "from lm_eval.api import registry; import wkv",
    "models-first": "import lm_eval.models; import wkv; from lm_eval.api import registry",
}
CHECK = """
registry.get_model("dummy")
found = dict(registry.model_registry.items())
assert found["wkv"] == "wkv.evaluation:WkvLM" and {"hf", "vllm"} <= found.keys(), found.keys()
assert "wkv.evaluation" not in sys.modules
"""
# Of the offline tasks, how many documents HFLM is to answer in minutes. The first needles are behind 1,024 tokens.
SHORT = {"mmlu_dev_offline": 24, "last_word_speeches": 24, "niah_single_1_offline": 2, "ruler_vt_offline": 2}
SHORT |= {"ruler_cwe_offline": 2, "ruler_fwe_offline": 2}
LONG = {"bits_per_byte_speeches": 1, "state_recall_1k": 2, "state_recall_4k": 1}
COMMAND = ["run", "--model", "wkv", "--tasks", "tiny", "--limit", "3", "--batch_size", "auto", "--device", "cpu"]


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"The people of the {n} States", "c": [" shall", " do not want", " of"], "a": n % 3} for n in range(6)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    # YAML reads JSON.
    (folder / "tiny.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_registration_is_lazy_in_every_order(order):
    code = f"import sys; {ORDERS[order]}\n{CHECK}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def evaluate(lm, tasks: list[str], folder: Path, **options) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def test_a_task_by_name_and_options(tiny_task):
    """As the command runs it: by the model's name, from a string of arguments."""
    arguments = f"pretrained={wkv.demo_model_path()},dtype=float32,leading_token=True"
    by_name = evaluate(
        "wkv", tasks=["tiny"], folder=tiny_task, model_args=arguments, limit=4, device="cpu", batch_size="auto"
    )
    lm = WkvLM(str(wkv.demo_model_path()), dtype="float32", device="cpu", leading_token=True)
    by_object = evaluate(lm, ["tiny"], tiny_task, limit=4)
    assert by_name["results"] == by_object["results"]
    assert by_name["samples"]["tiny"][0]["filtered_resps"] == by_object["samples"]["tiny"][0]["filtered_resps"]
    assert by_name["n-samples"]["tiny"]["effective"] == 4
    assert 0 < lm.tokens_computed < lm.tokens_asked


def test_chats_as_with_hf(tiny_task):
    lm = WkvLM(str(wkv.demo_model_path()), dtype="float32", device="cpu")
    judge = HFLM(lm.model, tokenizer=lm.tokenizer, max_length=10**6)
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 2, "limit": 2}
    mine, theirs = (evaluate(x, ["tiny"], tiny_task, **options) for x in (lm, judge))
    assert_same_samples(mine, theirs)
    assert mine["samples"]["tiny"][0]["arguments"] == theirs["samples"]["tiny"][0]["arguments"]


def assert_same_samples(mine: dict, theirs: dict) -> None:
    """Answers to every request of every document."""
    assert mine["samples"].keys() == theirs["samples"].keys()
    for task, samples in theirs["samples"].items():
        for a, b in zip(mine["samples"][task], samples, strict=True):
            assert a["arguments"] == b["arguments"]
            if isinstance(b["filtered_resps"][0], str):
                assert a["filtered_resps"] == b["filtered_resps"]
            else:
                assert_same_scores(a["filtered_resps"], b["filtered_resps"])


@pytest.fixture(scope="module")
def shipped():
    return WkvLM(str(wkv.demo_model_path()), dtype="float32", device="cpu")


def offline(lm, documents: dict[str, int]) -> dict:
    """The first documents of tasks, so many of each; of one length where a task has several."""
    samples = {task: list(range(n)) for task, n in documents.items()}
    return evaluate(lm, list(documents), TASKS, samples=samples, metadata={"pretrained": "x"})


def judge(shipped, batch_size: int) -> HFLM:
    return HFLM(shipped.model, tokenizer=shipped.tokenizer, max_length=10**6, batch_size=batch_size)


def test_questions_and_last_words_as_with_hf(shipped):
    documents = {"mmlu_dev_offline": 2, "last_word_speeches": 3}
    assert_same_samples(offline(shipped, documents), offline(judge(shipped, 8), documents))
    assert 0 < shipped.tokens_computed < shipped.tokens_asked


@pytest.fixture(scope="module")
def long_answers(shipped):
    """Of HFLM, which keeps the logits of every token and so reads long texts one at a time."""
    return offline(judge(shipped, 1), LONG)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_offline_tasks_as_with_hf(shipped, long_answers, batch_size):
    lm = WkvLM(shipped.model, shipped.tokenizer, batch_size=batch_size)
    assert_same_samples(offline(lm, SHORT), offline(judge(shipped, batch_size), SHORT))
    assert_same_samples(offline(lm, LONG), long_answers)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("task", ["state_recall_16k", "state_recall_64k"])
def test_texts_too_long_for_hf(shipped, task, batch_size):
    """By the definition of a log-probability, from the state that the context leaves."""
    lm = WkvLM(shipped.model, shipped.tokenizer, batch_size=batch_size)
    (document,) = offline(lm, {task: 1})["samples"][task]
    pairs = [lm._encode_pair(*pair) for pair in document["arguments"]]
    assert all(context == pairs[0][0] for context, _ in pairs) and len(pairs[0][0]) > 15000
    assert_same_scores(document["filtered_resps"], direct_choices(lm.model, pairs[0][0], [ids for _, ids in pairs]))


@pytest.mark.slow
def test_the_command_in_an_activated_environment(tiny_task, tmp_path):
    """`lm_eval run --model wkv` in a process that imports nothing of ours."""
    environment = Environment(tmp_path / "environment")
    command = [
        "-m",
        "lm_eval",
        *COMMAND,
        "--model_args",
        f"pretrained={wkv.demo_model_path()}",
        "--include_path",
        tiny_task,
    ]
    run = environment.run(*command, HF_DATASETS_OFFLINE="1")
    assert run.returncode != 0 and "no model for this name found" in run.stderr + run.stdout
    assert environment.run("-c", "import sys; from wkv.cli import main; sys.exit(main())", "activate").returncode == 0
    run = environment.run(*command, HF_DATASETS_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert "|tiny" in run.stdout.replace(" ", "") and "tokens asked for" in run.stderr
