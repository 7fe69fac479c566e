"""torch.compile: one graph, the eager result, and no recompilation from token to token.

Letters: B rows, T tokens.
"""

import pytest
import torch
from conftest import assert_close, assert_gradients_close, gradients, random_ids, states
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.cache_utils import DynamicCache, StaticCache

T = 21
INPUTS = {
    "plain": {},
    "padded": {"attention_mask": torch.tensor([[0] * 4 + [1] * 17, [1] * 21])},
    "right-padded": {"attention_mask": torch.tensor([[1] * 17 + [0] * 4, [1] * 21])},
    "positions": {"position_ids": torch.arange(T)[None]},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_forward_is_one_graph(own_model, inputs):
    ids = random_ids(2, T)
    compiled = torch.compile(own_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, out = own_model(ids, use_cache=True, **inputs), compiled(ids, use_cache=True, **inputs)
    real = inputs.get("attention_mask", torch.ones(2, T)) == 1
    assert_close(out.logits[real], expected.logits[real])
    assert_close(states(out.past_key_values), states(expected.past_key_values))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_training_is_one_graph(own_model, inputs):
    model, ids = own_model.train(), random_ids(2, T)
    inputs = inputs | {"labels": ids, "use_cache": False}
    model(ids, **inputs).loss.backward()
    expected = gradients(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **inputs).loss.backward()
    assert_gradients_close(gradients(model), expected)


def test_inductor(own_model):
    """The default backend, forward and backward."""
    model, ids = own_model.train(), random_ids(2, T)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    expected_gradients = gradients(model)
    out = torch.compile(model, fullgraph=True)(ids, labels=ids)
    out.loss.backward()
    assert_close(out.logits, expected.logits)
    assert_gradients_close(gradients(model), expected_gradients)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache], ids=lambda c: c.__name__)
def test_decoding_does_not_recompile(own_model, cache_class):
    ids = random_ids(2, T)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(own_model, fullgraph=True, backend=counter)
    arguments = {"max_cache_len": 64} if cache_class is StaticCache else {}
    cache = cache_class(config=own_model.config, **arguments)
    with torch.no_grad():
        logits = [own_model(ids[:, :9], past_key_values=cache).logits]
        for t in range(9, T):
            logits.append(step(ids[:, t : t + 1], past_key_values=cache).logits)
        expected = own_model(ids, use_cache=True)
    assert_close(torch.cat(logits, 1), expected.logits)
    assert_close(states(cache), states(expected.past_key_values))
    assert int(cache.get_seq_length()) == T
    assert counter.frame_count == 1


def test_lengths_share_a_graph(own_model):
    """Prefills of several lengths settle on one dynamic graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(own_model, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 9, 17, 33, 40):
        ids = random_ids(2, length, seed=length)
        with torch.no_grad():
            assert_close(compiled(ids).logits, own_model(ids).logits)
    assert counter.frame_count <= 2
