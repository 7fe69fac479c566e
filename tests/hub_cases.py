"""What tests of publishing share: a stand-in Hub for this process, folders to publish, processes that download them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import busy_model
from stand_in_hub import StandInHub

from wkv.vocabulary import build_tokenizer

# Load a causal language model from the Hub for every name after the file to write, and run it.
DOWNLOAD = """
import sys
import torch, transformers
torch.set_num_threads(1)
output, *repos = sys.argv[1:]
results = {"ids": torch.randint(1, 50, (2, 21), generator=torch.Generator().manual_seed(0))}
for repo in repos:
    model = transformers.AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    with torch.no_grad():
        logits = model(results["ids"]).logits
    written = model.generate(**tokenizer("Hello \\u4f60\\n", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    classes = [type(model).__module__, type(model.config).__module__, type(tokenizer).__module__]
    results[repo] = {"logits": logits, "text": tokenizer.decode(written[0]), "classes": classes}
    results["operators"] = sorted(name for name in sys.modules if name.startswith("wkv_kernels."))
torch.save(results, output)
"""
WITHOUT = "import sys; sys.modules['wkv'] = sys.modules['wkv_kernels'] = None\n"
WITH = "import wkv\n"


@contextlib.contextmanager
def hub_of_this_process(home: Path):
    """A stand-in Hub that this process, and those it starts, take for the Hub; `home` is an empty folder."""
    with StandInHub() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(home).items():
            patch.setenv(name, value)
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr("wkv.hub_upload.WAITS", (0.01, 0.01))
        yield hub


def save_model(folder: Path, model_type: str, seed: int = 0) -> torch.nn.Module:
    """A tiny model with the tokenizer of the 256 bytes, saved as `save_pretrained` does."""
    model = busy_model(model_type, seed=seed, vocab_size=257)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def byte_tokenizer():
    """The World tokenizer of the 256 bytes."""
    return build_tokenizer(pieces=[bytes([i]) for i in range(256)])


def download(first: str, output: Path, *repos: str, home: Path, then: str = "") -> dict:
    """What a fresh process with empty caches makes of repositories; `first` is run before, `then` after it."""
    command = [sys.executable, "-c", first + DOWNLOAD + then, str(output), *repos]
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=output.parent)
    assert result.returncode == 0, result.stderr
    return torch.load(output)
