"""A published folder: saved with its code, it runs where neither `wkv` nor its kernels are installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AUTO_CLASSES, assert_close, busy_model, random_ids
from transformers import AutoConfig

import wkv.models
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
for name in sys.argv[1:]:
    model = getattr(transformers, name).from_pretrained("folder-" + name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[name] = model(ids)[0]
    if name == "AutoModelForCausalLM":
        results["written"] = model.generate(ids, max_new_tokens=8, do_sample=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained("folder-" + name, trust_remote_code=True)
        assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
        results["encoded"] = tokenizer("Hello \\u4f60\\n")["input_ids"]
torch.save(results, "results.pt")
"""


def siblings(module: str) -> set[str]:
    """A module of `wkv.models` and those that it imports, however far away."""
    tree = ast.parse((MODELS / f"{module}.py").read_text(encoding="utf-8"))
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    return {module}.union(*map(siblings, relative))


@pytest.fixture
def published(model_type, tmp_path):
    """The models of a generation by the name of their auto class, each saved with its code as `folder-NAME`."""
    config_class = type(AutoConfig.for_model(model_type))
    models = {auto.__name__: busy_model(model_type, auto, vocab_size=257) for auto in AUTO_CLASSES}
    tokenizer = build_tokenizer(pieces=[bytes([i]) for i in range(256)])
    with pytest.MonkeyPatch.context() as patch:
        # What register_for_auto_class() sets is undone, so that other tests save no code.
        for registered in (config_class, type(tokenizer), *map(type, models.values())):
            patch.setattr(registered, "_auto_class", None)
        config_class.register_for_auto_class()
        type(tokenizer).register_for_auto_class()
        for name, model in models.items():
            type(model).register_for_auto_class(name)
            model.save_pretrained(tmp_path / f"folder-{name}")
            tokenizer.save_pretrained(tmp_path / f"folder-{name}")
    return models


def test_every_sibling_is_copied(published, tmp_path):
    for name, model in published.items():
        folder = tmp_path / f"folder-{name}"
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"].keys() == {"AutoConfig", name}
        needed = siblings(type(model).__module__.rpartition(".")[2])
        assert len(needed) > 3
        for module in needed:
            assert (folder / f"{module}.py").read_bytes() == (MODELS / f"{module}.py").read_bytes(), module


def test_folder_runs_without_the_package(published, tmp_path):
    ids = random_ids(2, 21)
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", ELSEWHERE, *published]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        for name, model in published.items():
            # There is plain PyTorch, here are the kernels.
            assert_close(found[name], model(ids)[0], what=name)
        written = published["AutoModelForCausalLM"].generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["written"], written)
    assert found["encoded"] == [byte + 1 for byte in "Hello 你\n".encode()]
