"""`generate` in every way that transformers offers, each against a plain loop over the whole text.

Letters: B rows, T tokens of the prompt, V vocabulary.
"""

import copy

import pytest
import torch
from conftest import assert_close, random_ids, states
from transformers import CompileConfig, GenerationConfig, set_seed
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

NEW = 12


@pytest.fixture
def generator(own_model):
    """A model that never ends a text by itself."""
    own_model.generation_config = GenerationConfig(
        eos_token_id=None, pad_token_id=0, max_new_tokens=NEW, do_sample=False
    )
    return own_model


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.log_softmax(-1)


def greedy_loop(model, ids, steps=NEW):
    for _ in range(steps):
        ids = torch.cat([ids, log_probabilities(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy(generator):
    ids = random_ids(3, 7)
    assert torch.equal(generator.generate(ids), greedy_loop(generator, ids))
    assert torch.equal(generator.generate(ids, use_cache=False), greedy_loop(generator, ids))


def test_prompt_of_one_token_and_one_new_token(generator):
    ids = random_ids(2, 1)
    assert torch.equal(generator.generate(ids), greedy_loop(generator, ids))
    assert torch.equal(generator.generate(ids, max_new_tokens=1), greedy_loop(generator, ids, 1))


def test_end_of_text(generator):
    """A row that ends is filled up with padding; the others go on as if alone."""
    ids = random_ids(3, 7)
    free = greedy_loop(generator, ids)
    end = int(free[0, 7 + 3])
    out = generator.generate(ids, eos_token_id=end)
    for row in range(3):
        new = free[row, 7:].tolist()
        stop = new.index(end) + 1 if end in new else NEW
        assert out[row, 7 : 7 + stop].tolist() == new[:stop]
        assert not out[row, 7 + stop :].any()


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}], ids=str)
def test_sampling(generator, options):
    """The cache changes nothing about what a seed draws."""
    ids, drawn = random_ids(3, 7), []
    for use_cache, seed in ((True, 0), (False, 0), (True, 1)):
        set_seed(seed)
        drawn.append(generator.generate(ids, do_sample=True, use_cache=use_cache, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_num_return_sequences(generator):
    ids = random_ids(2, 7)
    set_seed(0)
    several = generator.generate(ids, do_sample=True, num_return_sequences=3)
    set_seed(0)
    repeated = generator.generate(ids.repeat_interleave(3, 0), do_sample=True)
    assert torch.equal(several, repeated)
    assert len({tuple(row) for row in several.tolist()}) > 2


def beam_search(model, ids, beams, steps):
    """Beams of one prompt by hand, the whole text again at every step: sequences and summed log-probabilities."""
    sequences, scores = ids, torch.zeros(1)
    for _ in range(steps):
        expanded = scores[:, None] + log_probabilities(model, sequences)[:, -1]
        scores, best = expanded.flatten().topk(beams)
        V = expanded.shape[1]
        sequences = torch.cat([sequences[best // V], (best % V)[:, None]], 1)
    return sequences, scores


@pytest.mark.parametrize("beams", [2, 4])
def test_beams(generator, beams):
    ids = random_ids(2, 7)
    out = generator.generate(
        ids, num_beams=beams, num_return_sequences=beams, return_dict_in_generate=True, output_scores=True
    )
    for row in range(2):
        rows = slice(row * beams, (row + 1) * beams)
        sequences, scores = beam_search(generator, ids[row : row + 1], beams, NEW)
        assert torch.equal(out.sequences[rows], sequences)
        assert_close(out.sequences_scores[rows], scores / NEW)


def test_beams_with_left_padding(generator):
    ids, mask = random_ids(2, 9), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    out = generator.generate(ids * mask, attention_mask=mask, num_beams=3)
    for row, real in enumerate(mask.bool()):
        sequences, _ = beam_search(generator, ids[row : row + 1, real], 3, NEW)
        assert out[row, 9:].tolist() == sequences[0, int(real.sum()) :].tolist()


def test_left_padded_batch_equals_rows_alone(generator):
    lengths = [3, 11, 1, 7]
    ids, mask = torch.zeros(4, 11, dtype=torch.long), torch.zeros(4, 11, dtype=torch.long)
    prompts = [random_ids(1, n, seed=n) for n in lengths]
    for row, prompt in enumerate(prompts):
        ids[row, 11 - prompt.shape[1] :], mask[row, 11 - prompt.shape[1] :] = prompt[0], 1
    out = generator.generate(ids, attention_mask=mask, return_dict_in_generate=True)
    for row, prompt in enumerate(prompts):
        alone = generator.generate(prompt, return_dict_in_generate=True)
        assert out.sequences[row, 11:].tolist() == alone.sequences[0, prompt.shape[1] :].tolist()
        assert_close(states(out.past_key_values, row), states(alone.past_key_values))


def test_generated_tokens_have_no_mask(generator, monkeypatch):
    """Whether it hides something would be asked of the GPU for every token."""

    def as_it_is(attention_mask, **_):
        return attention_mask

    monkeypatch.setattr(type(generator), "create_masks_for_generate", staticmethod(as_it_is))
    masks = []
    generator.register_forward_pre_hook(
        lambda _, args, given: masks.append(given.get("attention_mask")), with_kwargs=True
    )
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    generator.generate(random_ids(2, 4), attention_mask=mask)
    assert torch.equal(masks[0], mask) and len(masks) == NEW and not any(m is not None for m in masks[1:])


@pytest.mark.parametrize("cache", ["static", "offloaded", "dynamic"])
def test_cache_implementations(generator, cache):
    ids = random_ids(2, 7)
    assert torch.equal(generator.generate(ids, cache_implementation=cache), greedy_loop(generator, ids))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_given_caches(generator, cache_class):
    ids = random_ids(2, 7)
    arguments = {"max_cache_len": 64} if cache_class is StaticCache else {}
    cache = cache_class(config=generator.config, **arguments)
    assert torch.equal(generator.generate(ids, past_key_values=cache), greedy_loop(generator, ids))
    assert int(cache.get_seq_length()) == 7 + NEW - 1


@pytest.mark.parametrize("masked", [False, True])
def test_compiled(generator, masked):
    """What a GPU does by itself with a static cache: compiled decoding, here asked for on the CPU."""
    torch._dynamo.reset()
    ids = random_ids(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]) if masked else torch.ones_like(ids)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    out = generator.generate(ids, attention_mask=mask, cache_implementation="static", compile_config=config)
    assert torch.equal(out, generator.generate(ids, attention_mask=mask))
    assert not torch.equal(out, generator.generate(ids)) or not masked


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
def test_chunked_prefill(generator, chunk):
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    expected = generator.generate(ids, attention_mask=mask)
    assert torch.equal(generator.generate(ids, attention_mask=mask, prefill_chunk_size=chunk), expected)


def test_continuing_with_all_ids(generator):
    """A chat: every turn hands over the whole text and the cache of the turns before."""
    text, cache = random_ids(2, 7), DynamicCache(config=generator.config)
    for turn in range(3):
        text = torch.cat([text, random_ids(2, 4, seed=turn)], 1)
        out = generator.generate(text, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(out.sequences, greedy_loop(generator, text))
        text, cache = out.sequences, out.past_key_values


def test_continuing_with_new_ids_and_the_whole_mask(generator):
    first = generator.generate(random_ids(2, 7), return_dict_in_generate=True)
    # The last token was generated but not yet read.
    new = torch.cat([first.sequences[:, -1:], random_ids(2, 4, seed=1)], 1)
    mask = torch.ones(2, int(first.past_key_values.get_seq_length()) + 5, dtype=torch.long)
    out = generator.generate(new, attention_mask=mask, past_key_values=first.past_key_values)
    whole = torch.cat([first.sequences, new[:, 1:]], 1)
    assert torch.equal(out[:, 5:], greedy_loop(generator, whole)[:, whole.shape[1] :])


def test_one_prefill_many_continuations(generator):
    """A shared prompt is read once; its cache is copied for every continuation."""
    prompt, out = random_ids(1, 20), []
    with torch.no_grad():
        cache = generator(prompt, use_cache=True).past_key_values
    for seed in (1, 2):
        text = torch.cat([prompt, random_ids(1, 3, seed=seed)], 1)
        out.append((generator.generate(text, past_key_values=copy.deepcopy(cache)), greedy_loop(generator, text)))
    assert all(torch.equal(got, expected) for got, expected in out)
    cache.batch_repeat_interleave(4)
    set_seed(0)
    rows = generator.generate(prompt.expand(4, -1), past_key_values=cache, do_sample=True, max_new_tokens=2)
    assert rows.shape == (4, 22)


def test_inputs_embeds(generator):
    ids = random_ids(2, 7)
    embeds = generator.get_input_embeddings()(ids)
    expected = greedy_loop(generator, ids)
    assert torch.equal(generator.generate(inputs_embeds=embeds), expected[:, 7:])
    assert torch.equal(generator.generate(ids, inputs_embeds=embeds), expected)


def test_classifier_free_guidance(generator):
    """Two states side by side: that of the prompt and that of the negative prompt."""
    ids, negative, scale = random_ids(1, 7), random_ids(1, 5, seed=1), 1.7
    out = generator.generate(ids, guidance_scale=scale, negative_prompt_ids=negative)
    text = ids
    for _ in range(NEW):
        # The processor starts the unconditional text with the negative prompt.
        other = torch.cat([negative, text[:, 7:]], 1)
        conditional, unconditional = (log_probabilities(generator, t)[:, -1] for t in (text, other))
        choice = (scale * (conditional - unconditional) + unconditional).argmax(-1, keepdim=True)
        text = torch.cat([text, choice], 1)
    assert torch.equal(out, text)


class Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.calls, self.ended = [], 0, False

    def put(self, value):
        self.ids += value.flatten().tolist()
        self.calls += 1

    def end(self):
        self.ended = True


def test_streaming(generator):
    ids, streamer = random_ids(1, 7), Collector()
    out = generator.generate(ids, streamer=streamer)
    assert streamer.ids == out[0].tolist()
    assert streamer.calls == 1 + NEW
    assert streamer.ended


def test_scores_are_those_of_the_whole_text(generator):
    ids = random_ids(2, 7)
    out = generator.generate(ids, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = generator(out.sequences, use_cache=False).logits
    assert_close(torch.stack(out.logits, 1), whole[:, 6:-1])


def test_generate_in_half_precision(generator):
    out = generator.bfloat16().generate(random_ids(2, 7), return_dict_in_generate=True)
    assert out.sequences.shape == (2, 7 + NEW)
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in out.past_key_values.layers)


@pytest.mark.parametrize("assistant", ["model", "prompt lookup"])
def test_assisted_decoding_is_refused(generator, assistant):
    """It would have to take tokens back out of the state."""
    options = {"assistant_model": generator} if assistant == "model" else {"prompt_lookup_num_tokens": 3}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generator.generate(random_ids(1, 7), **options)
