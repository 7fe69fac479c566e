"""Text and caches: the fused step writes what the modules write, and both go on from one another's state.

Letters: T tokens.
"""

import pytest
import torch
from conftest import assert_close, random_ids, states
from step_cases import IDS, decode, module_by_module, plain_model, steps  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache

import wkv


@pytest.fixture
def generator(plain_model):  # noqa: F811
    plain_model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    return plain_model


GENERATE = {
    "greedy": {"max_new_tokens": 220},
    "beams": {"max_new_tokens": 30, "num_beams": 4, "num_return_sequences": 2},
    "static-cache": {"max_new_tokens": 30, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_generate(generator, options, steps):  # noqa: F811
    prompt = random_ids(3, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    out = generator.generate(prompt, attention_mask=mask, **options)
    assert len(steps) >= options["max_new_tokens"] - 1
    with module_by_module():
        assert torch.equal(out, generator.generate(prompt, attention_mask=mask, **options))


def test_caches_are_shared_with_the_modules(plain_model, steps):  # noqa: F811
    """Whichever way a token goes, reordering, growing and resetting the batch in between."""
    ids, results = random_ids(4, 9), []
    for fused in (True, False):
        for kind in (DynamicCache, StaticCache):
            cache = kind(config=plain_model.config, **({} if kind is DynamicCache else {"max_cache_len": 20}))
            logits = []
            for t in range(9):
                rows = ids if t >= 5 else ids[:2]
                if t == 5:
                    cache.batch_repeat_interleave(2)
                if t == 7:
                    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
                if t == 8:
                    cache.reset()
                if fused and t % 3:
                    logits.append(decode(plain_model, rows[:, t : t + 1], cache)[0])
                else:
                    with module_by_module():
                        logits.append(decode(plain_model, rows[:, t : t + 1], cache)[0])
            results.append(logits)
    assert len(steps) == 12
    for other in results[1:]:
        assert_close(other, results[0])


def test_a_cache_that_does_not_fit_is_refused_unchanged(plain_model):  # noqa: F811
    _, cache = decode(plain_model, IDS)
    before = [x.clone() for x in states(cache)]
    with torch.no_grad(), pytest.raises(ValueError, match="another model or"):
        plain_model(random_ids(3, 1), past_key_values=cache)
    assert all(torch.equal(x, y) for x, y in zip(states(cache), before, strict=True))


def test_the_demo_model_writes_the_same_2000_tokens(steps):  # noqa: F811
    """Greedy text is the same if, after every prefix of it, the modules choose the next token too."""
    folder, T = wkv.demo_model_path(), 2000
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(folder)("My fellow Americans,", return_tensors="pt").input_ids
    text = model.generate(prompt, max_new_tokens=T, eos_token_id=None, do_sample=False)
    assert len(steps) == T - 1
    with torch.no_grad(), module_by_module():
        choices = model(text, use_cache=False).logits.argmax(-1)
    assert text.shape[1] == prompt.shape[1] + T and text.unique().numel() > 50
    assert torch.equal(choices[:, prompt.shape[1] - 1 : -1], text[:, prompt.shape[1] :])
