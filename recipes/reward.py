"""A reward model: one number for an answer, larger for the chosen one of a pair than for the rejected one.

    pip install "wkv[recipes]"
    python recipes/reward.py --output_dir runs/reward
    python recipes/reward.py --output_dir runs/reward --model_name_or_path FOLDER --data mine.jsonl --use_peft True
    python recipes/reward.py --output_dir runs/reward --data dpo_en --skip_bad True
    python recipes/grpo.py --output_dir runs/grpo --reward_model runs/reward/final --max_completion_length 32

`--data` takes files with the columns `prompt`, `chosen` and `rejected`, as texts or lists of messages; every argument
of `trl.RewardConfig` works too, in a YAML file (`--config`) as well. A language model is taken without its head; the
number is read from its last token. `OUTPUT_DIR/final` loads with `AutoModelForSequenceClassification`; trained with
`--use_peft` it is an adapter, and `OUTPUT_DIR/merged` the whole model. For epochs give `--max_steps -1` too. Run the
same command again after an interrupt or a crash.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import new_folder
from peft import PeftModel
from preferences import PreferenceArguments
from recipe import CALLBACKS, load_data, load_model, parse, run, train
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from wkv.training import keep_freed_memory


@dataclass
class Arguments(PreferenceArguments, RewardConfig):
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    max_steps: int = 60
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args, torch.float32, AutoModelForSequenceClassification, num_labels=1)
    training, held_out = load_data(args, ("preference",), tokenizer)
    trainer = RewardTrainer(
        model,
        args=args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=args.adapter(task_type="SEQ_CLS", modules_to_save=["score"]),
        callbacks=CALLBACKS,
    )
    train(trainer)
    if args.use_peft and trainer.is_world_process_zero():
        # From the files: of the model in training a process may hold a part.
        base, _ = load_model(args, torch.float32, AutoModelForSequenceClassification, num_labels=1)
        base.config.pad_token_id = tokenizer.pad_token_id
        merged = PeftModel.from_pretrained(base, Path(args.output_dir, "final")).merge_and_unload()
        with new_folder(Path(args.output_dir, "merged")) as folder:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
