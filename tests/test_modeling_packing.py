"""Packed documents: each one equals that document alone, in whatever way the boundaries are described.

Letters: B rows, T tokens, n documents.
"""

import pytest
import torch
from conftest import assert_close, assert_gradients_close, gradients, random_ids, states
from transformers import DataCollatorWithFlattening

LENGTHS = [7, 1, 2, 13, 70, 4]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
DOCUMENT = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
DESCRIPTIONS = {
    "position_ids": {"position_ids": POSITIONS},
    "cu_seq_lens": {"cu_seq_lens_q": BOUNDS.int(), "cu_seq_lens_k": BOUNDS.int(), "max_length_q": max(LENGTHS)},
    "cu_seq_lens+position_ids": {"cu_seq_lens_q": BOUNDS, "position_ids": POSITIONS},
    "seq_idx": {"seq_idx": DOCUMENT.int()},
    "all": {"cu_seq_lens_q": BOUNDS.int(), "position_ids": POSITIONS, "seq_idx": DOCUMENT.int()},
}


@pytest.fixture(params=DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def description(request):
    return request.param


def documents(ids):
    return ids.split(LENGTHS, 1)


def test_document_equals_document_alone(model, description):
    ids = random_ids(1, sum(LENGTHS))
    with torch.no_grad():
        packed = model(ids, use_cache=True, **description)
        alone = [model(document, use_cache=True) for document in documents(ids)]
    assert_close(packed.logits, torch.cat([out.logits for out in alone], 1))
    # The state that a packed row leaves is that of its last document.
    assert_close(states(packed.past_key_values), states(alone[-1].past_key_values), what="state")


def test_documents_matter(model, description):
    """The boundaries change the result: the test above can fail."""
    ids = random_ids(1, sum(LENGTHS))
    with torch.no_grad():
        difference = (model(ids, **description).logits - model(ids).logits).abs()[0]
    assert difference[: LENGTHS[0]].max() < 1e-4
    assert difference[LENGTHS[0] :].max() > 0.1


def test_gradients_equal_gradients_of_documents_alone(own_model, description):
    model, ids = own_model.train(), random_ids(1, sum(LENGTHS))
    readout = torch.randn(1, sum(LENGTHS), model.config.vocab_size)
    (model(ids, **description).logits * readout).sum().backward()
    packed = gradients(model)
    for document, weights in zip(documents(ids), readout.split(LENGTHS, 1), strict=True):
        (model(document).logits * weights).sum().backward()
    assert_gradients_close(packed, gradients(model))


def test_rows_of_a_batch_pack_differently(model):
    """`position_ids` and `seq_idx` may restart at other places in every row."""
    ids, lengths = random_ids(3, 20), [[20], [5, 15], [1, 9, 9, 1]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    index = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    for description in ({"position_ids": positions}, {"seq_idx": index}):
        with torch.no_grad():
            packed = model(ids, use_cache=True, **description)
            for row in range(3):
                alone = [model(piece, use_cache=True) for piece in ids[row : row + 1].split(lengths[row], 1)]
                assert_close(packed.logits[row : row + 1], torch.cat([out.logits for out in alone], 1))
                assert_close(states(packed.past_key_values, row), states(alone[-1].past_key_values))


@pytest.mark.parametrize(
    "description", [{"cu_seq_lens_q": torch.tensor([0, 4, 9])}, {"seq_idx": torch.tensor([[3] * 4 + [4] * 5])}]
)
def test_first_document_continues_the_cache(model, description):
    """A forward on a cache: its first document goes on where the cache ends, the next one starts anew."""
    ids = random_ids(1, 14)
    with torch.no_grad():
        first = model(ids[:, :9]).logits[:, 5:]
        second = model(ids[:, 9:], use_cache=True)
        cache = model(ids[:, :5], use_cache=True).past_key_values
        packed = model(ids[:, 5:], past_key_values=cache, **description)
    assert_close(packed.logits, torch.cat([first, second.logits], 1))
    assert_close(states(cache), states(second.past_key_values))


def test_positions_of_one_row_hold_for_all(model):
    """`position_ids` (1, T) beside a batch are those of every row."""
    ids = random_ids(2, sum(LENGTHS))
    with torch.no_grad():
        packed = model(ids, position_ids=POSITIONS, use_cache=True)
        for row in range(2):
            alone = model(ids[row : row + 1], position_ids=POSITIONS, use_cache=True)
            assert_close(packed.logits[row : row + 1], alone.logits)
            assert_close(states(packed.past_key_values, row), states(alone.past_key_values))


# How the padding of a row of documents 0, 1, ... is described beside a mask.
@pytest.mark.parametrize("padding", ["position_ids", "seq_idx -1", "seq_idx 0", "seq_idx new", "seq_idx as the last"])
def test_packed_rows_with_right_padding(model, padding):
    """Packed rows of unequal length, padded to one."""
    ids, lengths, T = random_ids(2, 20), [[8, 12], [5, 6]], 20
    positions, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    number = {"seq_idx -1": -1, "seq_idx 0": 0, "seq_idx new": 2}.get(padding, 1)
    index = torch.full((2, T), number)
    for row, pieces in enumerate(lengths):
        total = sum(pieces)
        positions[row, :total] = torch.cat([torch.arange(n) for n in pieces])
        index[row, :total] = torch.cat([torch.full((n,), i) for i, n in enumerate(pieces)])
        mask[row, :total] = 1
    description = {"position_ids": positions} if padding == "position_ids" else {"seq_idx": index}
    with torch.no_grad():
        packed = model(ids, attention_mask=mask, use_cache=True, **description)
        for row, pieces in enumerate(lengths):
            start = 0
            for n in pieces:
                alone = model(ids[row : row + 1, start : start + n], use_cache=True)
                assert_close(packed.logits[row : row + 1, start : start + n], alone.logits)
                start += n
            assert_close(states(packed.past_key_values, row), states(alone.past_key_values))


def test_plain_position_ids_change_nothing(model):
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        for positions in (torch.arange(20)[None], torch.arange(20).expand(2, 20), torch.arange(3, 23)[None]):
            assert torch.equal(model(ids, position_ids=positions).logits, expected)


def test_flattening_collator(own_model):
    """What `DataCollatorWithFlattening` makes of a batch trains as the padded batch does."""
    model = own_model.train()
    texts = [random_ids(n, seed=n).tolist() for n in (5, 9, 2)]
    flat = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text} for text in texts])
    loss = model(**flat).loss
    loss.backward()
    packed = gradients(model)

    ids, labels = torch.zeros(3, 9, dtype=torch.long), torch.full((3, 9), -100)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = labels[row, : len(text)] = torch.tensor(text)
    padded_loss = model(ids, attention_mask=(labels >= 0).long(), labels=labels).loss
    padded_loss.backward()
    assert_close(loss, padded_loss)
    assert_gradients_close(packed, gradients(model))
