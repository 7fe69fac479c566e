"""Odds-ratio preference optimisation: fine-tuning on the chosen answers that also pushes the rejected ones away.

    pip install "wkv[recipes]"
    python recipes/orpo.py --output_dir runs/orpo
    python recipes/orpo.py --output_dir runs/orpo --model_name_or_path FOLDER --data mine.jsonl --use_peft True
    python recipes/orpo.py --output_dir runs/orpo --data dpo_en --skip_bad True

`--data` takes files with the columns `prompt`, `chosen` and `rejected`, as texts or lists of messages; every argument
of `trl.experimental.orpo.ORPOConfig` works too, in a YAML file (`--config`) as well. It is one stage from a base model:
the loss is the cross-entropy of the chosen answer plus `beta` times that of the odds, and no second model is held. For
epochs give `--max_steps -1` too. Run the same command again after an interrupt or a crash.
"""

import os
from dataclasses import dataclass

import torch
from preferences import PreferenceArguments, preference_scores
from recipe import CALLBACKS, load_data, load_model, parse, run, train

from wkv.training import keep_freed_memory

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


@dataclass
class Arguments(PreferenceArguments, ORPOConfig):
    beta: float = 2.0
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    max_steps: int = 60
    per_device_train_batch_size: int = 8
    remove_unused_columns: bool = False


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args, torch.float32)
    training, held_out = load_data(args, ("preference",), tokenizer)
    trainer = ORPOTrainer(
        model,
        args=args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=args.adapter(task_type="CAUSAL_LM"),
        callbacks=CALLBACKS,
    )
    train(trainer, lambda: preference_scores(trainer.model, tokenizer, held_out))


if __name__ == "__main__":
    run(main)
