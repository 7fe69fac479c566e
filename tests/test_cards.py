"""Cards of models: what they say is what the folder and the results files say, and their code runs as it stands."""

import json
import re
from pathlib import Path

import pytest
from conftest import busy_model
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.utils import yaml_dump
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification
from yaml import safe_load

import wkv
from wkv.cards import TEMPLATE, evaluation_files, make_card
from wkv.results import weights_sha256
from wkv.vocabulary import build_tokenizer

ROOT = Path(__file__).parents[1]
NAMES = {"rwkv": "RWKV-4", "rwkv5": "RWKV-5", "rwkv6": "RWKV-6", "rwkv7": "RWKV-7"}
KNOWN = {"licence": "apache-2.0"}
# Of the kinds that lm-eval writes: a group with a task, a task whose data are files here, one whose data the Hub has.
RESULTS = {
    "results": {
        "state_recall": {"alias": "state_recall", "acc,none": 0.5123456, "acc_stderr,none": 0.01},
        "state_recall_1k": {"alias": " - 1k", "acc,none": 0.5123456, "acc_stderr,none": 0.01},
        "bits_per_byte_speeches": {"bits_per_byte,none": 1.5579876, "bits_per_byte_stderr,none": "N/A"},
        "lambada_openai": {"perplexity,none": 4.133, "perplexity_stderr,none": 0.08, "acc,none": 0.6932},
        "gsm8k": {"exact_match,strict-match": 0.125, "exact_match,flexible-extract": 0.25},
    },
    "group_subtasks": {"state_recall": ["state_recall_1k"]},
    "configs": {
        "state_recall_1k": {"dataset_path": "json", "dataset_kwargs": {"data_files": "/home/me/data.jsonl"}},
        "bits_per_byte_speeches": {"dataset_path": "json", "test_split": "test"},
        "lambada_openai": {
            "dataset_path": "EleutherAI/lambada_openai",
            "dataset_name": "default",
            "test_split": "test",
        },
        "gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"},
    },
    "versions": {"state_recall": 1.0, "state_recall_1k": 1.0, "bits_per_byte_speeches": 1.0, "lambada_openai": 1.0}
    | {"gsm8k": 3.0},
    "n-shot": {"state_recall": 0, "state_recall_1k": 0, "lambada_openai": 0, "gsm8k": 5},
    "n-samples": {
        "state_recall_1k": {"original": 2000, "effective": 100},
        "bits_per_byte_speeches": {"original": 5, "effective": 5},
        "lambada_openai": {"original": 5153, "effective": 5153},
        "gsm8k": {"original": 1319, "effective": 1319},
    },
    "higher_is_better": {
        "state_recall": {"acc": True},
        "state_recall_1k": {"acc": True},
        "bits_per_byte_speeches": {"bits_per_byte": False},
        "lambada_openai": {"perplexity": False, "acc": True},
        "gsm8k": {"exact_match": True},
    },
    "date": 1795352707.8,
    "lm_eval_version": "0.4.13",
    "model_name": "model",
}


def write_results(folder: Path, name: str = "results.json", **changes) -> Path:
    """A results file of the model in the folder, beside it."""
    run = {"model": "model", "model_sha256": weights_sha256(folder), "command": "wkv eval model --seed 1"}
    run |= {"tokens_asked": 9000, "tokens_computed": 3000, "seconds": 12.3}
    path = folder.parent / name
    path.write_text(json.dumps(RESULTS | {"wkv": run} | changes))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a small model of each generation by its type, made when it is asked for."""
    made = {}

    def folder_of(model_type: str) -> Path:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            busy_model(model_type, vocab_size=257).save_pretrained(folder)
            build_tokenizer(pieces=[bytes([i]) for i in range(256)]).save_pretrained(folder)
            made[model_type] = folder
        return made[model_type]

    return folder_of


@pytest.fixture(scope="module")
def folder(models):
    return models("rwkv7")


def load(card: str, tmp_path: Path) -> ModelCard:
    """The card as anyone reads it; nothing of the template is left, and the metadata are as they were written."""
    assert not re.search(r"\{\{|\{%|\bNone\b|\n\n\n", card)
    ModelCard(card).save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert safe_load(yaml_dump(loaded.data.to_dict())) == safe_load(card.split("---\n")[1])
    return loaded


def rows(card: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_the_template_is_the_one_in_model_cards():
    assert (ROOT / "model_cards" / "template.md").samefile(TEMPLATE)


def test_facts_are_those_of_the_model(models, model_type, tmp_path):
    folder = models(model_type)
    (folder / "curves.png").touch()
    model = busy_model(model_type, vocab_size=257)
    command = "python recipes/pretrain.py --output_dir runs/small"
    card = make_card(
        folder,
        "me/small",
        licence="Apache-2.0",
        base_model="RWKV/base",
        language=["en", "zh"],
        data=["EleutherAI/pile", "speeches"],
        training_command=command,
        notes="For tests.",
    )
    data = load(card, tmp_path).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en", "zh"], "transformers")
    assert (data.pipeline_tag, data.base_model, data.datasets) == ("text-generation", "RWKV/base", ["EleutherAI/pile"])
    assert set(data.tags) == {"rwkv", model_type}
    facts, config = dict(row for row in rows(card) if len(row) == 2), model.config
    assert facts["architecture"].startswith(NAMES[model_type])
    assert facts["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert facts["weights"].startswith("float32")
    assert (facts["layers"], facts["width"]) == (str(config.num_hidden_layers), str(config.hidden_size))
    heads = f", {config.num_heads} heads of 16" if model_type != "rwkv" else ""
    assert facts["time-mix width"] == f"{config.attention_hidden_size}{heads}"
    assert (facts["channel-mix width"], facts["vocabulary"]) == (str(config.intermediate_size), "257 embeddings")
    assert facts["trained length"] == "64 tokens" and "(64 tokens)" in card
    assert ("its own `rwkv`" in card) == (model_type == "rwkv")
    for text in (command, "![curves.png](curves.png)", "For tests.", "User: Who are you?\n\nAssistant:", "speeches"):
        assert text in card


def test_scores_are_those_of_the_file(folder, tmp_path):
    card = make_card(folder, "me/small", **KNOWN, results=[write_results(folder)])
    told = {(result.metric_name, result.metric_value) for result in load(card, tmp_path).data.eval_results}
    wanted, table = set(), set()
    for task, metrics in RESULTS["results"].items():
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if comma and not name.endswith("_stderr"):
                metric = name if filtered == "none" else f"{name} ({filtered})"
                shots = RESULTS["n-shot"].get(task)
                part = ", 100 of 2,000 documents" if task == "state_recall_1k" else ""
                wanted.add((f"{task} {metric}" + ("" if shots is None else f", {shots}-shot") + part, value))
                error = metrics.get(f"{name}_stderr,{filtered}")
                interval = f" ± {1.96 * error:.4f}" if isinstance(error, float) else ""
                arrow = "↑" if RESULTS["higher_is_better"][task][name] else "↓"
                table.add((task, f"{metric} {arrow}", f"{value:.4f}{interval}"))
    assert told == wanted
    found = {(row[0], row[3], row[4]) for row in rows(card) if len(row) == 5 and row[0] in RESULTS["results"]}
    assert found == table
    assert "100 of 2,000" in card and "Measured 2026-11-22 by `wkv eval model --seed 1` with lm-eval 0.4.13" in card
    assert "9,000 tokens asked for, 3,000 computed in 12 s" in card


def test_datasets_are_the_hubs_or_the_tasks_own_names(folder, tmp_path):
    card = make_card(folder, "me/small", **KNOWN, results=[write_results(folder)])
    data = load(card, tmp_path).data
    places = {r.dataset_name: (r.dataset_type, r.dataset_config, r.dataset_split) for r in data.eval_results}
    assert places == {
        "state_recall": ("state_recall", None, None),
        "state_recall_1k": ("state_recall_1k", None, None),
        "bits_per_byte_speeches": ("bits_per_byte_speeches", None, "test"),
        "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
        "gsm8k": ("openai/gsm8k", "main", "test"),
    }
    assert {result.metric_type for result in data.eval_results} == set(data.metrics)
    assert data.metrics == ["accuracy", "bits_per_byte", "exact_match", "perplexity"]
    assert "/home" not in card and str(folder.parent) not in card


def test_leaderboards_get_whole_tasks_of_theirs(folder):
    files = evaluation_files([write_results(folder)])
    assert list(files) == [".eval_results/gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(safe_load(files[".eval_results/gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 12.5)
    assert entry.date == "2026-11-22T13:05:07Z" and entry.notes.startswith("exact_match (strict-match), 5-shot")
    part = RESULTS["n-samples"] | {"gsm8k": {"original": 1319, "effective": 20}}
    assert evaluation_files([write_results(folder, "part.json", **{"n-samples": part})]) == {}
    assert evaluation_files([]) == {}


def save_adapter(kind: str, base: Path, folder: Path) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM") if kind == "lora" else wkv.StateTuningConfig()
    model = get_peft_model(busy_model("rwkv6", vocab_size=257), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_adapters(models, kind, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(kind, models("rwkv6"), folder)
    card = make_card(folder, "me/adapter", **KNOWN, base_model="RWKV/base")
    data = load(card, tmp_path).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("RWKV/base", "adapter", "peft")
    assert data.tags == ["rwkv", {"lora": "lora", "state": "state-tuning"}[kind]]
    facts = dict(row for row in rows(card) if len(row) == 2)
    if kind == "lora":
        assert (facts["rank"], facts["alpha"]) == ("4", "8")
        assert facts["targets"] == "gate, key, output, receptance, value"
    else:
        assert facts["method"].startswith("state tuning") and "`time_state.pth`" in card
        # 3 layers, 4 heads of 16.
        assert facts["trained parameters"] == f"{3 * 4 * 16 * 16:,}"
    with pytest.raises(ValueError, match=r"base_model_name_or_path.*is the folder"):
        make_card(folder, "me/adapter", **KNOWN)


@pytest.mark.parametrize(
    ("auto_class", "pipeline", "printed"),
    [(AutoModel, "feature-extraction", "tensor(["), (AutoModelForSequenceClassification, "text-classification", "ten")],
)
def test_models_that_write_no_text(auto_class, pipeline, printed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "me" / "it"
    busy_model("rwkv7", auto_class, vocab_size=257).save_pretrained(folder)
    build_tokenizer(pieces=[bytes([i]) for i in range(256)]).save_pretrained(folder)
    card = make_card(folder, "me/it", **KNOWN)
    assert load(card, tmp_path).data.pipeline_tag == pipeline
    for text in ("generate", "CausalLM", "wkv chat", "writes what is probable", "apply_chat_template"):
        assert text not in card
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith(printed)


@pytest.mark.parametrize("kind", ["model", "lora", "state"])
def test_the_code_of_a_card_runs(models, kind, tmp_path, monkeypatch, capsys):
    """With `me/it` and `me/base` as folders here, which the auto classes take for the repositories."""
    base, folder = models("rwkv6"), tmp_path / "it"
    if kind == "model":
        folder = base
        card = make_card(base, "me/it", **KNOWN)
    else:
        save_adapter(kind, base, folder)
        card = make_card(folder, "me/it", **KNOWN, base_model="me/base")
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "it").symlink_to(folder)
    (tmp_path / "me" / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("The meaning of life is")


def broken(folder: Path, name: str, text: str) -> Path:
    path = folder.parent / name
    path.write_text(text)
    return path


def numbers(value) -> dict:
    return {"results": RESULTS["results"] | {"state_recall": {"acc,none": value}}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"licence": ""}, ["licence is missing"]),
        ({"licence": None}, ["licence is missing"]),
        ({"licence": "my own"}, ["licence 'my own'", "apache-2.0"]),
        ({"language": ["english"]}, ["language 'english'", "ISO 639"]),
        ({"base_model": "/home/me/base"}, ["base_model", "/home/me/base"]),
        ({"base_model": "../base"}, ["base_model", "../base"]),
        ({"training_command": "python train.py --data /home/me/x.txt"}, ["training_command", "/home/me"]),
        ({"notes": "made in C:\\Users\\me\\x"}, ["notes", "C:\\"]),
        ({"data": ["EleutherAI/pile", "the files of /scratch/texts"]}, ["data", "/scratch/texts"]),
        ({"results": lambda f: broken(f, "cut.json", '{"results": ')}, ["cut.json", "damaged"]),
        ({"results": lambda f: broken(f, "list.json", "[]")}, ["list.json", "results"]),
        ({"results": lambda f: broken(f, "some.json", '{"results": {}}')}, ["some.json", "configs"]),
        ({"results": lambda f: f.parent / "none.json"}, ["none.json", "no such file"]),
        (
            {"results": lambda f: write_results(f, "nan.json", **numbers(float("nan")))},
            ["nan.json", "state_recall.acc,none"],
        ),
        (
            {"results": lambda f: write_results(f, "other.json", wkv={"model": "large", "model_sha256": "f" * 64})},
            ["other.json", "another model", "large"],
        ),
        (
            {"results": lambda f: write_results(f, "named.json", wkv={}, model_name="/home/me/large")},
            ["named.json", "field model_name", "'large'"],
        ),
    ],
)
def test_what_is_wrong_is_named(folder, arguments, words):
    arguments = KNOWN | arguments
    if callable(make := arguments.get("results")):
        arguments["results"] = [make(folder)]
    with pytest.raises(ValueError) as refused:
        make_card(folder, "me/small", **arguments)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_results_by_lm_eval_itself_go_by_name(folder):
    path = write_results(folder, "named.json", wkv={}, model_name="/home/me/model")
    card = make_card(folder, "me/small", **KNOWN, results=[path])
    assert "| lambada_openai |" in card and "/home" not in card
    twice = write_results(folder, "twice.json")
    with pytest.raises(ValueError, match=r"twice.json: field results.state_recall: acc is told by .*named.json too"):
        make_card(folder, "me/small", **KNOWN, results=[path, twice])


def test_folders_of_anything_else_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for text, words in ((None, "is missing"), ("{", "is damaged"), ('{"model_type": "llama"}', "'llama', not rwkv")):
        if text is not None:
            (other / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config.json.*{words}"):
            make_card(other, "me/small", **KNOWN)
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="other"):
        make_card(other, "me/small", **KNOWN)
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (other / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="other: its tokenizer is damaged"):
        make_card(other, "me/small", **KNOWN)
    (other / "config.json").write_text('{"model_type": "rwkv7", "num_hidden_layers": "three"}')
    with pytest.raises(ValueError, match=r"other: its configuration is damaged: .*num_hidden_layers"):
        make_card(other, "me/small", **KNOWN)
    with pytest.raises(ValueError, match="Repo id"):
        make_card(folder, "me/my/small", **KNOWN)


def test_the_shipped_model(tmp_path):
    """Its card by hand tells the facts that one by the template would."""
    folder = wkv.demo_model_path()
    data = load((folder / "README.md").read_text(encoding="utf-8"), tmp_path).data
    made = make_card(folder, "me/demo", licence=data.license)
    by_hand, facts = (folder / "README.md").read_text(encoding="utf-8"), dict(r for r in rows(made) if len(r) == 2)
    assert f"{facts['parameters']} parameters" in by_hand
    for key, text in {"layers": "{} layers", "width": "width {}", "channel-mix width": "channel-mix {}"}.items():
        assert text.format(facts[key]) in by_hand, key
    assert f"{facts['time-mix width'].partition(', ')[2]}" in by_hand
