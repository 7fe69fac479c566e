"""A published folder: saved with its code, it runs where neither `wkv` nor its kernels are installed."""

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AUTO_CLASSES, TINY, assert_close, busy_model, random_ids

import wkv.models
from wkv.models.rwkv_publishing import registered
from wkv.vocabulary import build_tokenizer

MODELS = Path(wkv.models.__file__).parent
# Run in the folder's parent, with transformers' caches beside it.
ELSEWHERE = """
import sys
sys.modules["wkv"] = sys.modules["wkv_kernels"] = None
import torch, transformers
torch.set_num_threads(1)
ids = torch.load("ids.pt")
results = {}
for folder in sys.argv[1:]:
    model_type, name = folder.split("-")
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[folder] = model(ids)[0]
    if name == "AutoModelForCausalLM":
        results[model_type, "written"] = model.generate(ids, max_new_tokens=8, do_sample=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
        results[model_type, "encoded"] = tokenizer("Hello \\u4f60\\n")["input_ids"]
torch.save(results, "results.pt")
"""


@functools.cache
def siblings(module: str) -> set[str]:
    """A module of `wkv.models` and those that it imports, however far away."""
    tree = ast.parse((MODELS / f"{module}.py").read_text(encoding="utf-8"))
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    return {module}.union(*map(siblings, relative))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def published(root):
    """Models of each generation and auto class by the names of their folders, each saved with its code."""
    models = {
        f"{kind}-{auto.__name__}": busy_model(kind, auto, vocab_size=257) for kind in TINY for auto in AUTO_CLASSES
    }
    tokenizer = build_tokenizer(pieces=[bytes([i]) for i in range(256)])
    for folder, model in models.items():
        auto_classes = {type(model): folder.partition("-")[2], type(model.config): "AutoConfig"}
        with registered(auto_classes | {type(tokenizer): "AutoTokenizer"}):
            model.save_pretrained(root / folder)
            tokenizer.save_pretrained(root / folder)
    return models


def test_every_sibling_is_copied(published, root):
    for name, model in published.items():
        config = json.loads((root / name / "config.json").read_text())
        assert config["auto_map"].keys() == {"AutoConfig", name.partition("-")[2]}
        needed = siblings(type(model).__module__.rpartition(".")[2])
        assert len(needed) > 3
        for module in needed:
            assert (root / name / f"{module}.py").read_bytes() == (MODELS / f"{module}.py").read_bytes(), module


def test_folders_run_without_the_package(published, root):
    ids = random_ids(2, 21)
    torch.save(ids, root / "ids.pt")
    command = [sys.executable, "-c", ELSEWHERE, *published]
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = torch.load(root / "results.pt")
    for name, model in published.items():
        with torch.no_grad():
            # There is plain PyTorch, here are the kernels.
            assert_close(found[name], model(ids)[0], what=name)
        model_type, _, auto_class = name.partition("-")
        if auto_class == "AutoModelForCausalLM":
            written = model.generate(ids, max_new_tokens=8, do_sample=False)
            assert torch.equal(found[model_type, "written"], written)
            assert found[model_type, "encoded"] == [byte + 1 for byte in "Hello 你\n".encode()]
