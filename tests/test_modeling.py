"""The state law of every generation: whole = stepwise = slices, each row = that row alone, whatever the padding.

Letters: B rows, T tokens, V vocabulary.
"""

import copy

import pytest
import torch
from conftest import assert_close, assert_gradients_close, gradients, random_ids, states
from transformers.cache_utils import DynamicCache

T = 21
MASKS = {
    "none": [[1] * T] * 3,
    "left": [[0] * 4 + [1] * 17, [0] * 13 + [1] * 8, [0] * 20 + [1]],
    "right": [[1] * 17 + [0] * 4, [1] * 8 + [0] * 13, [1] + [0] * 20],
    "holes": [[1, 0, 0] * 7, [0, 1] * 10 + [0], [1] * 6 + [0] * 9 + [1] * 6],
}


def forward(model, ids, cache=None, **kwargs):
    """Logits and cache of a forward that continues `cache`."""
    with torch.no_grad():
        out = model(ids, past_key_values=cache, use_cache=True, **kwargs)
    return out.logits, out.past_key_values


def in_slices(model, ids, bounds, mask=None):
    """Feed `ids` in the slices that end at `bounds`, with the mask of everything seen so far, as generate passes it."""
    logits, cache, start = [], None, 0
    for end in bounds:
        seen = None if mask is None else mask[:, :end]
        piece, cache = forward(model, ids[:, start:end], cache, attention_mask=seen)
        logits.append(piece)
        start = end
    return torch.cat(logits, 1), cache


def random_bounds(length: int, seed: int) -> list[int]:
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(seed))[: length // 3] + 1
    return [*sorted(cuts.tolist()), length]


SLICES = {
    "one-token": list(range(1, T + 1)),
    "1+rest": [1, T],
    "rest+1": [T - 1, T],
    **{f"random-{seed}": random_bounds(T, seed) for seed in range(4)},
}


@pytest.mark.parametrize("bounds", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_slices_equal_whole(model, bounds, mask):
    ids, mask = random_ids(3, T), torch.tensor(mask)
    whole, cache = forward(model, ids, attention_mask=mask)
    sliced, sliced_cache = in_slices(model, ids, bounds, mask)
    assert_close(sliced[mask == 1], whole[mask == 1], what="logits")
    assert_close(states(sliced_cache), states(cache), what="state")
    assert int(sliced_cache.get_seq_length()) == int(cache.get_seq_length()) == T


@pytest.mark.parametrize("length", [64, 65, 150])
def test_slices_equal_whole_over_many_chunks(model, length):
    ids = random_ids(2, length)
    whole, cache = forward(model, ids)
    for seed in range(3):
        sliced, sliced_cache = in_slices(model, ids, random_bounds(length, seed))
        assert_close(sliced, whole, what="logits")
        assert_close(states(sliced_cache), states(cache), what="state")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_row_of_batch_equals_row_alone(model, mask):
    ids, mask = random_ids(3, T), torch.tensor(mask)
    logits, cache = forward(model, ids, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        alone, alone_cache = forward(model, ids[row, real][None])
        assert_close(logits[row, real], alone[0], what=f"logits of row {row}")
        assert_close(states(cache, row), states(alone_cache), what=f"state of row {row}")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradients_of_batch_equal_gradients_of_rows(own_model, mask):
    model, ids, mask = own_model.train(), random_ids(3, T), torch.tensor(mask)
    readout = torch.randn(3, T, model.config.vocab_size)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    (logits * readout)[mask == 1].sum().backward()
    together, together_embeds = gradients(model), embeds.grad
    assert together_embeds[mask == 0].abs().max().item() == 0 if (mask == 0).any() else True

    for row, real in enumerate(mask.bool()):
        alone = embeds[row, real].detach()[None].requires_grad_()
        (model(inputs_embeds=alone).logits * readout[row, real]).sum().backward()
        assert_gradients_close({"embeds": together_embeds[row, real]}, {"embeds": alone.grad[0]})
    # Without an embedding lookup that table has no gradient.
    rows = {name: g for name, g in gradients(model).items() if g is not None}
    assert_gradients_close({name: together[name] for name in rows}, rows)
    assert len(rows) == len(list(model.parameters())) - 1


def test_batch_equals_batches_of_one(model):
    ids = random_ids(5, T)
    logits, cache = forward(model, ids)
    for row in range(5):
        alone, alone_cache = forward(model, ids[row : row + 1])
        assert_close(logits[row : row + 1], alone)
        assert_close(states(cache, row), states(alone_cache))


def test_padding_content_does_not_matter(model):
    ids, other = random_ids(3, T), random_ids(3, T, seed=1)
    for mask in map(torch.tensor, MASKS.values()):
        logits, cache = forward(model, ids, attention_mask=mask)
        changed, changed_cache = forward(model, torch.where(mask == 1, ids, other), attention_mask=mask)
        assert torch.equal(logits[mask == 1], changed[mask == 1])
        assert all(map(torch.equal, states(cache), states(changed_cache)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_mask_dtypes(model, dtype):
    ids, mask = random_ids(3, T), torch.tensor(MASKS["holes"])
    expected, _ = forward(model, ids, attention_mask=mask)
    logits, _ = forward(model, ids, attention_mask=mask.to(dtype))
    assert torch.equal(logits[mask == 1], expected[mask == 1])


def test_row_without_real_tokens_keeps_its_state(model):
    """A row can be all padding in one slice, and in its first slice."""
    ids, mask = random_ids(2, T), torch.ones(2, T, dtype=torch.long)
    mask[1, :9] = 0
    mask[0, 9:16] = 0
    logits, cache = in_slices(model, ids, [9, 16, T], mask)
    for row, real in enumerate(mask.bool()):
        alone, alone_cache = forward(model, ids[row, real][None])
        assert_close(logits[row, real], alone[0])
        assert_close(states(cache, row), states(alone_cache))


def test_masked_single_token_step(model):
    """One row of a batch may pause while the others decode."""
    ids = random_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    logits, cache = in_slices(model, ids, [4, 5, 6], mask)
    alone, alone_cache = forward(model, ids[:1, [0, 1, 2, 3, 5]])
    assert_close(logits[0, -1], alone[0, -1])
    assert_close(states(cache, 0), states(alone_cache))


def test_padding_token_by_token(model):
    """Also before there is anything to carry."""
    ids = random_ids(2, 5)
    mask = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    logits, cache = in_slices(model, ids, range(1, 6), mask)
    alone, alone_cache = forward(model, ids[:1, [2, 4]])
    assert_close(logits[0, [2, 4]], alone[0])
    assert_close(states(cache, 0), states(alone_cache))


def test_copied_cache_is_independent(model):
    ids = random_ids(2, T)
    _, cache = forward(model, ids)
    before = [t.clone() for t in states(cache)]
    first, second = copy.deepcopy(cache), copy.deepcopy(cache)
    logits = []
    for fork, seed in ((first, 1), (second, 2)):
        forward(model, random_ids(2, 5, seed=seed), fork)
        logits.append(forward(model, random_ids(2, 3, seed=3), fork)[0])
    assert all(map(torch.equal, states(cache), before))
    assert (logits[0] - logits[1]).abs().max() > 0.1
    for got, seed in zip(logits, (1, 2), strict=True):
        history = torch.cat([ids, random_ids(2, 5, seed=seed), random_ids(2, 3, seed=3)], 1)
        assert_close(got, forward(model, history)[0][:, -3:])


def test_returned_state_does_not_alias_the_model(model):
    """A second forward without cache leaves the first one's cache alone."""
    _, cache = forward(model, random_ids(2, T))
    before = [t.clone() for t in states(cache)]
    forward(model, random_ids(2, T, seed=1))
    assert all(map(torch.equal, states(cache), before))


def test_cache_rows_can_be_reordered_repeated_and_selected(model):
    ids, new = random_ids(3, T), random_ids(3, 4, seed=1)
    _, cache = forward(model, ids)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert_close(
        forward(model, new, copy.deepcopy(cache))[0], forward(model, torch.cat([ids[order], new], 1))[0][:, -4:]
    )
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    rows, new = order[torch.tensor([0, 0, 1, 1])], random_ids(4, 4, seed=2)
    assert_close(forward(model, new, cache)[0], forward(model, torch.cat([ids[rows], new], 1))[0][:, -4:])


def test_cache_reset_starts_anew(model):
    ids = random_ids(2, T)
    expected, _ = forward(model, ids)
    _, cache = forward(model, random_ids(2, 9, seed=1))
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    logits, cache = forward(model, ids, cache)
    assert_close(logits, expected)
    assert int(cache.get_seq_length()) == T


def test_state_layout_and_precision(model):
    """WKV state float32, shifts in the model's dtype with a time axis, and a size that does not grow."""
    _, cache = forward(model, random_ids(2, 5))
    shapes = [t.shape for t in states(cache)]
    _, cache = forward(model, random_ids(2, T), cache)
    assert [t.shape for t in states(cache)] == shapes
    C = model.config.hidden_size
    for layer in cache.layers:
        assert all(t.shape == (2, C, 1) for t in layer.conv_states.values())
        assert layer.recurrent_states[0].dtype == torch.float32


def test_use_cache_flags(model):
    ids = random_ids(2, T)
    with torch.no_grad():
        without = model(ids, use_cache=False)
        default = model(ids)
        given = model(ids, past_key_values=DynamicCache(config=model.config))
    assert without.past_key_values is None
    assert default.past_key_values is not None
    assert torch.equal(without.logits, default.logits)
    assert torch.equal(without.logits, given.logits)
    assert_close(states(given.past_key_values), states(default.past_key_values))


def test_training_forward_builds_no_cache_unless_asked(own_model):
    model = own_model.train()
    assert model(random_ids(2, 5)).past_key_values is None
    assert model(random_ids(2, 5), use_cache=True).past_key_values is not None


def test_train_mode_equals_eval_mode(own_model):
    ids = random_ids(2, T)
    expected, _ = forward(own_model, ids)
    logits, _ = forward(own_model.train(), ids)
    assert torch.equal(logits, expected)


def test_cached_step_of_a_batch_has_the_shape_of_its_input(model):
    _, cache = forward(model, random_ids(3, 5))
    logits, _ = forward(model, random_ids(3, 1), cache)
    assert logits.shape == (3, 1, model.config.vocab_size)
