"""TRL's trainers on the same texts, padded, flattened and packed: one loss and one gradient; other models leak.

Every trainer is TRL's own, with its collator, its loss and its training step.
"""

import copy

import datasets
import pytest
import rwkv7_hf
import torch
from conftest import assert_close, busy_model, gradients
from peft import LoraConfig, get_peft_model
from test_native_rwkv4 import native_config
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from wkv.long_context import LongContextMixin
from wkv.vocabulary import build_tokenizer

# Relative errors: of the loss, and of each gradient at the scale of its largest value.
EQUAL, WRONG = 1e-5, 0.5
LINES = ["Hi", "Hello. What is it?", "Six times seven?", "42", "And by two?", "84, as you know.", "Bye!", "So long."]
PAIRS = list(zip(LINES[0::2], LINES[1::2], strict=True))
TURNS = [
    {"role": role, "content": line} for pair in PAIRS for role, line in zip(("user", "assistant"), pair, strict=True)
]
ROWS = {
    "text": [{"text": f"{question} {answer}"} for question, answer in PAIRS],
    "completion": [{"prompt": question, "completion": f" {answer}"} for question, answer in PAIRS],
    "assistant": [{"messages": turns} for turns in (TURNS[:2], TURNS[:4], TURNS[2:6], TURNS[6:])],
}
PREFERENCES = [
    {"prompt": question, "chosen": f" {answer}", "rejected": f" {other}"}
    for (question, answer), (other, _) in zip(PAIRS, PAIRS[1:] + PAIRS[:1], strict=True)
]
# A size that rwkv7-hf can take.
HF7 = {"model_type": "rwkv7", "hidden_size": 128, "head_dim": 64}
LAYOUTS = {
    "padded": {"max_length": None},
    "padding-free": {"max_length": None, "padding_free": True},
    "packed": {"max_length": 128, "packing": True, "packing_strategy": "bfd"},
}


@pytest.fixture(scope="module", autouse=True)
def without_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    """The bytes, which all models here have as their vocabulary."""
    return build_tokenizer(pieces=[bytes([i]) for i in range(256)], chat_template="world")


@pytest.fixture
def subject(model_type):
    return busy_model(model_type, vocab_size=257)


@pytest.fixture
def trainer(tokenizer, tmp_path):
    """Make a trainer of TRL for a copy of a model."""

    def make(trainer_class, config_class, model, rows, reference=None, options=None, **arguments):
        config = config_class(tmp_path, use_cpu=True, bf16=False, report_to="none", **arguments)
        others = (options or {}) | ({} if reference is None else {"ref_model": reference})
        dataset = datasets.Dataset.from_list(rows)
        return trainer_class(
            copy.deepcopy(model), args=config, train_dataset=dataset, processing_class=tokenizer, **others
        )

    return make


@pytest.fixture
def sft(trainer):
    """Loss and gradients of supervised fine-tuning on ROWS[kind] in a layout, two rows a batch."""

    def run(model, kind: str, layout: str):
        settings = {"per_device_train_batch_size": 2, "assistant_only_loss": kind == "assistant"}
        return step(trainer(SFTTrainer, SFTConfig, model, ROWS[kind], **settings, **LAYOUTS[layout]))

    return run


class LongSFTTrainer(LongContextMixin, SFTTrainer):
    pass


def step(trainer):
    """Loss and gradients of one optimizer step over all batches, by the trainer's own training step."""
    loader = trainer.get_train_dataloader()
    batches, items = trainer.get_batch_samples(iter(loader), len(loader), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(loader)
    loss = sum(trainer.training_step(trainer.model, batch, items) for batch in batches)
    return loss, {name: g for name, g in gradients(trainer.model).items() if g is not None}


def loss_error(found, expected) -> float:
    return ((found[0] - expected[0]) / expected[0]).abs().item()


def gradient_error(found, expected) -> float:
    """The largest of all gradients."""
    assert found[1].keys() == expected[1].keys() and expected[1]
    errors = [(found[1][name] - g).abs().max() / g.abs().max().clamp(min=1e-6) for name, g in expected[1].items()]
    return torch.stack(errors).max().item()


def assert_equal(found, expected):
    assert loss_error(found, expected) < EQUAL
    assert gradient_error(found, expected) < EQUAL


def with_lora(model):
    """Adapters that are at work: freshly made ones add zero."""
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ROWS)
def test_fine_tuning(subject, kind, sft):
    padded = sft(subject, kind, "padded")
    assert_equal(sft(subject, kind, "padding-free"), padded)
    assert_equal(sft(subject, kind, "packed"), padded)


def test_fine_tuning_with_lora(subject, sft):
    model = with_lora(subject)
    padded = sft(model, "assistant", "padded")
    assert all("lora_" in name for name in padded[1])
    assert_equal(sft(model, "assistant", "padding-free"), padded)
    assert_equal(sft(model, "assistant", "packed"), padded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fine_tuning_in_segments(layout, trainer, sft):
    """`wkv.long_context` in front of the trainer changes neither loss nor gradients."""
    model = with_lora(busy_model("rwkv7", vocab_size=257))
    settings = {"per_device_train_batch_size": 2, "assistant_only_loss": True, "gradient_checkpointing": False}
    options = {"segment_length": 20}
    found = trainer(LongSFTTrainer, SFTConfig, model, ROWS["assistant"], options=options, **settings, **LAYOUTS[layout])
    assert_equal(step(found), sft(model, "assistant", "padded"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_preferences(subject, trainer, lora):
    """A padded batch of pairs is its pairs alone; the texts in one flat row have the same log-probabilities."""
    model = with_lora(subject) if lora else subject
    reference = None if lora else busy_model(subject.config.model_type, vocab_size=257, seed=1)
    alone, padded = (
        trainer(DPOTrainer, DPOConfig, model, PREFERENCES, reference, per_device_train_batch_size=n) for n in (1, 4)
    )
    assert_equal(step(padded), step(alone))

    batch = next(iter(padded.get_train_dataloader()))
    real = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    expected = padded.model(batch["input_ids"], attention_mask=real, labels=labels, fused_lm_head=True).log_probs
    positions = (real.cumsum(1) - 1)[real][None]
    flat = padded.model(
        batch["input_ids"][real][None], position_ids=positions, labels=labels[real][None], fused_lm_head=True
    )
    assert_close(flat.log_probs[flat.label_mask], expected[labels[:, 1:] >= 0])


def theirs(model, folder):
    """The other implementation of this model's generation, with its weights."""
    if model.config.model_type == "rwkv":
        native = RwkvForCausalLM(native_config(model.config))
        native.load_state_dict(model.state_dict())
        return native
    model.save_pretrained(folder)
    return rwkv7_hf.RWKV7ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "sizes", [{"model_type": "rwkv", "attention_hidden_size": 64}, HF7], ids=["native RWKV-4", "rwkv7-hf"]
)
def test_others_leak(sizes, sft, tmp_path):
    """Padded they agree with ours; flattened or packed they read each text as the last one's continuation."""
    ours = busy_model(**sizes, vocab_size=257)
    other = theirs(ours, tmp_path / "folder")
    right = sft(ours, "text", "padded")
    assert_equal(sft(ours, "text", "padding-free"), right)
    assert loss_error(sft(other, "text", "padded"), right) < EQUAL
    for layout in ("padding-free", "packed"):
        leaking = sft(other, "text", layout)
        assert loss_error(leaking, right) > 100 * EQUAL
        assert gradient_error(leaking, right) > WRONG
