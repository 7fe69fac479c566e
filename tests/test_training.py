"""The training parts against the official trainer's rules, and inside transformers' Trainer."""

import math
import resource
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_gradients_close, gradients, tiny_config
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from wkv.models import rwkv_models
from wkv.models.modeling_rwkv7 import RWKV7ForCausalLM
from wkv.models.rwkv_loss import DeferredLogits
from wkv.training import l2wrap_loss, learning_rate_factor, optimizers, parameter_groups


def tiny_model(seed: int = 0) -> RWKV7ForCausalLM:
    torch.manual_seed(seed)
    return RWKV7ForCausalLM(tiny_config("rwkv7", vocab_size=61, num_hidden_layers=2))


def names_by_group(model) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 1e-3)}


# Per generation: the groups whose learning rate is raised, as endings of names, and the low-rank matrices.
FAST = {
    "rwkv": {"decay": "time_decay", "bonus": "time_first"},
    "rwkv5": {"decay": "time_decay"},
    "rwkv6": {"decay": "time_decay"},
    "rwkv7": {"decay": "w_lora.lora.2.bias"},
}


def test_groups_are_the_official_ones_by_name(model_type):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    groups, names = names_by_group(model), [name for name, _ in model.named_parameters()]
    for group, ending in FAST[model_type].items():
        fast = {name for name in names if name.endswith(ending)}
        assert len(fast) == model.config.num_hidden_layers
        assert groups.pop(group) == fast
        names = [name for name in names if name not in fast]
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    matrices = {name for name in linears if "_lora." not in name} | {f"{model.base_model_prefix}.embeddings.weight"}
    assert groups == {"matrices": matrices, "rest": set(names) - matrices}


@pytest.mark.parametrize("bonus_is_log", [False, True])
def test_bonus_of_early_rwkv5(bonus_is_log):
    config = tiny_config("rwkv5", decay_per_head=True, bonus_is_log=bonus_is_log)
    groups = names_by_group(AutoModelForCausalLM.from_config(config))
    assert ("bonus" in groups) is bonus_is_log


def test_groups_carry_the_official_rates_and_decays():
    model = AutoModelForCausalLM.from_config(tiny_config("rwkv"))
    groups = {group["name"]: group for group in parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"matrices": (1e-3, 0.1), "decay": (2e-3, 0.0), "bonus": (3e-3, 0.0), "rest": (1e-3, 0.0)}


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model, 1e-3)
    model.lm_head.weight.requires_grad_(True)
    assert names_by_group(model) == {"matrices": {"lm_head.weight"}}


def test_schedule_follows_the_formula():
    factor = [learning_rate_factor(step, total_steps=110, warmup_steps=10, final_ratio=0.1) for step in range(121)]
    assert factor[0] == pytest.approx(0.01)
    assert factor[5] == pytest.approx(0.01 + 0.99 * 0.5)
    assert factor[10] == pytest.approx(1.0)
    assert factor[35] == pytest.approx(0.55 + 0.45 * math.cos(math.pi / 4))
    assert factor[60] == pytest.approx(0.55)
    assert factor[110] == factor[120] == pytest.approx(0.1)


def test_optimizer_has_the_official_constants_and_scheduled_rates():
    optimizer, scheduler = optimizers(tiny_model(), lr=1e-3, total_steps=20, warmup_steps=2, final_ratio=0.5)
    assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-18 for group in optimizer.param_groups)
    rates = []
    for _ in range(21):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx({"matrices": 1e-5, "decay": 2e-5, "rest": 1e-5})
    assert rates[2] == pytest.approx({"matrices": 1e-3, "decay": 2e-3, "rest": 1e-3})
    assert rates[20] == pytest.approx({"matrices": 5e-4, "decay": 1e-3, "rest": 5e-4})


@pytest.mark.parametrize("warmup_steps", [-1, 10])
def test_impossible_warmup_is_refused(warmup_steps):
    with pytest.raises(ValueError, match="total_steps=10"):
        optimizers(tiny_model(), lr=1e-3, total_steps=10, warmup_steps=warmup_steps)


@pytest.mark.parametrize("items", [None, 40])
def test_l2wrap_gradient_is_the_formula(items):
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 13, requires_grad=True)
    labels = torch.randint(13, (2, 9))
    labels[0, 3:6] = -100
    counted = torch.zeros(2, 9, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    n = items or int(counted.sum())

    plain = torch.zeros(())
    for b, t in counted.nonzero().tolist():
        plain = plain - logits[b, t].log_softmax(-1)[labels[b, t + 1]] / n
    (expected,) = torch.autograd.grad(plain, logits)
    largest, index = logits.detach().max(-1)
    for b, t in counted.nonzero().tolist():
        expected[b, t, index[b, t]] += 1e-4 / n * largest[b, t]

    loss = l2wrap_loss(SimpleNamespace(logits=logits), labels, num_items_in_batch=items)
    torch.testing.assert_close(loss, plain)
    incoming = 1024.0
    (gradient,) = torch.autograd.grad(incoming * loss, logits)
    torch.testing.assert_close(gradient, incoming * expected, rtol=1e-5, atol=1e-9 * incoming)


@pytest.mark.parametrize("items", [None, 40])
def test_l2wrap_without_logits(items):
    """A model in training makes none for it, and the gradients are those with logits."""
    model = tiny_model().train()
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.arange(48).view(2, 24)
    labels = ids.masked_fill(ids % 7 == 0, -100)
    results = []
    for read in (False, True):
        outputs = model(ids)
        if read:
            outputs = SimpleNamespace(logits=outputs.logits * 1)
        loss = l2wrap_loss(outputs, labels, items)
        (1e3 * loss).backward()
        results.append((loss.detach(), gradients(model)))
        assert read or outputs.logits.values is None
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_gradients_close(results[0][1], results[1][1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """Most tensors after the first few take memory that is there, without a page fault for each 4 KB of their 64 MB."""
    script = """
        import resource, torch
        from wkv.training import keep_freed_memory
        assert keep_freed_memory()
        for i in range(20):
            if i == 4:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = subprocess.check_output([sys.executable, "-c", textwrap.dedent(script)], text=True)
    assert int(faults) < 16 * 2**26 / resource.getpagesize() / 2


class CountingUp(Dataset):
    """Sequences x, x + 1, x + 2, ... modulo the vocabulary, which any model learns at once."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = (7 * i + torch.arange(24)) % 61
        return {"input_ids": ids, "labels": ids}


def train(tmp_path, batch: int, accumulation: int, steps: int = 12, **options) -> tuple[RWKV7ForCausalLM, list[float]]:
    model = options.pop("model", None) or tiny_model()
    loss = options.pop("compute_loss_func", l2wrap_loss)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=CountingUp(),
        optimizers=optimizers(model, lr=5e-3, total_steps=steps, warmup_steps=2),
        compute_loss_func=loss,
    )
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_and_accumulation_changes_nothing(tmp_path):
    whole, losses = train(tmp_path, batch=8, accumulation=1)
    assert losses[-1] < 0.7 * losses[0]
    parts, losses_in_parts = train(tmp_path, batch=2, accumulation=4)
    assert losses_in_parts == pytest.approx(losses, rel=1e-3)
    distance = [(a - b).abs().max().item() for a, b in zip(whole.parameters(), parts.parameters(), strict=True)]
    assert max(distance) < 2e-3


def refuse(logits):
    raise AssertionError("logits were made that nobody reads")


@pytest.mark.parametrize("loss", [None, l2wrap_loss], ids=["default", "l2wrap"])
def test_trainer_makes_no_logits(tmp_path, monkeypatch, loss):
    """Under mixed precision too, where accelerate converts every output; the losses are those of the ordinary head."""
    options = {"compute_loss_func": loss, "bf16": True}
    with monkeypatch.context() as context:
        context.setattr(DeferredLogits, "compute", refuse)
        _, losses = train(tmp_path, 4, 2, steps=4, **options)
    monkeypatch.setattr(rwkv_models, "may_defer", lambda *_: False)
    assert losses == pytest.approx(train(tmp_path, 4, 2, steps=4, **options)[1], rel=1e-3)


@pytest.mark.parametrize("target", ["r_proj", "lm_head"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_adapters_and_smoothed_labels(tmp_path, monkeypatch, target, smoothing):
    """An adapter on the head and label smoothing need the logits, and get them."""

    def learn():
        model = get_peft_model(tiny_model(), LoraConfig(target_modules=[target], init_lora_weights=False))
        options = {"compute_loss_func": None, "label_smoothing_factor": smoothing}
        return train(tmp_path, 4, 2, steps=4, model=model, **options)[1]

    losses = learn()
    monkeypatch.setattr(rwkv_models, "may_defer", lambda *_: False)
    assert losses == pytest.approx(learn(), rel=1e-5)
    assert losses[-1] != losses[0]
