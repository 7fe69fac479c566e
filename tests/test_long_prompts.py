"""Long prompts run in slices: the same results as at once, in memory that does not grow.

Letters: B batch rows, T tokens.
"""

import subprocess
import sys

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states, time_mix
from transformers.cache_utils import DynamicCache

from wkv.models import rwkv_sequences

SLICE = 16


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    monkeypatch.setattr(rwkv_sequences, "SLICE_TOKENS", SLICE)


@pytest.fixture
def pieces(model, monkeypatch):
    """How many tokens went through the first block, call by call."""
    lengths, forward = [], time_mix(model).forward

    def count(x, *args):
        lengths.append(x.shape[1])
        return forward(x, *args)

    monkeypatch.setattr(time_mix(model), "forward", count)
    return lengths


def run(model, ids, at_once: bool, **inputs):
    """Logits and states; with gradients a prompt is never cut."""
    cache = DynamicCache(config=model.config)
    with torch.set_grad_enabled(at_once):
        logits = model(ids, past_key_values=cache, **inputs).logits.detach()
    return logits, states(cache), int(cache.get_seq_length())


@pytest.mark.parametrize("B, T", [(1, 16), (1, 17), (1, 50), (3, 14), (20, 3)])
def test_slices_equal_the_whole(model, pieces, B, T):
    ids = random_ids(B, T)
    logits, state, seen = run(model, ids, at_once=False)
    length = max(1, SLICE // B) if B * T > SLICE else T
    assert pieces == [min(length, T - begin) for begin in range(0, T, length)]
    expected, expected_state, _ = run(model, ids, at_once=True)
    assert_close(logits, expected)
    assert_close(state, expected_state)
    assert seen == T


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_slices_with_padding(model, pieces, side):
    """Padding longer than a slice, and rows that differ."""
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, {"left": slice(0, 21), "right": slice(19, None), "holes": slice(7, 33, 3)}[side]] = 0
    logits, state, _ = run(model, ids, at_once=False, attention_mask=mask)
    assert len(pieces) == 5
    expected, expected_state, _ = run(model, ids, at_once=True, attention_mask=mask)
    assert_close(logits[mask == 1], expected[mask == 1])
    assert_close(state, expected_state)


@pytest.mark.parametrize("keep", [1, 9, 10, 26, 0, torch.tensor([3, 41])], ids=str)
def test_only_the_logits_asked_for(model, keep):
    ids = random_ids(1, 42)
    with torch.no_grad():
        logits = model(ids, logits_to_keep=keep).logits
    expected, _, _ = run(model, ids, at_once=True)
    assert_close(logits, expected[:, keep] if isinstance(keep, torch.Tensor) else expected[:, -keep:])


def test_slices_continue_a_cache_and_embeddings(model, pieces):
    ids = random_ids(1, 60)
    cache, tokens = DynamicCache(config=model.config), model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        first = model(inputs_embeds=tokens[:, :25], past_key_values=cache).logits
        second = model(inputs_embeds=tokens[:, 25:], past_key_values=cache).logits
    assert pieces == [16, 9, 16, 16, 3]
    assert_close(torch.cat([first, second], 1), run(model, ids, at_once=True)[0])


def test_packed_rows_and_hidden_states_are_not_cut(model_type):
    model, ids = busy_model(model_type), random_ids(1, 40)
    positions = torch.cat([torch.arange(19), torch.arange(21)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        alone = [model(part).logits for part in ids.split([19, 21], 1)]
        outputs = model(ids, output_hidden_states=True)
        plain = model(ids).logits
    assert_close(packed, torch.cat(alone, 1))
    assert [tuple(x.shape[:2]) for x in outputs.hidden_states] == [(1, 40)] * (model.config.num_hidden_layers + 1)
    assert_close(outputs.logits, plain)


MEMORY = """
import sys, threading, psutil, torch, wkv
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model({model_type!r}, vocab_size=64, hidden_size=256, num_hidden_layers=1)
model, process = AutoModelForCausalLM.from_config(config).eval(), psutil.Process()

def peak(T):
    highest, done = [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            highest[0] = max(highest[0], process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    before = process.memory_info().rss
    watcher.start()
    with torch.no_grad():
        model(torch.ones(1, T, dtype=torch.long), logits_to_keep=1)
    done.set()
    watcher.join()
    return highest[0] - before

peak(100)
print(peak(8192), peak(65536))
"""


def test_memory_does_not_grow_with_the_prompt(model_type):
    command = [sys.executable, "-c", MEMORY.format(model_type=model_type)]
    short, long = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    # At once, the 57,000 tokens more would take some 18 KB each.
    assert long < short + 32 * 2**20
