"""What `wkv publish` refuses, before anything could be sent, naming the file; and what it puts right by itself."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, wkv
from hub_cases import save_model
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import RepoCard
from safetensors.torch import load_file, save_file

from wkv.hub import CardFacts, make_plan

REPO = "somebody/tiny"
TOKEN = "hf_" + "AbCdEfGh" * 4
KEY = "-----BEGIN RSA " + "PRIVATE KEY-----\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, "rwkv7")
    return path


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny")


def publish(folder, *arguments, repo=REPO, licence="apache-2.0"):
    return wkv("publish", folder, repo, *(["--licence", licence] if licence else []), *arguments)


def write(name, text):
    def damage(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return damage


def change(name, **fields):
    def damage(folder):
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(content))

    return damage


def spoil(value):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def rename_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def link_out(folder):
    (folder.parent / "elsewhere.md").write_text("private")
    (folder / "notes.md").symlink_to(folder.parent / "elsewhere.md")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


def link(name, target):
    def damage(folder):
        write(".git/config", "x")(folder)
        (folder / "real").mkdir()
        (folder / name).symlink_to(target)

    return damage


def index(name):
    """An index of shards that places a tensor in the file of that name."""

    def damage(folder):
        text = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}})
        (folder / "model.safetensors.index.json").write_text(text)
        save_file({"model.norm.weight": torch.ones(64)}, folder / name)

    return damage


def move_weights_out(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "../other.safetensors")})
    (folder / "model.safetensors.index.json").write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


REFUSED = {
    "token": (write("train.py", f"x = 1\ntoken = '{TOKEN}'\n"), ["train.py", "line 2", "Hugging Face token"]),
    "token in a folder": (write("logs/run.log", TOKEN), ["logs/run.log", "Hugging Face token"]),
    "aws key": (write("notes.txt", "AKIA" + "ABCDEFGH" * 2), ["notes.txt", "AWS access key"]),
    "aws secret": (write("a.ini", "aws_secret_access_key = " + "aB3/" * 10), ["a.ini", "AWS secret key"]),
    "private key": (write("key.txt", KEY), ["key.txt", "private key"]),
    "github token": (write("a.yaml", "t: ghp_" + "aB3d" * 9), ["a.yaml", "GitHub token"]),
    "wandb key": (write("run.sh", "export WANDB_API_KEY=" + "0af9" * 10), ["run.sh", "line 1", "a key"]),
    ".env": (write(".env", "A=1"), [".env", "secrets"]),
    ".netrc": (write(".netrc", "machine"), [".netrc", "secrets"]),
    "id_rsa": (write("id_rsa", "x"), ["id_rsa", "secrets"]),
    "optimizer": (write("optimizer.pt", "x"), ["optimizer.pt", "training run"]),
    "checkpoint": (write("checkpoint-5/scheduler.pt", "x"), ["checkpoint-5/scheduler.pt", "training run"]),
    "rng": (write("rng_state_0.pth", "x"), ["rng_state_0.pth", "training run"]),
    "deepspeed": (write("global_step5/mp_rank_00_model_states.pt", "x"), ["global_step5/mp_rank", "training run"]),
    "fsdp": (write("pytorch_model_fsdp_0/__0_0.distcp", "x"), ["__0_0.distcp", "training run"]),
    "training arguments": (write("training_args.bin", "x"), ["training_args.bin", "this machine"]),
    "pickle": (write("pytorch_model.bin", "x"), ["pytorch_model.bin", "--allow-pickles"]),
    "official file": (write("model.pth", "x"), ["model.pth", "--allow-pickles"]),
    "path in json": (change("config.json", teacher="/home/me/teacher"), ["config.json", "line", "/home/me"]),
    "unusual path in json": (change("config.json", teacher="/odd/me/teacher"), ["config.json", "/odd/me/teacher"]),
    "path in markdown": (write("notes.md", "one\n\nsee /Users/me/data"), ["notes.md", "line 3", "/Users/me"]),
    "path in yaml": (write("run.yaml", "data: /scratch/me"), ["run.yaml", "line 1", "/scratch/me"]),
    "path in code": (write("run.py", "DATA = 'C:\\\\Users\\\\me'"), ["run.py", "line 1"]),
    "nan": (spoil(float("nan")), ["model.safetensors", "NaN", "model.norm.weight (1)"]),
    "infinity": (spoil(float("inf")), ["model.safetensors", "infinite", "model.norm.weight"]),
    "truncated": (cut, ["model.safetensors"]),
    "unknown tensor": (rename_tensor, ["backbone.norm.weight", "wkv convert"]),
    "link to what stays": (link("notes.md", ".git/config"), ["notes.md", "a link to .git/config"]),
    "link to a folder": (link("notes", "real"), ["notes", "a link to real"]),
    "index beside": (index("model-00001-of-00001.safetensors"), ["model-00001-of-00001.safetensors", "not loaded"]),
    "index leads out": (move_weights_out, ["other.safetensors", "lie elsewhere"]),
    "partly filled card": (
        write("README.md", "---\nlicense: mit\n---\n# Mine\nLong text.\n\n[More Information Needed]\n"),
        ["README.md", "line 7", "fill it in or remove it"],
    ),
    "number as licence": (write("README.md", "---\nlicense: 5\n---\nMine"), ["README.md", "is 5"]),
    "link": (link_out, ["notes.md", "link out of the folder"]),
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer.json", "no tokenizer"]),
    "no weights": (remove("model.safetensors"), ["model.safetensors"]),
    "no config": (remove("config.json"), ["config.json"]),
    "another architecture": (change("config.json", model_type="llama"), ["config.json", "llama"]),
    "card": (write("README.md", "---\na: [\n---\nMine"), ["README.md", "metadata cannot be read"]),
    "tokenizer": (write("tokenizer.json", "{}"), ["tokenizer.json", "cannot be loaded"]),
    "tokenizer's configuration": (write("tokenizer_config.json", "{"), ["tokenizer_config.json"]),
    "another licence": (write("README.md", "---\nlicense: mit\n---\nMine"), ["README.md", "mit", "apache-2.0"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, folder):
    damage, words = REFUSED[case]
    damage(folder)
    result = publish(folder)
    assert_refused(result, *words)
    assert TOKEN not in result.stderr


def test_refused_without_licence(folder):
    assert_refused(publish(folder, licence=None), str(folder), "licence", "--licence")
    assert_refused(publish(folder, licence="apache-3"), "apache-3")
    (folder / "README.md").write_text("---\nlicense: [mit]\n---\nMine")
    assert_refused(publish(folder, licence=None), "README.md", "['mit']")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine")
    assert publish(folder, licence=None).returncode == 0


@pytest.mark.parametrize("repo", ["a/b/c", "tiny", "somebody/my model", "-x", "somebody/x.git", "a--b"])
def test_refused_names(repo, folder):
    result = wkv("publish", "--licence", "mit", folder, "--", repo) if repo[0] == "-" else publish(folder, repo=repo)
    assert_refused(result, repo)


def test_refused_folders(tmp_path):
    assert_refused(publish(tmp_path / "nowhere"), "nowhere", "no such")
    (tmp_path / "empty").mkdir()
    assert_refused(publish(tmp_path / "empty"), "empty", "neither a model")


@pytest.mark.parametrize("pattern", ["model*.safetensors", "model*", "*"])
def test_weights_cannot_be_left_out(folder, pattern):
    result = publish(folder, "--exclude", pattern)
    assert_refused(result, str(folder))
    assert pattern == "*" or "model.safetensors" in result.stderr


def test_pickled_weights_are_checked_too(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert publish(folder, "--allow-pickles").returncode == 0
    tensors["model.norm.weight"][0] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_refused(publish(folder, "--allow-pickles"), "pytorch_model.bin", "model.norm.weight (1)")


def test_a_large_file_is_not_read(folder):
    with (folder / "huge.gguf").open("wb") as file:
        file.truncate(10**12)
    result = publish(folder)
    assert result.returncode == 0, result.stderr
    assert "huge.gguf" in result.stdout and "kept, too large to be searched" in result.stdout


def test_what_is_left_out_and_let_through(folder):
    for name in ("optimizer.pt", ".git/config", "__pycache__/a.pyc"):
        write(name, "x")(folder)
    (folder / "extra.bin").write_bytes(b"x")
    result = publish(folder, "--exclude", "opt*", "--allow-pickles")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[-1] for line in lines if line[:2] == ["left", "out:"]] == [
        ".git",
        "__pycache__",
        "optimizer.pt",
    ]
    assert ["1", "B", "extra.bin", "kept"] in lines


def plan(folder, shards="50GB", **options):
    """The contents of the files that would go up, by their paths, with where they come from."""
    facts = CardFacts(**{"licence": "apache-2.0"} | options)
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    entries = make_plan(folder, REPO, scratch, shards, False, (), facts).entries
    read = {e.path: e.content.read_bytes() if isinstance(e.content, Path) else e.content for e in entries}
    return read, {entry.path: entry.origin for entry in entries}


def test_traces_of_this_machine_that_we_leave_are_removed(folder):
    change("config.json", _name_or_path="/home/me/run")(folder)
    change("tokenizer_config.json", name_or_path="/home/me/run", tokenizer_file="/home/me/t.json")(folder)
    files, _ = plan(folder)
    assert not [name for name, data in files.items() if b"/home/me" in data]
    assert "_name_or_path" not in json.loads(files["config.json"])
    assert json.loads((folder / "config.json").read_text())["_name_or_path"] == "/home/me/run", "ours is not changed"


def test_missing_files_are_made(folder):
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    files, origins = plan(folder)
    assert origins["generation_config.json"] == "generated" and origins["modeling_rwkv7.py"] == "code"
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 0
    auto_map = {"AutoTokenizer": ["tokenization_rwkv.RwkvTokenizer", None]}
    assert json.loads(files["tokenizer_config.json"])["auto_map"] == auto_map


def test_a_link_inside_the_folder_goes_up(folder):
    (folder / "copy.md").write_text("text")
    os.symlink("copy.md", folder / "link.md")
    assert plan(folder)[0]["link.md"] == b"text"


def test_an_own_card_is_kept_and_completed(folder):
    own = "---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n\nKeep this.\n"
    (folder / "README.md").write_text(own)
    files, origins = plan(folder, licence=None, language=["en"])
    card = RepoCard(files["README.md"].decode())
    assert origins["README.md"] == "kept, with metadata" and card.text == "\n# Mine\n\nKeep this.\n"
    assert card.data.license == "mit" and card.data.tags == ["mine"] and card.data.language == ["en"]
    assert card.data.library_name == "transformers"


def test_licence_and_mark_of_an_own_card(folder):
    """The Hub knows licences in small letters; the mark that Windows puts before a text is no part of it."""
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: Apache-2.0\r\n---\r\nMine\r\n")
    card = RepoCard(plan(folder)[0]["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.text.strip() == "Mine" and card.data.library_name


def test_an_own_card_without_metadata_gets_them(folder):
    (folder / "README.md").write_text("# Mine\n")
    card = RepoCard(plan(folder)[0]["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.text.strip() == "# Mine"


def test_new_shards_leave_other_weights(folder):
    (folder / "teacher").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "teacher")
    files, origins = plan(folder, shards="200KB")
    assert origins["teacher/model.safetensors"] == "kept" and "model.safetensors" not in files


@pytest.mark.parametrize("body", ["[More Information Needed]\n", ModelCard.from_template(ModelCardData()).text])
def test_an_unfilled_card_is_replaced(folder, body):
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\nbase_model: /home/me/x\n---\n{body}\n- PEFT 0.19\n")
    files, origins = plan(folder)
    assert origins["README.md"] == "generated" and b"More Information Needed" not in files["README.md"]


def test_half_precision_weights_are_checked_too(folder):
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert publish(folder).returncode == 0
    tensors["model.norm.weight"][0] = float("-inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_refused(publish(folder), "model.norm.weight (1)")
