"""State tuning: train the state that every text begins with, one a layer, and nothing else.

    pip install "wkv[recipes]"
    python recipes/state_tuning.py --output_dir runs/state
    python recipes/state_tuning.py --output_dir runs/state --model_name_or_path FOLDER --data mine.jsonl

A tuned state costs no time and no context when the model is used: it stands where a prompt's state would. `--data`
takes files in TRL's formats (`messages`, `prompt` and `completion`, or `text`); every argument of `trl.SFTConfig` works
too, in a YAML file (`--config`) as well. `OUTPUT_DIR/final` is the PEFT adapter, `OUTPUT_DIR/time_state.pth` the same
states in the official format, which the `rwkv` package and other runtimes load.
"""

from dataclasses import dataclass
from pathlib import Path

from recipe import CALLBACKS, RecipeArguments, load_data, load_model, parse, run, train
from trl import SFTConfig, SFTTrainer

import wkv
from wkv.training import keep_freed_memory


@dataclass
class Arguments(RecipeArguments, SFTConfig):
    """States start at zero and want large steps: the official trainers begin at 1 and end at a hundredth of it."""

    learning_rate: float = 1.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict | str | None = '{"min_lr_rate": 0.01}'
    warmup_steps: float = 10
    num_train_epochs: float = 3
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 2
    assistant_only_loss: bool = True
    packing: bool = True
    eval_strategy: str = "epoch"


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args)
    training, held_out = load_data(args, ("messages", "completion", "text"), tokenizer)
    args.assistant_only_loss = args.assistant_only_loss and "messages" in training.column_names
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=wkv.StateTuningConfig(),
        callbacks=CALLBACKS,
    )
    trainer.model.print_trainable_parameters()
    train(trainer)
    if trainer.is_world_process_zero() and model.config.model_type != "rwkv":
        official = Path(args.output_dir, "time_state.pth")
        wkv.export_time_state(Path(args.output_dir, "final"), official)
        print(f"the states in the official format: {official}")


if __name__ == "__main__":
    run(main)
