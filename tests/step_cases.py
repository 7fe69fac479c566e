"""What the tests of the fused step share: models run with and without it, and a count of its calls."""

import contextlib
import copy

import pytest
import torch
from conftest import busy_model, random_ids
from transformers.cache_utils import DynamicCache

from wkv.models import rwkv_linear, rwkv_step, wkv_operators

kernel = pytest.importorskip("wkv_kernels.rwkv_step")

IDS = random_ids(2, 4)


# What the other generations call the parts of a block.
NAMES = {
    **{"attn": "attention", "ffn": "feed_forward", "attn_norm": "ln1", "ffn_norm": "ln2", "pre_norm": "pre_ln"},
    **{"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x"},
}


def path(model, name: str) -> str:
    """Where a part of a block is, given its name in RWKV-7."""
    names = {} if model.config.model_type == "rwkv7" else NAMES
    return ".".join(names.get(part, part) for part in name.split("."))


def part(model, name: str, layer: int = 1):
    """A module of a block by its name in RWKV-7."""
    return model.base_model.get_blocks()[layer].get_submodule(path(model, name))


def last_norm(model):
    return model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.ln_out


def values(model) -> list[torch.nn.Parameter]:
    """The matrices whose memory order the step changes."""
    return [part(model, "ffn.value", i).weight for i in range(model.config.num_hidden_layers)]


def heads(model_type: str, H: int, K: int) -> dict[str, int]:
    """Sizes of a configuration with H heads of K channels."""
    own = {"rwkv": {}, "rwkv7": {"num_heads": H, "head_dim": K}}
    return {"attention_hidden_size": H * K, **own.get(model_type, {"head_size": K})}


def call(model, ids=IDS, **options):
    """Logits of the first token of `ids`."""
    cache = DynamicCache(config=model.config)
    return model(ids[:, :1], past_key_values=cache, **options).logits


@pytest.fixture
def steps(monkeypatch):
    """A list with one entry for each call of the kernel."""
    calls, real = [], kernel.rwkv_step
    monkeypatch.setattr(kernel, "rwkv_step", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.fixture
def plain_model(model_type):
    return busy_model(model_type)


@contextlib.contextmanager
def module_by_module():
    """Inside, models run without the fused step and without products of few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rwkv_step.FusedStep, "__call__", lambda *args: None)
        patch.setattr(rwkv_linear, "is_plain_inference", lambda x: False)
        yield


def decode(model, ids, cache=None, **options):
    """Logits (B, T, V) of the tokens ids (B, T) one by one, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    with torch.no_grad():
        for token in ids.split(1, 1):
            logits.append(model(token, past_key_values=cache, **options).logits)
    return torch.cat(logits, 1), cache


def decode_exactly(model, ids):
    """As `decode`, in float64 and by the definitions in plain PyTorch."""
    with module_by_module(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(wkv_operators, "wkv_kernels", None)
        return decode(copy.deepcopy(model).double(), ids)
