"""Decoding for ever: the state and the time of a step do not grow with the text.

Letters: T tokens.
"""

import time

import psutil
import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states
from transformers.cache_utils import DynamicCache


def decode(model, T: int, cache, token):
    """Decode `T` tokens greedily; returns the last token and the seconds of every step."""
    seconds = []
    with torch.inference_mode():
        for _ in range(T):
            start = time.perf_counter()
            token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            seconds.append(time.perf_counter() - start)
    return token, torch.tensor(seconds)


def measure(model, T: int):
    """Decode `T` tokens; returns step times, and the state's addresses and sizes at the begin and the end."""
    cache, token = DynamicCache(config=model.config), random_ids(1, 1)
    token, _ = decode(model, 20, cache, token)
    begin = [(t.data_ptr(), t.numel()) for t in states(cache)]
    token, seconds = decode(model, T, cache, token)
    assert begin == [(t.data_ptr(), t.numel()) for t in states(cache)]
    assert all(torch.isfinite(t).all() for t in states(cache))
    assert int(cache.get_seq_length()) == T + 20
    return seconds


def test_long_decode_keeps_its_state_in_place(model):
    """An excerpt of the slow test: no tensor of the cache moves or grows."""
    measure(model, 600)


def test_long_text_in_slices_equals_long_text_at_once(model):
    """Rounding does not pile up: 4000 tokens at once and by 256, as a chat feeds them."""
    ids, cache = random_ids(1, 4000), DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(ids, use_cache=True)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(256, 1)]
    assert_close(torch.cat(pieces, 1), whole.logits)
    assert_close(states(cache), states(whole.past_key_values))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_64k_tokens_at_constant_speed_and_memory(model_type):
    """Steps after 64k tokens and steps at the start of a text take turns, so that both meet the same machine."""
    model, process = busy_model(model_type), psutil.Process()
    measure(model, 500)
    before = process.memory_info().rss
    old, token = DynamicCache(config=model.config), random_ids(1, 1)
    token, _ = decode(model, 65536, old, token)
    assert process.memory_info().rss - before < 64 * 2**20
    texts, seconds = {"old": (old, token)}, {"old": [], "fresh": []}
    for turn in range(4000):
        if turn % 100 == 0:
            texts["fresh"] = (DynamicCache(config=model.config), random_ids(1, 1))
            decode(model, 2, *texts["fresh"])
        for name in ("old", "fresh") if turn % 2 else ("fresh", "old"):
            cache, token = texts[name]
            token, step = decode(model, 1, cache, token)
            texts[name] = (cache, token)
            seconds[name].append(step.item())
    late, early = (torch.tensor(seconds[name]).median().item() for name in ("old", "fresh"))
    assert 0.97 < late / early < 1.03, f"a step takes {1e3 * early:.3f} ms at the start and {1e3 * late:.3f} ms at 64k"
