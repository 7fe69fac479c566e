"""Rows in segments that hand their state on: as one long pass, or cut off where it is asked for.

Letters: B rows, T tokens.
"""

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import assert_close, assert_gradients_close, busy_model, gradients, random_ids, states
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

import wkv
from wkv.long_context import ConsecutiveRows, LongContextMixin
from wkv.models import rwkv_models
from wkv.models.rwkv_cache import carried_cache, packed_states
from wkv.models.rwkv_loss import DeferredLogits
from wkv.training import l2wrap_loss

T = 50


class LongTrainer(LongContextMixin, Trainer):
    pass


@pytest.fixture
def trainer(tmp_path):
    def make(model, trainer_class=LongTrainer, options=None, settings=None, **others):
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", **(settings or {}))
        return trainer_class(copy.deepcopy(model), arguments, **(options or {}), **others)

    return make


def step(trainer, *batches):
    """Loss and gradients of one optimizer step."""
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, items) for batch in batches)
    return loss, {name: g for name, g in gradients(trainer.model).items() if g is not None}


def assert_same(found, expected):
    assert_close(found[0], expected[0])
    assert_gradients_close(found[1], expected[1])


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows, the second shorter, with some tokens that are not to be learnt."""
    ids = random_ids(2, T, seed=seed)
    mask = torch.ones_like(ids)
    mask[1, T - 12 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 10:20] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed() -> dict[str, torch.Tensor]:
    """Texts in one row; with segments of 8 one begins where a segment does, and one spans several."""
    texts = [random_ids(n, seed=n).tolist() for n in (5, 3, 30, 1, 11)]
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)
    return collator([{"input_ids": text} for text in texts])


def test_gradients_flow_through_the_cache(own_model):
    """The loss of what follows reaches what came before, through nothing but the states."""
    model, ids = own_model.train(), random_ids(2, 20)
    readout = torch.randn(2, 9, model.config.vocab_size)
    (model(ids).logits[:, 11:] * readout).sum().backward()
    whole = gradients(model)
    first = carried_cache(model.config)
    model(ids[:, :11], past_key_values=first)
    carried = packed_states(first)
    second = carried_cache(model.config, carried)
    read = carried.clone()
    (model(ids[:, 11:], past_key_values=second).logits * readout).sum().backward()
    assert_gradients_close(gradients(model), whole)
    assert torch.equal(carried, read)
    plain = model(ids, use_cache=True).past_key_values
    assert_close(states(second), states(plain))
    assert not any(state.requires_grad for state in states(plain))


@pytest.mark.parametrize("segment_length", [7, 49, 64])
def test_segments_are_one_long_pass(model, trainer, segment_length):
    expected = step(trainer(model, Trainer), batch(0), batch(1))
    found = trainer(model, options={"segment_length": segment_length})
    assert_same(step(found, batch(0), batch(1)), expected)


def test_packed_texts(model, trainer):
    expected = step(trainer(model, Trainer), packed())
    for length in (8, 13):
        assert_same(step(trainer(model, options={"segment_length": length}), packed()), expected)
    # And the boundaries matter.
    plain = {"input_ids": packed()["input_ids"], "labels": packed()["labels"]}
    assert (step(trainer(model, options={"segment_length": 8}), plain)[0] - expected[0]).abs() > 1e-3


@pytest.mark.parametrize("gradient_segments", [1, 2])
def test_truncated_gradients(model, trainer, gradient_segments):
    """Each stretch by itself, on the state of those before it, which is data."""
    inputs, length = batch(), 7 * gradient_segments
    own = copy.deepcopy(model).train()
    n, cache, loss = (inputs["labels"][:, 1:] >= 0).sum(), None, 0
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    for start in range(0, T, length):
        ids, mask, labels = (
            x[:, start : start + length] for x in (inputs["input_ids"], inputs["attention_mask"], targets)
        )
        out = own(
            ids,
            attention_mask=mask,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=n,
            past_key_values=cache,
            use_cache=True,
        )
        out.loss.backward()
        loss, cache = loss + out.loss.detach(), out.past_key_values
    found = trainer(model, options={"segment_length": 7, "gradient_segments": gradient_segments})
    found = step(found, inputs)
    assert_same(found, (loss, gradients(own)))
    whole = step(trainer(model, Trainer), inputs)
    assert_close(found[0], whole[0])
    assert max((found[1][name] - g).abs().max() / g.abs().max() for name, g in whole[1].items()) > 0.1


def test_lora_and_tuned_states(model, trainer):
    """Tuned states reach every text, also those that begin in the middle of a row."""
    for config in (LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"), wkv.StateTuningConfig()):
        tuned = get_peft_model(copy.deepcopy(model), config)
        if isinstance(config, wkv.StateTuningConfig):
            with torch.no_grad():
                for p in tuned.parameters():
                    _ = p.requires_grad and p.add_(torch.randn(p.shape) * 0.3)
        for inputs in (batch(), packed()):
            expected = step(trainer(tuned, Trainer), inputs)
            assert_same(step(trainer(tuned, options={"segment_length": 8}), inputs), expected)


def test_no_logits_are_made(trainer, monkeypatch):
    """Not even in the first of the two passes, which wants no gradients, under a frozen head."""

    def refuse(*args):
        raise AssertionError("logits")

    model = get_peft_model(busy_model("rwkv7"), LoraConfig(task_type="CAUSAL_LM"))
    monkeypatch.setattr(rwkv_models, "linear_of_few_rows", refuse)
    monkeypatch.setattr(DeferredLogits, "compute", refuse)
    step(trainer(model, options={"segment_length": 8}), batch())


def test_l2wrap(trainer):
    model = busy_model("rwkv7")
    expected = step(trainer(model, Trainer, compute_loss_func=l2wrap_loss), batch())
    found = trainer(model, options={"segment_length": 16}, compute_loss_func=l2wrap_loss)
    assert_same(step(found, batch()), expected)
    plain = step(trainer(model, Trainer), batch())
    assert any((plain[1][name] - g).abs().max() > 1e-3 * g.abs().max() for name, g in expected[1].items())


LENGTHS = [23, 4, 37, 16, 9]


def texts() -> list[list[int]]:
    return [random_ids(n, seed=n).tolist() for n in LENGTHS]


@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_consecutive_rows_hold_every_token_once(lanes):
    rows = ConsecutiveRows(texts(), 8, lanes)
    found = {}
    for lane in range(lanes):
        row = {key: torch.cat([rows[n][key] for n in range(lane, len(rows), lanes)]) for key in rows[0]}
        real = row["attention_mask"].bool()
        assert (row["labels"][~real] == -100).all() and (row["shift_labels"][~real] == -100).all()
        ids, positions, following = (row[key][real].tolist() for key in ("input_ids", "position_ids", "shift_labels"))
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        for start, end in pairwise(starts):
            text = ids[start:end]
            assert positions[start:end] == list(range(len(text)))
            assert following[start:end] == [*text[1:], -100]
            found[len(text)] = text
    assert found == {len(text): text for text in texts()}
    with pytest.raises(IndexError):
        rows[len(rows)]
    with pytest.raises(ValueError, match="no tokens"):
        ConsecutiveRows([[1], []], 8)


def losses(trainer) -> float:
    """The sum of all losses of an epoch of single batches, times the tokens that each counts."""
    batches = list(trainer.get_train_dataloader())
    return sum(step(trainer, batch)[0] * max(1, (batch["shift_labels"] >= 0).sum()) for batch in batches)


@pytest.mark.parametrize("options", [{"segment_length": 8}, {"segment_length": 4, "gradient_segments": 1}])
def test_texts_longer_than_a_step(model, trainer, options):
    """Every token is predicted from all that its text has before it, and from a tuned state before that."""
    check_long_texts(model, trainer, options)
    tuned = get_peft_model(copy.deepcopy(model), wkv.StateTuningConfig())
    with torch.no_grad():
        for p in tuned.parameters():
            _ = p.requires_grad and p.add_(torch.randn(p.shape) * 0.3)
    check_long_texts(tuned, trainer, options)


def check_long_texts(model, trainer, options):
    with torch.no_grad():
        expected = sum(
            (n - 1) * model(ids, labels=ids).loss
            for n, ids in zip(LENGTHS, map(torch.tensor, ([t] for t in texts())), strict=True)
        )
    for lanes in (1, 3):
        settings = {"per_device_train_batch_size": lanes, "train_sampling_strategy": "sequential"}
        found = trainer(model, options=options, settings=settings, train_dataset=ConsecutiveRows(texts(), 8, lanes))
        assert_close(losses(found) / sum(LENGTHS), expected / sum(LENGTHS))


def test_resumed_training_is_the_same(trainer, tmp_path):
    """The state is saved with a checkpoint, here in the midst of a text."""
    settings = {
        "max_steps": 5,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "disable_tqdm": True,
    }
    model, rows = busy_model("rwkv7"), ConsecutiveRows(texts()[2:3] * 3, 8)
    assert rows[6]["position_ids"][0] == 11

    def train(checkpoint=None):
        run = trainer(model, options={"segment_length": 3}, settings=settings, train_dataset=rows)
        run.train(resume_from_checkpoint=checkpoint)
        return run.model.state_dict()

    whole = train()
    resumed = train(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_evaluation_in_segments(trainer):
    model = busy_model("rwkv7")
    inputs = [{key: x[i] for key, x in batch().items()} for i in range(2)]
    settings = {"per_device_eval_batch_size": 2}
    expected = trainer(model, Trainer, eval_dataset=inputs, settings=settings).evaluate()["eval_loss"]
    found = trainer(model, options={"segment_length": 8}, eval_dataset=inputs, settings=settings).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_refusals(trainer):
    model = busy_model("rwkv7")
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        trainer(model, options={"segment_length": 8}, settings={"gradient_checkpointing": True})
    with pytest.raises(ValueError, match="no segments of 0"):
        trainer(model, options={"segment_length": 0})
    rows = ConsecutiveRows(texts(), 8)
    with pytest.raises(ValueError, match="sequential"):
        trainer(model, options={"segment_length": 8}, train_dataset=rows)
    run = trainer(model, options={"segment_length": 8})
    for wrong in (1, 2):
        with pytest.raises(ValueError, match="batches must come in order"):
            step(run, {key: x[None] for key, x in rows[wrong].items()})
        step(run, {key: x[None] for key, x in rows[0].items()})


@pytest.mark.slow
def test_recipe(tmp_path):
    """It trains on texts longer than a step, scores them and goes on after its last checkpoint."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(3):
        (texts / f"{i}.txt").write_text(f"Text {i} counts: " + " ".join(map(str, range(200))))
    recipe = Path(__file__).parents[1] / "recipes" / "long_context.py"
    command = [sys.executable, recipe, "--output_dir", tmp_path / "run", "--data", texts, "--held_out", "1"]
    command += [
        "--row_length",
        "64",
        "--segment_length",
        "32",
        "--warmup_steps",
        "1",
        "--save_steps",
        "2",
        "--max_steps",
    ]
    for steps in ("2", "4"):
        result = subprocess.run([*command, steps], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "run" / "results.json").read_text())
    assert scores["steps"] == 4 and scores["after"].keys() == scores["before"].keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    result = subprocess.run([*command, "4", "--data", tmp_path / "nothing"], capture_output=True, text=True)
    assert result.returncode == 2 and "no .txt files" in result.stderr and "Traceback" not in result.stderr
