"""The official sampler against the `rwkv` package's pipeline, and its presets in `generate`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import busy_model, random_ids
from transformers import GenerationConfig, LogitsProcessorList, set_seed

from wkv.presets import PRESETS
from wkv.sampling import RwkvSampling, generate_arguments, generation_config, preset
from wkv.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(pieces=[b"\n\n", "é".encode(), b"12", b" the", b"User"])


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.85), (0.3, 0.3), (2.0, 0.99), (1.5, 0.0)])
def test_sampler_has_the_distribution_of_the_official_pipeline(temperature, top_p, tokenizer, monkeypatch):
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    vocabulary, steps = 262, 60
    logits = 3 * torch.randn(steps, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, [33, 49, 259]] += 6  # " ", "0", "12": their repetitions are not counted
    rng, expected, drawn = np.random.default_rng(0), [], []

    def choice(a, p):
        expected.append(torch.tensor(p).float())
        drawn.append(int(rng.choice(a, p=p / p.sum(dtype=np.float64))))
        return drawn[-1]

    class Model:
        def forward(self, tokens, state):
            return logits[len(drawn)].clone(), state

    class Pipeline(PIPELINE):
        def __init__(self):
            self.model, self.tokenizer = Model(), None

        def encode(self, text):
            return [1]

        def decode(self, ids):
            return tokenizer.decode(ids)

    monkeypatch.setattr(np.random, "choice", choice)
    settings = PIPELINE_ARGS(temperature=temperature, top_p=top_p, alpha_frequency=0.4, alpha_presence=0.3)
    Pipeline().generate("", token_count=steps, args=settings)
    # top_p 0 is greedy here, which `generate` does without a sampler.
    settings = PRESETS["text"]._replace(temperature=temperature, top_p=max(top_p, 1e-9), presence=0.3, frequency=0.4)
    options = generate_arguments(tokenizer, 1, settings)
    processors: LogitsProcessorList = options["logits_processor"]
    for step in range(steps):
        ids = torch.tensor([[1, *drawn[:step]]])
        actual = processors(ids, logits[step : step + 1]).softmax(-1)[0]
        torch.testing.assert_close(actual, expected[step], atol=1e-6, rtol=1e-3)
    assert len(set(drawn)) < steps, "nothing was drawn twice: the penalties were not at work"


@pytest.mark.parametrize(
    "temperature, top_p, culprit", [(0.0, 0.5, "temperature"), (-1.0, 0.5, "temperature"), (1.0, 1.5, "top_p")]
)
def test_sampler_refuses_settings_that_mean_nothing(temperature, top_p, culprit):
    with pytest.raises(ValueError, match=culprit):
        RwkvSampling(0, temperature, top_p)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_generate(name, tokenizer):
    """What is drawn is what the sampler makes of the model's own logits; in chats id 0 never comes."""
    model, ids = busy_model("rwkv7", vocab_size=262), random_ids(2, 7)
    # A model that would end every text at once, were it not forbidden.
    with torch.no_grad():
        model.model.norm.bias.fill_(1.0)
        model.lm_head.weight[0].fill_(0.25)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    set_seed(0)
    arguments = preset(name, tokenizer, 7)
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(ids, **arguments, **options)
    row = PRESETS[name]
    for step in (0, 20, 39):
        logits = out.logits[step].clone()
        logits[:, 0] = logits[:, 0] - 1e10 if row.forbids_end else logits[:, 0]
        expected = arguments["logits_processor"](out.sequences[:, : 7 + step], logits)
        assert torch.equal(out.scores[step].softmax(-1), expected.softmax(-1))
    assert row.forbids_end == (name in ("chat", "raven", "tuned"))
    assert (out.sequences[:, 7:] == 0).any() != row.forbids_end
    assert generate_arguments(tokenizer, 7, row._replace(top_p=0))["do_sample"] is False


def test_presets_are_the_official_numbers(tokenizer):
    assert {name: row[:5] for name, row in PRESETS.items()} == {
        "text": (1.0, 0.85, 0.2, 0.2, 0.996),
        "chat": (1.0, 0.3, 0.5, 0.5, 0.996),
        "raven": (1.2, 0.5, 0.4, 0.4, 0.996),
        "tuned": (1.0, 0.2, 0.3, 0.3, 0.996),
        "reasoning": (0.3, 0.3, 0.0, 0.0, 0.996),
    }
    [sampler] = preset("chat", tokenizer, 3, presence=0.1, decay=0.9)["logits_processor"]
    assert (sampler.temperature, sampler.top_p, sampler.presence, sampler.frequency) == (1.0, 0.3, 0.1, 0.5)
    assert sampler.decay == 0.9
    assert sampler.uncounted == [] != preset("text", tokenizer, 3)["logits_processor"][0].uncounted
    with pytest.raises(ValueError, match="'talk': one of text, chat, raven, tuned, reasoning"):
        preset("talk", tokenizer, 3)


def test_generation_configs_load_without_wkv(tmp_path):
    for name in PRESETS:
        generation_config(name, max_new_tokens=9).save_pretrained(tmp_path / name)
    script = """
import json, sys
from transformers import GenerationConfig
configs = {name: GenerationConfig.from_pretrained(sys.argv[1] + "/" + name).to_diff_dict() for name in sys.argv[2:]}
assert "wkv" not in sys.modules
print(json.dumps(configs))
"""
    command = [sys.executable, "-c", script, str(tmp_path), *PRESETS]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    configs = json.loads(run.stdout)
    for name, row in PRESETS.items():
        config = {"temperature": 1.0, "top_p": 1.0, **configs[name]}
        assert config["do_sample"] and (config["temperature"], config["top_p"]) == row[:2]
        assert config.get("suppress_tokens") == ([0] if row.forbids_end else None) and config["max_new_tokens"] == 9
        assert config["bos_token_id"] == config["eos_token_id"] == config["pad_token_id"] == 0
