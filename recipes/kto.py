"""Kahneman-Tversky optimisation: answers labelled good become likelier and bad ones unlikelier, without pairs.

    pip install "wkv[recipes]"
    python recipes/kto.py --output_dir runs/kto
    python recipes/kto.py --output_dir runs/kto --model_name_or_path FOLDER --data mine.jsonl --use_peft True
    python recipes/kto.py --output_dir runs/kto --data kto_en --skip_bad True

`--data` takes files with the columns `prompt`, `completion` and `label` (true or false), as texts or lists of messages;
files of pairs (`prompt`, `chosen`, `rejected`) are taken apart. Every argument of `trl.KTOConfig` works too, in a YAML
file (`--config`) as well. The model is compared with itself before training: loaded once more from
`--model_name_or_path`, or with `--use_peft` the model without its adapter. The trainer reads the rows in their order
and compares every answer with the prompt next to it, so they are shuffled here. For epochs give `--max_steps -1` too.
Run the same command again after an interrupt or a crash.
"""

from dataclasses import dataclass

import torch
from preferences import PreferenceArguments, preference_scores
from recipe import CALLBACKS, load_data, load_model, parse, run, train
from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

from wkv.training import keep_freed_memory


@dataclass
class Arguments(PreferenceArguments, KTOConfig):
    beta: float = 0.1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    max_steps: int = 60
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args, torch.float32)
    training, held_out = load_data(args, ("label", "preference"), tokenizer)
    paired = "chosen" in training.column_names
    training, unpaired = (
        (unpair_preference_dataset(part) if paired else part).shuffle(args.seed) for part in (training, held_out)
    )
    trainer = KTOTrainer(
        model,
        args=args,
        train_dataset=training,
        eval_dataset=unpaired,
        processing_class=tokenizer,
        peft_config=args.adapter(task_type="CAUSAL_LM"),
        callbacks=CALLBACKS,
    )
    # Without pairs, the trainer's own measure: how far the rewards of good and bad answers are apart.
    train(trainer, (lambda: preference_scores(trainer.model, tokenizer, held_out)) if paired else None)


if __name__ == "__main__":
    run(main)
