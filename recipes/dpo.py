"""Direct preference optimisation: the chosen answer of a pair becomes likelier than the rejected one.

    pip install "wkv[recipes]"
    python recipes/dpo.py --output_dir runs/dpo
    python recipes/dpo.py --output_dir runs/dpo --model_name_or_path FOLDER --data mine.jsonl --use_peft True
    python recipes/dpo.py --output_dir runs/dpo --data dpo_en --skip_bad True

`--data` takes files with the columns `prompt`, `chosen` and `rejected`, as texts or lists of messages; every argument
of `trl.DPOConfig` works too, in a YAML file (`--config`) as well. The default pairs are questions with their answer and
the question said back, which a small model finds likelier. The model is compared with itself before training: loaded
once more from `--model_name_or_path`, or with `--use_peft` the model without its adapter. For epochs give
`--max_steps -1` too. Run the same command again after an interrupt or a crash.
"""

from dataclasses import dataclass

import torch
from preferences import PreferenceArguments, preference_scores
from recipe import CALLBACKS, load_data, load_model, parse, run, train
from trl import DPOConfig, DPOTrainer

from wkv.training import keep_freed_memory


@dataclass
class Arguments(PreferenceArguments, DPOConfig):
    beta: float = 0.1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    max_steps: int = 60
    per_device_train_batch_size: int = 8


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args, torch.float32)
    training, held_out = load_data(args, ("preference",), tokenizer)
    trainer = DPOTrainer(
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
