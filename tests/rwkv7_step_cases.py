"""What the tests of the fused step share: models run with and without it, and a count of its calls."""

import contextlib
import copy

import pytest
import torch
from conftest import random_ids
from transformers.cache_utils import DynamicCache

from wkv.models import modeling_rwkv7 as modeling
from wkv.models import rwkv7_fused, wkv7

kernel = pytest.importorskip("wkv_kernels.rwkv7_step")

IDS = random_ids(2, 4)


def block(model):
    return model.model.layers[1]


def call(model, ids=IDS, **options):
    """Logits of the first token of `ids`."""
    cache = DynamicCache(config=model.config)
    return model(ids[:, :1], past_key_values=cache, **options).logits


@pytest.fixture
def steps(monkeypatch):
    """A list with one entry for each call of the kernel."""
    calls, real = [], kernel.rwkv7_step
    monkeypatch.setattr(kernel, "rwkv7_step", lambda *args: calls.append(args) or real(*args))
    return calls


@contextlib.contextmanager
def module_by_module():
    """Inside, models run without the fused step and without products of few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "fused_step", lambda *args: None)
        patch.setattr(modeling, "linear_of_few_rows", lambda linear, x: linear(x))
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
        patch.setattr(rwkv7_fused, "compiled", None)
        patch.setattr(wkv7, "compiled_wkv7", None)
        return decode(copy.deepcopy(model).double(), ids)
