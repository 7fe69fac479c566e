"""`wkv publish --push` against a stand-in Hub: what is pushed runs elsewhere, and nothing is ever half there."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from command_line import COMMAND, assert_refused, process, wkv
from conftest import TINY, assert_close
from hub_cases import WITH, WITHOUT, download, hub_of_this_process, save_model
from huggingface_hub import CommitOperationAdd
from huggingface_hub.repocard import RepoCard
from stand_in_hub import TOKEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from wkv import demo_model_path
from wkv.results import weights_sha256

REPO = "somebody/tiny"
PUSH = ("--licence", "apache-2.0", "--push")


@pytest.fixture
def hub(tmp_path):
    with hub_of_this_process(tmp_path / "home") as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, "rwkv7")
    return path


def publish(folder, *arguments, repo=REPO):
    result = wkv("publish", folder, repo, *PUSH, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def test_all_generations_run_elsewhere(hub, tmp_path):
    """A fresh process without this package runs the code in the repository; here, our classes load it. Logits and text
    are those of the model that was saved."""
    repos = {model_type: f"somebody/{model_type}" for model_type in TINY}
    models = {model_type: save_model(tmp_path / model_type, model_type) for model_type in TINY}
    for model_type, repo in repos.items():
        publish(tmp_path / model_type, repo=repo)
        assert hub.repos[repo].private
        assert hub.verdicts[-1] == ([], []), "errors and warnings about the card"
    found = download(WITHOUT, tmp_path / "without.pt", *repos.values(), home=tmp_path / "home-1")
    assert found["operators"] == []
    for model_type, repo in repos.items():
        there, model = found[repo], AutoModelForCausalLM.from_pretrained(repo)
        tokenizer = AutoTokenizer.from_pretrained(repo)
        assert all(module.startswith("transformers_modules.somebody.") for module in there["classes"])
        assert type(model) is type(models[model_type]) and type(tokenizer).__module__.startswith("wkv.models.")
        with torch.no_grad():
            expected = models[model_type](found["ids"]).logits
            assert_close(model(found["ids"]).logits, expected, what=model_type)
        assert_close(there["logits"], expected, what=model_type)
        written = model.generate(**tokenizer("Hello 你\n", return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert there["text"] == tokenizer.decode(written[0]) and there["text"].startswith("Hello 你\n")


@pytest.mark.slow
def test_the_shipped_model_in_processes_of_their_own(hub, tmp_path):
    """Pushed by the command, downloaded without this package and with it, where the kernels serve."""
    result = process("publish", demo_model_path(), "somebody/demo", "--push", "--max-shard-size", "4MB")
    assert result.returncode == 0, result.stderr
    assert "published: " in result.stdout and result.stderr == ""
    there = download(WITHOUT, tmp_path / "without.pt", "somebody/demo", home=tmp_path / "home-1")
    here = download(WITH, tmp_path / "with.pt", "somebody/demo", home=tmp_path / "home-2")
    assert there["operators"] == [] and "wkv_kernels.wkv7" in here["operators"]
    there, here = there["somebody/demo"], here["somebody/demo"]
    assert all(module.startswith("transformers_modules.somebody.") for module in there["classes"])
    assert all(module.startswith("wkv.models.") for module in here["classes"][:2])
    assert_close(there["logits"], here["logits"], torch.bfloat16)
    assert there["text"] == here["text"]


def test_what_is_pushed_is_what_is_shown(hub, folder):
    shown = wkv("publish", folder, REPO, "--licence", "apache-2.0")
    assert shown.returncode == 0 and shown.stdout.splitlines()[-1] == "dry run: nothing was sent; --push sends it"
    assert hub.log == []
    pushed = publish(folder)
    assert pushed.stdout.splitlines()[:-1] == shown.stdout.splitlines()[:-1]
    assert pushed.stdout.splitlines()[-1].startswith("published: http")
    files = hub.repos[REPO].files()
    assert all(name in shown.stdout for name in files.keys() - {".gitattributes"})
    assert (
        files["model.safetensors"].is_large
        and files["model.safetensors"].data == (folder / "model.safetensors").read_bytes()
    )
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} < files.keys()
    # Two commits: the one that every repository begins with, and ours.
    assert len(hub.repos[REPO].commits) == 2 == len(hub.sent("POST", "/commit/")) + 1


def test_public_only_when_asked(hub, folder):
    publish(folder)
    assert hub.repos[REPO].private
    publish(folder, "--public", repo="somebody/open")
    assert not hub.repos["somebody/open"].private
    refused = wkv("publish", folder, "somebody/open", *PUSH)
    assert refused.returncode == 2 and "somebody/open exists and is public" in refused.stderr


def test_an_unchanged_folder_makes_no_commit(hub, folder):
    publish(folder)
    head, uploads = hub.repos[REPO].branches["main"], hub.uploads
    again = publish(folder)
    assert again.stdout.splitlines()[-1].startswith("unchanged, no commit made")
    assert hub.repos[REPO].branches["main"] == head and hub.uploads == uploads == 1


def test_revision_and_message(hub, folder):
    publish(folder)
    publish(folder, "--revision", "v2", "--commit-message", "Second", "--language", "en")
    cards = [RepoCard(hub.repos[REPO].files(name)["README.md"].data.decode()).data for name in ("main", "v2")]
    assert [card.get("language") for card in cards] == [None, ["en"]]


def test_an_interrupt_leaves_no_new_revision(hub, folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    publish(folder)
    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", interrupt)
    wkv("publish", folder, REPO, *PUSH, "--revision", "v2")
    assert hub.repos[REPO].branches.keys() == {"main"}


def test_what_is_gone_from_the_folder_goes_from_the_hub(hub, folder, tmp_path):
    """What would be loaded with it; other files of the repository stay."""
    other = shutil.copytree(folder, tmp_path / "tiny")
    (other / ".eval_results").mkdir()
    (other / ".eval_results" / "x.yaml").write_text("- {dataset: {id: a/b, task_id: c}, value: 1.0}")
    (other / "notes.md").write_text("text")
    publish(other)
    gone = {"chat_template.jinja", ".eval_results/x.yaml"}
    before = hub.repos[REPO].files().keys()
    assert gone < before
    for name in (*gone, "notes.md"):
        (other / name).unlink()
    told = publish(other).stdout
    assert hub.repos[REPO].files().keys() == before - gone
    assert all(f"removed on the Hub: {name}\n" in told for name in gone)


def test_new_shards_replace_the_old_weights(hub, folder):
    publish(folder)
    publish(folder, "--max-shard-size", "200KB")
    files = hub.repos[REPO].files()
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors" not in files
    assert set(json.loads(files["model.safetensors.index.json"].data)["weight_map"].values()) == set(shards)
    found, saved = (AutoModelForCausalLM.from_pretrained(source).state_dict() for source in (REPO, folder))
    assert found.keys() == saved.keys() and all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    publish(folder)
    assert [name for name in hub.repos[REPO].files() if "safetensors" in name] == ["model.safetensors"]


def test_a_killed_publish_leaves_the_revision_and_is_resumed(hub, folder, tmp_path):
    publish(folder)
    head = hub.repos[REPO].branches["main"]
    hub.stop_in_upload = hub.uploads + 3
    arguments = ["publish", str(folder), REPO, *PUSH, "--max-shard-size", "100KB"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        assert hub.stopped.wait(60), running.stderr.read()
        running.send_signal(signal.SIGKILL)
    hub.go_on.set()
    assert running.returncode == -signal.SIGKILL
    assert hub.repos[REPO].branches["main"] == head and len(hub.repos[REPO].commits) == 2
    there = set(hub.large)
    assert len(there) == 3
    hub.log.clear()
    publish(folder, "--max-shard-size", "100KB")
    shards = {file.oid for file in hub.repos[REPO].files().values() if file.is_large}
    sent = {request.path.rpartition("/")[2] for request in hub.sent("PUT")}
    assert len(shards & there) == 2 and sent == shards - there
    assert len(hub.repos[REPO].commits) == 3


def test_scores_go_into_the_metadata(hub, folder, tmp_path):
    entry = {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.01}
    results = {
        "results": {"gsm8k": entry},
        "configs": {"gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}},
        "versions": {"gsm8k": 3.0},
        "n-shot": {"gsm8k": 5},
        "n-samples": {"gsm8k": {"original": 1319, "effective": 1319}},
        "higher_is_better": {"gsm8k": {"exact_match": True}},
        "date": 1795352707.8,
        "model_name": "tiny",
        "wkv": {"model": "tiny", "model_sha256": weights_sha256(folder)},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    publish(folder, "--results", tmp_path / "results.json")
    assert hub.verdicts[-1] == ([], [])
    files = hub.repos[REPO].files()
    (index,) = RepoCard(files["README.md"].data.decode()).data.to_dict()["model-index"]
    assert index["results"][0]["metrics"][0]["value"] == 0.125
    assert b"openai/gsm8k" in files[".eval_results/gsm8k.yaml"].data
    results["wkv"]["model_sha256"] = "0" * 64
    (tmp_path / "results.json").write_text(json.dumps(results))
    other = wkv("publish", folder, REPO, *PUSH, "--results", tmp_path / "results.json")
    assert_refused(other, "results.json")


@pytest.mark.parametrize("word", ["validate-yaml", "repos/create", "/preupload/", "objects/batch", "/commit/"])
def test_a_hub_that_fails_once_is_asked_again(hub, folder, word, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail_once.add(word)
    publish(folder)
    assert hub.fail_once == set() and hub.uploads == 1 and len(hub.repos[REPO].commits) == 2


def refused(hub, folder, *words, repo=REPO):
    result = wkv("publish", folder, repo, *PUSH)
    # What is to go up has been shown.
    assert_refused(subprocess.CompletedProcess(result.args, result.returncode, "", result.stderr), *words)
    assert "published" not in result.stdout and hub.uploads == 0 and hub.large == {}


def test_a_hub_that_refuses_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "-expired")
    refused(hub, folder, REPO, "401", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, folder, "no token", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(hub, folder, "somebody-else/tiny", "403", "write", repo="somebody-else/tiny")
    hub.refuse_writes = 403
    refused(hub, folder, REPO, "403")
    assert hub.repos == {}


def test_a_card_that_the_hub_does_not_take_makes_no_repository(hub, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "tiny")
    (other / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: 5\n---\nMine\n")
    refused(hub, other, "README.md", "pipeline_tag")
    assert hub.repos == {}


def test_no_network_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("wkv.hub_upload.WAITS", ())
    refused(hub, folder, REPO, "http://127.0.0.1:9", "cannot be reached")


def test_somebody_elses_commit_is_not_overwritten(hub, folder, monkeypatch):
    """Between the look at the revision and the commit somebody else commits."""
    publish(folder)
    repo, add = hub.repos[REPO], CommitOperationAdd

    def commit_first(*arguments):
        repo.commits["f" * 40], repo.branches["main"] = dict(repo.files()), "f" * 40
        return add(*arguments)

    monkeypatch.setattr("wkv.hub_upload.CommitOperationAdd", commit_first)
    result = wkv("publish", folder, REPO, *PUSH, "--max-shard-size", "200KB")
    assert result.returncode == 2 and "412" in result.stderr and repo.branches["main"] == "f" * 40


@pytest.mark.slow
def test_ctrl_c_ends_quietly(hub, folder):
    hub.stop_in_upload = 1
    command = [*COMMAND, "publish", str(folder), REPO, *PUSH]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert hub.stopped.wait(60)
        os.kill(running.pid, signal.SIGINT)
        errors = running.communicate(timeout=20)[1]
    assert running.returncode == 130 and "Traceback" not in errors
    assert list(hub.repos[REPO].files()) == [".gitattributes"]
