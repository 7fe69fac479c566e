"""What `wkv publish` takes for a secret, for a path of this machine and for a file of a training run, and what not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from wkv.hub_checks import litter_of, refuse_names, refuse_text, refuse_weights

TOKEN = "hf_" + "AbCdEfGh" * 4
A3 = "aB3d" * 12


@pytest.mark.parametrize(
    "text",
    [
        f"x = '{TOKEN}'",
        f"key_{TOKEN}_2",
        "AKIA" + "ABCDEFGH" * 2,
        f"AWS_SECRET_KEY={A3}",
        f"AccountKey={A3 * 2}==",
        "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----",
        f"ghp_{A3}",
        f"AIza{A3[:35]}",
        f"pypi-AgE{A3}",
        f"npm_{A3[:36]}",
        f"sk_live_{A3}",
        f"dckr_pat_{A3}",
        f"sk-proj-{A3}",
        f"eyJ{A3}.eyJ{A3}.{A3}",
        f"HF_TOKEN={A3}",
        "https://me:secret@example.org/x",
    ],
)
@pytest.mark.parametrize("coding", ["utf-8", "utf-16", "utf-16-le", "binary"])
def test_secrets(text, coding, tmp_path):
    data = b"\x89PNG\0\xff" + text.encode() if coding == "binary" else f"one\n{text}\n".encode(coding)
    with pytest.raises(ValueError, match="remove it, and revoke it") as refused:
        refuse_text(tmp_path / "file", data)
    assert TOKEN not in str(refused.value) and A3 not in str(refused.value)
    if coding != "binary":
        assert "line 2" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", r"x = 'C:\\Users\\me'"),
        ("a.md", "C:/Users/me/x"),
        ("a.md", r"see D:\corpus"),
        ("a.md", r"on \\server\share"),
        ("a.json", json.dumps({"a": r"\\server\share"})),
        ("a.json", json.dumps({"a": r"D:\corpus"})),
        ("a.json", json.dumps({"/unusual/place/x": 1})),
        ("a.json", json.dumps({"a": ["/unusual/place"]})),
        ("a.sh", "scp x host:/home/me/x"),
        ("a.sh", "PATH=/bin:/home/me/bin"),
        ("a.txt", "file:/home/me/x and file"),
        ("a.txt", "file:///home/me/x"),
        ("a.yaml", "flags: -I/home/me/include"),
        ("a.py", "open('/content/drive/MyDrive/x')"),
        ("a.py", "open('/kaggle/working/x')"),
        ("a.py", "open('/fsx/me/x')"),
        ("a.py", "open('/projects/me/x')"),
        ("a.md", "[a link](/home/me/x)"),
        ("a.ipynb", json.dumps({"cells": ["cd /home/me/x"]})),
        *[(name, "in /home/me/x") for name in ("run.log", "a.ini", "a.html", "a.xml", "Makefile", "A.MD")],
    ],
)
def test_paths(name, text, tmp_path):
    with pytest.raises(ValueError, match="line 2 holds a path of this machine"):
        refuse_text(tmp_path / name, f"\n{text}\n".encode())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "hf_token = load_token_from_environment()"),
        ("a.sh", "export HF_TOKEN=hf_your_token_here_instead_of_this"),
        ("a.md", "hf_" + "x" * 34),
        ("a.md", "sk-" + "-" * 50),
        ("a.md", "task-and-risk-averse-words-with-many-hyphens-in-2024-and-on"),
        ("a.md", "downloads go to ~/.cache/huggingface, or `cd ~/work`"),
        ("a.md", "[x](/data/x) in /tmp/cache"),
        ("a.html", '<img src="/data/x.png"> <a href="/work/x">'),
        ("a.md", "https://example.org/home/me/x and example.org:80/x, ../home/x, and/or, $HOME/data/x, User:\nA"),
        ("a.py", 'x = "Q:\\nWhat\\nA:\\nThis", r"\\d:\\s+"'),
        ("a.jinja", "{{ 'User: ' + x + '\\n\\nAssistant:' }}"),
        ("a.json", json.dumps({"a": "Q:\nwhat\nA: C:\n", "b": "/think", "c": "\\frac\\alpha"})),
        ("a.md", "postgres://user:${PASSWORD}@host, https://<user>:<password>@host, mail me@example.org"),
        ("tokenizer.json", '"/home/me"'),
    ],
)
def test_innocent_texts(name, text, tmp_path):
    refuse_text(tmp_path / name, text.encode())


SECRET = ["prod.env", ".envrc", "secrets.json", "secrets.yaml", "kaggle.json", "tls.key", "a.ppk", ".ssh/config"]
SECRET += [".aws/x", ".htpasswd", "stored_tokens", ".bash_history", "id_rsa.bak", "key.PEM", "x/.ENV"]
TRAINING = ["logs/events.out.tfevents.17.host.1", "checkpoint-5/model.safetensors", "optimizer.pt"]
TRAINING += ["optimizer.safetensors", "global_step5/x"]
PICKLES = ["X.PTH", "x.npz", "x.pkl.gz", "a.npy", "model.bin"]


@pytest.mark.parametrize("name", [*SECRET, *TRAINING, *PICKLES])
def test_bad_names(name, tmp_path):
    words = "secrets" if name in SECRET else "training run" if name in TRAINING else "--allow-pickles"
    with pytest.raises(ValueError, match=words):
        refuse_names(tmp_path, name, allow_pickles=False)


@pytest.mark.parametrize("name", ["optimizer.py", "optimizer.md", "keys.md", "environment.yaml", "run.bin.md", "a.gz"])
def test_innocent_names(name, tmp_path):
    refuse_names(tmp_path, name, allow_pickles=False)


def test_litter():
    assert [litter_of(name) for name in ("wandb/run/x.log", "a/.venv/bin/x", ".gitignore")] == [
        "wandb",
        "a/.venv",
        ".gitignore",
    ]
    assert litter_of("run/x.md") is None and litter_of(".gitattributes") is None


@pytest.mark.parametrize(
    ("names", "metadata", "words"),
    [
        (["a"], {"from": "/home/me/x"}, "/home/me"),
        (["a"], {"note": TOKEN}, "Hugging Face token"),
        ([TOKEN], {}, "Hugging Face token"),
    ],
)
def test_headers_of_weights(names, metadata, words, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(1) for name in names}, path, metadata)
    with pytest.raises(ValueError, match=rf"x.safetensors .*{words}"):
        refuse_weights(path)
