"""On a GPU: what the models compute there is what they compute on a CPU. Run with `make test-gpu`.

Letters: B rows, T tokens.
"""

import pytest
import torch
from conftest import assert_close, assert_gradients_close, busy_model, gradients, random_ids, states
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import wkv
from wkv.long_context import ConsecutiveRows, LongContextMixin

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


class LongTrainer(LongContextMixin, Trainer):
    pass


@pytest.fixture
def on_gpu(own_model):
    return own_model.to(CUDA)


def packed_row():
    """Ids (1, T) of three documents, and what tells where each begins."""
    lengths = [5, 40, 19]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": random_ids(1, sum(lengths)), "position_ids": positions}


def padded_rows():
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 13:] = 0
    return {"input_ids": random_ids(3, 21), "attention_mask": mask}


INPUTS = {"rows": lambda: {"input_ids": random_ids(2, 70)}, "packed": packed_row, "padded": padded_rows}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_logits_states_and_gradients(model, on_gpu, make):
    inputs = make()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    expected = busy_model(model.config.model_type)
    found = {}
    for device, of in ((CPU, expected), (CUDA, on_gpu)):
        moved = {name: x.to(device) for name, x in inputs.items()}
        with torch.no_grad():
            out = of(**moved, use_cache=True)
        of(**moved, labels=labels.to(device), use_cache=False).loss.backward()
        by_name = {name: g.cpu() for name, g in gradients(of).items() if g is not None}
        found[device] = out.logits.cpu()[mask == 1], [s.cpu() for s in states(out.past_key_values)], by_name
    (logits, state, by_name), (logits_gpu, state_gpu, by_name_gpu) = found[CPU], found[CUDA]
    assert_close(logits_gpu, logits)
    assert_close(state_gpu, state)
    assert_gradients_close(by_name_gpu, by_name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model, on_gpu, dtype):
    ids = random_ids(2, 70)
    with torch.no_grad():
        assert_close(on_gpu.to(dtype)(ids.to(CUDA)).logits.cpu(), model(ids).logits, dtype)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation(model, on_gpu, options):
    """Left-padded rows; a static cache makes transformers compile the decoding step."""
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :7] = 0
    inputs = {"input_ids": random_ids(3, 12) * mask, "attention_mask": mask}
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **options}
    expected = model.generate(**inputs, **settings)
    found = on_gpu.generate(**{name: x.to(CUDA) for name, x in inputs.items()}, **settings)
    assert found.cpu().tolist() == expected.tolist()


def test_tuned_states_and_lora_of_packed_texts(model_type):
    """The adapters' gradients, over states that are not zero."""
    inputs = packed_row()
    for config in (wkv.StateTuningConfig(), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")):
        found = {}
        for device in (CPU, CUDA):
            torch.manual_seed(0)
            tuned = get_peft_model(busy_model(model_type), config)
            with torch.no_grad():
                for p in tuned.parameters():
                    _ = p.requires_grad and p.add_(0.3 * torch.randn(p.shape))
            tuned.to(device)
            moved = {name: x.to(device) for name, x in inputs.items()}
            tuned(**moved, labels=moved["input_ids"], use_cache=False).loss.backward()
            found[device] = {name: g.cpu() for name, g in gradients(tuned).items() if g is not None}
        assert_gradients_close(found[CUDA], found[CPU])


def test_texts_longer_than_a_row(on_gpu, tmp_path):
    rows = ConsecutiveRows([random_ids(100).tolist(), random_ids(70).tolist()], 32)
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    trainer = LongTrainer(on_gpu, args, train_dataset=rows, segment_length=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_trainer(on_gpu, tmp_path):
    ids = random_ids(16, 32)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        bf16=True,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(on_gpu, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert next(on_gpu.parameters()).device.type == "cuda" and losses[-1] < 0.9 * losses[0]


def test_a_masked_step_waits_for_nothing(model, on_gpu):
    """One row pauses; what is masked is known to the GPU alone."""
    ids = random_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 6] = 0
    ids_gpu, mask_gpu = ids.to(CUDA), mask.to(CUDA)
    with torch.no_grad():
        cache = on_gpu(ids_gpu[:, :5], use_cache=True).past_key_values
        on_gpu(ids_gpu[:, 5:6], attention_mask=mask_gpu[:, :6], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in (6, 7):
                found = on_gpu(ids_gpu[:, t : t + 1], attention_mask=mask_gpu[:, : t + 1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close(found.logits[0, -1].cpu(), model(ids[:1, [0, 1, 2, 3, 4, 5, 7]]).logits[0, -1])
        assert_close(found.logits[1, -1].cpu(), model(ids[1:]).logits[0, -1])
