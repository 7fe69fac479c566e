"""The libraries around transformers take the models as they take any other: PEFT, pipelines, Trainer.

Letters: B rows, T tokens.
"""

import copy

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, tiny_config
from peft import AutoPeftModelForCausalLM, PeftModel
from peft_cases import adapted
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from wkv.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(pieces=[bytes([i]) for i in range(256)])


@pytest.fixture(scope="module")
def _folders(tmp_path_factory):
    return {}, tmp_path_factory


@pytest.fixture
def folder(model_type, tokenizer, _folders):
    """A saved language model with the bytes as its vocabulary, and their tokenizer; tests must not change it."""
    folders, tmp_path_factory = _folders
    if model_type not in folders:
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        busy_model(model_type, vocab_size=257, num_hidden_layers=2).save_pretrained(folders[model_type])
        tokenizer.save_pretrained(folders[model_type])
    return folders[model_type]


def language_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def classifier(folder, **changes):
    model = AutoModelForSequenceClassification.from_pretrained(folder, **changes).eval()
    with torch.no_grad():
        model.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return model


@torch.no_grad()
def test_lora_is_saved_loaded_and_merged(folder, tmp_path):
    """By every door of PEFT and transformers; merged after decoding, whose kernels keep weights in another order."""
    ids, settings = random_ids(2, 9), {"max_new_tokens": 8, "do_sample": False}
    model = adapted(language_model(folder), target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    expected, written = model(ids).logits, model.generate(input_ids=ids, **settings)
    own = language_model(folder)
    own.load_adapter(tmp_path / "adapter")
    for loaded in (
        PeftModel.from_pretrained(language_model(folder), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        own,
    ):
        assert torch.equal(loaded.eval()(ids).logits, expected)
        assert torch.equal(loaded.generate(input_ids=ids, **settings), written)
    merged = model.merge_and_unload()
    assert_close(merged(ids).logits, expected)
    assert torch.equal(merged.generate(ids, **settings), written)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(language_model(tmp_path / "merged")(ids).logits, expected)


def test_text_generation_pipeline(folder, tokenizer):
    """Prompts of unequal length, in a batch and one by one, continue as `generate` continues them."""
    generate = pipeline("text-generation", model=str(folder))
    prompts = ["Hello the", "a"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    model = language_model(folder)
    for batch_size in (1, 2):
        for prompt, (result,) in zip(prompts, generate(prompts, batch_size=batch_size, **options), strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            expected = model.generate(ids, max_new_tokens=5, do_sample=False)
            assert [i for i in result["generated_token_ids"] if i] == [i for i in expected[0].tolist() if i]
    (answer,) = generate([{"role": "user", "content": "hi"}], max_new_tokens=3, do_sample=False)
    assert [turn["role"] for turn in answer["generated_text"]] == ["user", "assistant"]


def test_text_classification_pipeline_and_labels(folder, tokenizer, tmp_path):
    labels = {0: "bad", 1: "fair", 2: "good"}
    model = classifier(folder, num_labels=3, id2label=labels, label2id={name: i for i, name in labels.items()})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.num_labels == 3 and loaded.config.id2label == labels and loaded.config.label2id["good"] == 2
    classify = pipeline("text-classification", model=str(tmp_path))
    texts = ["Hello", "x y z and more", "!"]
    for batch_size in (1, 3):
        for text, result in zip(texts, classify(texts, batch_size=batch_size), strict=True):
            with torch.no_grad():
                scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
            assert result["label"] == labels[scores.argmax().item()]
            assert result["score"] == pytest.approx(scores.max().item(), abs=1e-5)


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_classifier_without_a_mask(folder, pad_token_id):
    """Without a mask the ids tell where a text ends; without a padding id, it ends where the row does."""
    model = classifier(folder, num_labels=3)
    model.config.pad_token_id = pad_token_id
    text = random_ids(1, 6)
    padded = torch.cat([text, torch.zeros(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        expected = model(text, attention_mask=torch.ones_like(text)).logits
        assert_close(model(text).logits, expected)
        assert_close(model(inputs_embeds=model.get_input_embeddings()(text)).logits, expected)
        whole = model(padded, attention_mask=torch.ones_like(padded)).logits
        assert (whole - expected).abs().max() > 0.01
        assert_close(model(padded).logits, whole if pad_token_id is None else expected)


class Texts(torch.utils.data.Dataset):
    """Texts of unequal length that count upwards, each with a label or with itself to predict."""

    def __init__(self, labelled: bool):
        self.labelled = labelled

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (7 * i + torch.arange(8 + i % 3)) % 49 + 1
        return {"input_ids": ids, "labels": torch.tensor(i % 2) if self.labelled else ids}


def collate(rows):
    """Right padding; -100 where a padded row has no label."""
    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, True, -100) if labels[0].ndim else torch.stack(labels),
    }


def trainer(model, folder, steps: int, labelled: bool = False, **changes) -> Trainer:
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options | changes)
    return Trainer(
        model,
        arguments,
        train_dataset=Texts(labelled),
        eval_dataset=Texts(labelled),
        data_collator=collate,
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def test_trainer_trains_evaluates_and_resumes(model_type, tmp_path):
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(tiny_config(model_type, num_hidden_layers=2))
    saving = {"save_strategy": "steps", "save_steps": 3, "activation_checkpointing": True}
    whole = trainer(copy.deepcopy(fresh), tmp_path / "whole", steps=6, **saving)
    before = whole.evaluate()
    whole.train()
    after = whole.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and 0 <= after["eval_right"] <= 1
    resumed = trainer(copy.deepcopy(fresh), tmp_path / "whole", steps=6, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_close(list(resumed.model.parameters()), list(whole.model.parameters()))
    assert whole.predict(Texts(False)).predictions.shape == (16, 10, 50)


def test_classifier_trains_the_same_with_gradient_accumulation(folder, tmp_path):
    """Four batches of two are one batch of eight: the same loss, the same norm of the gradient, the same step."""
    logged = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = classifier(folder, num_labels=2)
        steps = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run = trainer(model, tmp_path, 1, labelled=True, max_grad_norm=1e9, **steps)
        run.train()
        (log,) = (log for log in run.state.log_history if "loss" in log)
        logged.append((log["loss"], log["grad_norm"], run.evaluate()["eval_loss"]))
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)
