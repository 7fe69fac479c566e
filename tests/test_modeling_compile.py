"""torch.compile: one graph, the eager result, and no recompilation from token to token.

Letters: B rows, T tokens.
"""

import pytest
import torch
from conftest import assert_close, assert_gradients_close, busy_model, gradients, random_ids, states
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.cache_utils import DynamicCache, StaticCache

T = 21
MASK = torch.tensor([[0] * 4 + [1] * 10 + [0] * 7, [1] * 21])
PACKED = {"cu_seq_lens_q": torch.tensor([0, 8, 9, T])}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(model_type):
    return busy_model(model_type, num_hidden_layers=2)


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def test_forward_is_one_graph(small):
    ids = random_ids(2, T)
    inputs = {"attention_mask": MASK, "position_ids": torch.arange(T)[None], "use_cache": True}
    with torch.no_grad():
        expected, out = small(ids, **inputs), compiled(small)(ids, **inputs)
    assert_close(out.logits[MASK == 1], expected.logits[MASK == 1])
    assert_close(states(out.past_key_values), states(expected.past_key_values))


def test_packed_forward_is_one_graph(small):
    ids = random_ids(1, T)
    with torch.no_grad():
        assert_close(compiled(small)(ids, **PACKED).logits, small(ids, **PACKED).logits)


def test_restarting_positions_are_never_ignored(small):
    """A compiled graph cannot read from them where documents begin, and says so."""
    ids, positions = random_ids(2, T), torch.cat([torch.arange(8), torch.arange(13)]).expand(2, T)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        compiled(small)(ids, position_ids=positions)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_is_one_graph(small, backend):
    model, ids = small.train(), random_ids(2, T)
    inputs = {"labels": ids.masked_fill(MASK == 0, -100), "attention_mask": MASK}
    model(ids, **inputs).loss.backward()
    expected = gradients(model)
    compiled(model, backend)(ids, **inputs).loss.backward()
    assert_gradients_close(gradients(model), expected)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache], ids=lambda c: c.__name__)
def test_decoding_does_not_recompile(small, cache_class):
    ids = random_ids(2, T)
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(small, counter)
    arguments = {"max_cache_len": 64} if cache_class is StaticCache else {}
    cache = cache_class(config=small.config, **arguments)
    with torch.no_grad():
        logits = [small(ids[:, :9], past_key_values=cache).logits]
        for t in range(9, T):
            logits.append(step(ids[:, t : t + 1], past_key_values=cache).logits)
        expected = small(ids, use_cache=True)
    assert_close(torch.cat(logits, 1), expected.logits)
    assert_close(states(cache), states(expected.past_key_values))
    assert int(cache.get_seq_length()) == T
    assert counter.frame_count == 1


@pytest.mark.slow
def test_lengths_share_a_graph(small):
    """Prefills of several lengths share dynamic graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    forward = compiled(small, counter, dynamic=True)
    for length in (5, 17, 33):
        ids = random_ids(2, length, seed=length)
        with torch.no_grad():
            assert_close(forward(ids).logits, small(ids).logits)
    assert counter.frame_count <= 2
