"""LoRA fine-tuning with PEFT, on conversations or plain text: low-rank pairs beside the projections, all else frozen.

    pip install "wkv[recipes]"
    python recipes/lora.py --output_dir runs/lora
    python recipes/lora.py --output_dir runs/lora --model_name_or_path FOLDER --data mine.jsonl --learning_rate 1e-4

`--data` takes files in TRL's formats (`messages`, `prompt` and `completion`, or `text`); every argument of
`trl.SFTConfig` works too, in a YAML file (`--config`) as well. Run the same command again after an interrupt or crash.
`OUTPUT_DIR/final` is the adapter: `AutoPeftModelForCausalLM.from_pretrained` loads it on its base model.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from recipe import CALLBACKS, RecipeArguments, load_data, load_model, parse, run, train
from trl import SFTConfig, SFTTrainer

from wkv.training import keep_freed_memory


@dataclass
class Arguments(RecipeArguments, SFTConfig):
    lora_r: int = field(default=16, metadata={"help": "Rank of the pairs."})
    lora_alpha: float = field(default=32, metadata={"help": "The pairs' product counts alpha / r times."})
    lora_dropout: float = 0.0
    use_dora: bool = field(default=False, metadata={"help": "Train the magnitude of every weight row as well."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers; all projections of both mixes by default."}
    )
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
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
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_dora=args.use_dora,
            target_modules=args.target_modules,
        ),
        callbacks=CALLBACKS,
    )
    trainer.model.print_trainable_parameters()
    train(trainer)


if __name__ == "__main__":
    run(main)
