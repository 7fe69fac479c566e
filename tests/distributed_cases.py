"""Training with transformers' own Trainer on one process or on several: the cases of test_distributed.py.

    torchrun --nproc_per_node 2 tests/distributed_cases.py FOLDER CASE...

runs the cases, which are named MECHANISM-MODEL_TYPE, one after the other; what one leaves in FOLDER/CASE-PROCESSES is
its `result.pt`, its checkpoints and what save_pretrained wrote. Losses, weights and texts depend only on the global
batch, so they must be the same for any number of processes.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from conftest import busy_model, random_ids
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import wkv

STEPS, ROWS, LENGTH = 4, 8, 12


def plain(folder, processes):
    return AutoModelForCausalLM.from_pretrained(folder)


def lora(folder, processes):
    set_seed(0)
    # Both generations of names; the output projection begins at zero in neither.
    targets = r".*\.(key|value|receptance|output|r_proj|v_proj|o_proj)"
    return get_peft_model(
        plain(folder, processes), LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
    )


def state(folder, processes):
    return get_peft_model(plain(folder, processes), wkv.StateTuningConfig())


def sharded(folder, processes, **sizes):
    """Split as it is loaded, where there is more than one process to split it among."""
    if processes == 1:
        return plain(folder, processes)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def sharded_as_a_whole(folder, processes):
    """By torch alone, in one piece, which is there for a whole forward and freed after it."""
    model = plain(folder, processes)
    return model if processes == 1 else fully_shard(model)


def zero(stage: int) -> dict:
    """DeepSpeed's configuration of a stage; what is "auto" the Trainer fills in."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # Small models too are parted, tensor by tensor.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


# How a case's model is made from a folder, and how many micro-batches make a step.
MECHANISMS = {
    "ddp": (plain, 1),
    "accumulation": (plain, 2),
    "lora": (lora, 2),
    "state": (state, 1),
    "fsdp": (partial(sharded, fsdp_size=2), 1),
    "root": (sharded_as_a_whole, 1),
    "tp": (partial(sharded, tp_size=2), 1),
    "zero2": (plain, 1),
    "zero3": (plain, 1),
}
# Further arguments of the Trainer. It refuses to save the optimizer of a model that was split as it was loaded.
ARGUMENTS = {"fsdp": {"save_only_model": True}, "zero2": {"deepspeed": zero(2)}, "zero3": {"deepspeed": zero(3)}}


def rows(n: int):
    """Texts of different lengths, padded at the right; every step's batch has other numbers of tokens."""
    ids = random_ids(n, LENGTH, seed=1)
    lengths = torch.arange(n) * 5 % 7 + LENGTH - 7 + 1
    mask = torch.arange(LENGTH) < lengths.unsqueeze(1)
    columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return [{name: values[i] for name, values in columns.items()} for i in range(n)]


def trainer(model, folder, processes: int, accumulation: int, **changes) -> Trainer:
    """A global batch of ROWS rows a step, on as many processes as there are."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // accumulation // processes,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        # Sums are made in another order, which Adam's first steps would blow up where a gradient is nearly zero.
        optim="sgd",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=STEPS // 2,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    return Trainer(model, arguments, train_dataset=rows(STEPS * ROWS))


def weights(model) -> dict[str, torch.Tensor]:
    """Every trained parameter, whole."""
    return {name: whole(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def whole(p) -> torch.Tensor:
    if isinstance(p, DTensor):
        return p.full_tensor()
    if not hasattr(p, "ds_id"):
        return p
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def by_hand(model) -> dict:
    """The same training without the Trainer, whose accelerate does this on accelerators only; every process has the
    whole batch.

    Between the steps texts are written; the last step's batch is one row of packed texts.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False)
    result = {"loss": [], "text": []}
    for step in range(STEPS):
        batch = default_data_collator(rows(STEPS * ROWS)[step * ROWS : (step + 1) * ROWS])
        if step == STEPS - 1:
            keep = batch["attention_mask"].bool()
            positions = torch.arange(LENGTH).expand(ROWS, -1)
            batch["labels"][:, 0] = -100
            batch = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}
            batch = {name: values[keep].unsqueeze(0) for name, values in batch.items()}
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result["loss"].append(loss.item())
        result["text"].append(text(model))
    return result


def text(model) -> torch.Tensor:
    """What the model writes: greedily, two rows of ids."""
    start = random_ids(2, 5, seed=2)
    arguments = {"input_ids": start, "attention_mask": torch.ones_like(start), "max_new_tokens": 8, "do_sample": False}
    return model.eval().generate(**arguments)


def run(case: str, root: Path, processes: int) -> dict:
    """Train, save, continue from a checkpoint, write; returns what the number of processes must not change."""
    mechanism, model_type = case.split("-")
    make, accumulation = MECHANISMS[mechanism]
    folder = root / f"{case}-{processes}"
    folder.mkdir(exist_ok=True)
    make = partial(make, root / model_type, processes)
    model = make()
    if mechanism in ("root", "tp"):
        result = by_hand(model)
    else:
        arguments = ARGUMENTS.get(mechanism, {}) if processes > 1 else {}
        train = partial(trainer, folder=folder, processes=processes, accumulation=accumulation, **arguments)
        first = train(model)
        first.train()
        log = first.state.log_history
        result = {name: [entry[name] for entry in log if name in entry] for name in ("loss", "grad_norm")}
        result["text"] = [text(model)]
        first.save_model(folder / "saved")
        if mechanism != "fsdp":
            again = train(make())
            again.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
            result["resumed"] = weights(again.model)
    result["weights"] = weights(model)
    if mechanism == "tp":
        model.save_pretrained(folder / "saved")
    return result


def save_models(root: Path, model_types) -> None:
    """The models that cases begin with."""
    for model_type in model_types:
        busy_model(model_type).save_pretrained(root / model_type)


def main(root: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for case in cases:
        result = run(case, root, processes)
        torch.save(result, root / f"{case}-{processes}" / f"result{rank}.pt")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
