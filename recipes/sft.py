"""Full fine-tuning on conversations: every weight, loss on the assistant's words only, packed without leaks.

    pip install "wkv[recipes]"
    python recipes/sft.py --output_dir runs/sft
    python recipes/sft.py --output_dir runs/sft --model_name_or_path FOLDER --data mine.jsonl --learning_rate 1e-5

`--data` takes files in TRL's formats (`messages`, `prompt` and `completion`, or `text`); every argument of
`trl.SFTConfig` works too, in a YAML file (`--config`) as well. Weights are held in float32 and computed with in
bfloat16; the optimizer has the official trainer's parameter groups. Rows are packed into one by best fit: every text
begins with a fresh state, so the loss is that of unpacked rows.
"""

from dataclasses import dataclass

import torch
from recipe import CALLBACKS, RecipeArguments, load_data, load_model, parse, run, train
from trl import SFTConfig, SFTTrainer

from wkv.training import BETAS, EPSILON, keep_freed_memory, parameter_groups


@dataclass
class Arguments(RecipeArguments, SFTConfig):
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    num_train_epochs: float = 3
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 2
    assistant_only_loss: bool = True
    packing: bool = True
    eval_strategy: str = "epoch"
    weight_decay: float = 0.1
    adam_beta1: float = BETAS[0]
    adam_beta2: float = BETAS[1]
    adam_epsilon: float = EPSILON


class OfficialSFTTrainer(SFTTrainer):
    """The trainer with the official parameter groups: the decay learns twice as fast, only matrices decay."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(self.model, options.pop("lr"), self.args.weight_decay)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args, torch.float32)
    training, held_out = load_data(args, ("messages", "completion", "text"), tokenizer)
    args.assistant_only_loss = args.assistant_only_loss and "messages" in training.column_names
    trainer = OfficialSFTTrainer(
        model,
        args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=CALLBACKS,
    )
    train(trainer)


if __name__ == "__main__":
    run(main)
