"""The metrics that `evaluate` loads by path, of our models and others; `evaluate`'s evaluator and pipelines on ours."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import peft
import pytest
import torch
from conftest import assert_close, busy_model
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

import wkv
from wkv import text_scores
from wkv.eval_tasks import eval_folder
from wkv.models.tokenization_rwkv import RwkvTokenizer
from wkv.text_scores import log_likelihoods

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from corpus import bits_per_byte, split

METRICS = eval_folder() / "metrics"
TEXT = "My fellow citizens, the state of the Union is strong — naïve as it sounds."
WORDS = """
import datasets
import evaluate

class Words(evaluate.Measurement):
    def _info(self):
        features = datasets.Features({"data": datasets.Value("string")})
        return evaluate.MeasurementInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, data):
        return {"texts": data}
"""


class Letters:
    """A tokenizer for vocabularies of 50: a letter, a token."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[1 + ord(c) % 49 for c in text]).__dict__


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load(name, folder=METRICS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("socket.socket.connect", lambda *_: pytest.fail("a metric wants the network"))
            return evaluate.load(str(folder / name), cache_dir=str(tmp_path_factory.mktemp("cache")))

    return load


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def directly(model, ids: list[int], start: int = 0) -> torch.Tensor:
    """Log-probabilities of the ids after `start`, in one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[start, *ids[:-1]]]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def ids_of(text: str) -> list[int]:
    return Letters()(text, False)["input_ids"]


def test_slices_with_one_state_are_one_pass(model, monkeypatch):
    expected = directly(model, ids_of(TEXT))
    assert_close(log_likelihoods(model, Letters(), TEXT), expected)
    monkeypatch.setattr(text_scores, "SLICE", 7)
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert_close(log_likelihoods(model, Letters(), TEXT), expected)
    finally:
        handle.remove()
    assert max(sizes) == 7 and sum(sizes) == len(TEXT)


def test_the_mode_of_the_model_stays(own_model):
    own_model.train()
    assert_close(log_likelihoods(own_model, Letters(), "abc"), directly(own_model.eval(), ids_of("abc")))
    own_model.train()
    log_likelihoods(own_model, Letters(), "abc")
    assert own_model.training and not any(p.grad is not None for p in own_model.parameters())


def test_a_short_text_of_another_model_is_one_pass(llama):
    assert_close(log_likelihoods(llama, Letters(), TEXT[:16]), directly(llama, ids_of(TEXT[:16])))


@pytest.mark.parametrize("max_length, stride", [(None, None), (16, 16), (12, 5), (8, 1)])
def test_windows_are_what_they_are_said_to_be(llama, max_length, stride, monkeypatch):
    """Read in slices of which only one has its logits at a time."""
    monkeypatch.setattr(text_scores, "SLICE", 5)
    sizes = []
    with monkeypatch.context() as patch:
        of_targets = text_scores._of_targets
        patch.setattr(
            text_scores, "_of_targets", lambda logits, ids: (sizes.append(len(logits)), of_targets(logits, ids))[1]
        )
        found = log_likelihoods(llama, Letters(), TEXT, max_length=max_length, stride=stride)
    assert max(sizes) == 5
    length, step = max_length or 16, stride or 8
    ids = [0, *ids_of(TEXT)]
    for position in range(1, len(ids)):
        # The first window in which token `position` is predicted.
        begin = next(b for b in range(0, len(ids), step) if position <= b + length)
        expected = directly(llama, ids[begin + 1 : position + 1], start=ids[begin])[-1]
        assert_close(found[position - 1], expected)
        assert position <= length or position - begin > length - step


def test_a_model_without_a_cache_reads_all_at_once(llama, monkeypatch):
    expected = log_likelihoods(llama, Letters(), TEXT[:16])
    monkeypatch.setattr(text_scores, "SLICE", 5)
    whole = llama.forward
    monkeypatch.setattr(
        llama, "forward", lambda input_ids, **_: SimpleNamespace(logits=whole(input_ids=input_ids).logits)
    )
    assert_close(log_likelihoods(llama, Letters(), TEXT[:16]), expected)


def test_a_learned_prompt_is_refused(own_model):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1)
    with pytest.raises(ValueError, match="learned prompt"):
        log_likelihoods(peft.get_peft_model(own_model, prompt), Letters(), "abc")


def test_a_window_that_cannot_be_is_refused(llama, model):
    for options in (
        {"max_length": 17},
        {"stride": 17},
        {"max_length": 8, "stride": 9},
        {"stride": 0},
        {"max_length": 0},
    ):
        with pytest.raises(ValueError, match="1 <= stride <= max_length <= 16 must hold"):
            log_likelihoods(llama, Letters(), TEXT, **options)
    with pytest.raises(ValueError, match="reads a text in one piece"):
        log_likelihoods(model, Letters(), TEXT, max_length=8)


def test_texts_and_tokenizers_without_what_is_needed(llama):
    with pytest.raises(ValueError, match="'' has no tokens"):
        log_likelihoods(llama, Letters(), "")
    nothing = Letters()
    nothing.eos_token_id = None
    with pytest.raises(ValueError, match="give `start_token`"):
        log_likelihoods(llama, nothing, "a")
    expected = directly(llama, ids_of("a"), start=3)
    assert_close(log_likelihoods(llama, nothing, "a", start_token=3), expected)


def test_metrics_are_those_of_the_log_likelihoods(load, model):
    texts = [TEXT, "é€", "abc"]
    nats = [-directly(model, ids_of(text)) for text in texts]
    bits = [n.sum().item() / math.log(2) for n in nats]
    sizes = [len(text.encode()) for text in texts]
    found = load("bits_per_byte").compute(predictions=texts, model=model, tokenizer=Letters())
    assert found["bits_per_byte"] == pytest.approx([b / size for b, size in zip(bits, sizes, strict=True)], rel=1e-5)
    assert found["mean_bits_per_byte"] == pytest.approx(sum(found["bits_per_byte"]) / 3)
    assert found["total_bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    found = load("perplexity").compute(predictions=texts, model=model, tokenizer=Letters())
    assert found["perplexities"] == pytest.approx([n.mean().exp().item() for n in nats], rel=1e-5)
    assert found["mean_perplexity"] == pytest.approx(sum(found["perplexities"]) / 3)
    assert found["total_perplexity"] == pytest.approx(torch.cat(nats).mean().exp().item(), rel=1e-5)


def test_metrics_of_another_model_take_windows(load, llama):
    options = {"model": llama, "tokenizer": Letters(), "max_length": 12, "stride": 5}
    expected = -log_likelihoods(llama, Letters(), TEXT, max_length=12, stride=5).mean()
    found = load("perplexity").compute(predictions=[TEXT], **options)["perplexities"]
    assert found == pytest.approx([expected.exp().item()])


def test_metrics_of_the_shipped_model_are_those_of_its_training(load):
    folder = wkv.demo_model_path()
    text = list(split()[1].values())[-1][:2000]
    metric = load("bits_per_byte")
    model, tokenizer = text_scores.model_and_tokenizer(model_id=str(folder))
    found = metric.compute(predictions=[text], model_id=str(folder))["total_bits_per_byte"]
    assert found == pytest.approx(bits_per_byte(model, tokenizer, text), rel=1e-3)
    found = metric.compute(predictions=[text], model=model.float(), tokenizer=tokenizer)["total_bits_per_byte"]
    assert found == pytest.approx(bits_per_byte(model, tokenizer, text), rel=1e-5)


def test_half_a_model_and_two_are_refused(llama):
    for given in ({}, {"tokenizer": Letters()}, {"model": llama, "tokenizer": Letters(), "model_id": "x"}):
        with pytest.raises(ValueError, match="give `model` and `tokenizer`, or `model_id` alone"):
            text_scores.model_and_tokenizer(**given)


@pytest.mark.parametrize("name", ["bits_per_byte", "perplexity"])
def test_metrics_refuse_half_a_model_and_work_afterwards(load, llama, name):
    metric = load(name)
    with pytest.raises(ValueError, match="give `model` and `tokenizer`, or `model_id` alone"):
        metric.compute(predictions=["abc"], model=llama)
    for texts in (["abc"], ["d", "e"]):
        values, *_ = metric.compute(predictions=texts, model=llama, tokenizer=Letters()).values()
        assert len(values) == len(texts)


@pytest.mark.parametrize("model_type", ["rwkv", "rwkv5", "rwkv6", "rwkv7"])
def test_pipeline_and_evaluator(load, model_type, tmp_path):
    model = busy_model(model_type, vocab_size=4096)
    tokenizer = RwkvTokenizer.from_pretrained(wkv.demo_model_path())
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["My fellow Americans,", "We", "The state of the Union is"]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = []
    for prompt in prompts:
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)
        expected.append(tokenizer.decode(output[0], skip_special_tokens=True))
    assert [made[0]["generated_text"] for made in pipe(prompts, batch_size=3, **options)] == expected
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "words.py").write_text(WORDS)
    evaluator = evaluate.evaluator("text-generation")
    evaluator.PIPELINE_KWARGS = options
    # With transformers 5, `evaluate` 0.4.6 takes a model or its folder, and fails on a ready pipeline.
    data = Dataset.from_dict({"text": prompts})
    results = evaluator.compute(model, data, tokenizer=tokenizer, metric=load("words", tmp_path))
    assert results["texts"] == expected and results["samples_per_second"] > 0
