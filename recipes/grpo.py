"""Group-relative policy optimisation: the model answers each prompt several times and learns from the better answers.

    pip install "wkv[recipes]"
    python recipes/grpo.py --output_dir runs/grpo
    python recipes/grpo.py --output_dir runs/grpo --task letter_counting --task_options '{"max_words": 5}'
    python recipes/grpo.py --output_dir runs/grpo --reward_model runs/reward/final --max_completion_length 32

`--task` is a task of reasoning-gym, which makes the problems and verifies the answers (`--answer_pattern` finds them);
by default sums and differences of two digits, where a number that is near earns a part as well. With `--reward_model`
(see reward.py) the prompts are those of `--data` and the model's number is the reward. Every argument of
`trl.GRPOConfig` works too, in a YAML file (`--config`) as well; with `--beta` the model is held near itself before
training, and with `--use_peft` that is the model without its adapter. A prompt is read once for all its answers. For
epochs give `--max_steps -1` too. Run the same command again after an interrupt or a crash.
"""

import json
import re
from dataclasses import dataclass, field

import reasoning_gym
import torch
from data import split
from datasets import Dataset
from preferences import PreferenceArguments
from recipe import CALLBACKS, load_data, load_model, parse, run, train
from rows import DataError
from trl import GRPOConfig

from wkv.grpo import SharedPrefillGRPOTrainer
from wkv.training import keep_freed_memory


@dataclass
class Arguments(PreferenceArguments, GRPOConfig):
    task: str = field(default="chain_sum", metadata={"help": "Name of a task of reasoning-gym."})
    task_options: str = field(
        default='{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
        metadata={"help": "The task's settings, as JSON."},
    )
    answer_pattern: str = field(
        default=r"\s*-?\d+", metadata={"help": "Regular expression of the answer, at the completion's beginning."}
    )
    problems: int = field(default=1000, metadata={"help": "How many problems to make; equal ones count once."})
    chat: bool = field(default=False, metadata={"help": "Put the problems as messages of a user."})
    reward_model: str | None = field(default=None, metadata={"help": "Folder of a sequence classifier, for --data."})
    held_out: float = 0.2
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    max_steps: int = 100
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    num_generations: int | None = 8
    max_completion_length: int | None = 4


def make_task(args: Arguments) -> tuple[Dataset, Dataset, list]:
    """Return problems for training and for evaluation, and the rewards."""
    try:
        pattern, options = re.compile(args.answer_pattern), json.loads(args.task_options)
        entries = reasoning_gym.create_dataset(args.task, seed=args.seed, size=args.problems, **options)
    except (AssertionError, TypeError, ValueError, re.error) as error:
        raise DataError(f"--task {args.task} --task_options {args.task_options}: {error}") from error
    first = {entry["question"]: number for number, entry in reversed(list(enumerate(entries)))}
    rows = [
        {"prompt": [{"role": "user", "content": question}] if args.chat else question, "number": number}
        for question, number in sorted(first.items(), key=lambda item: item[1])
    ]

    def answers(completions: list) -> list[str | None]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [found[0].strip() if (found := pattern.match(text)) else None for text in texts]

    def verified(completions, number, **others):
        """The task's own score: 1 for the right answer, less for a part of it."""
        return [entries.score_answer(a, entries[n]) for a, n in zip(answers(completions), number, strict=True)]

    def near(completions, number, **others):
        """1 / (1 + error) for a number where a number is wanted; None, which does not count, for other answers."""
        pairs = [(found, entries[n]["answer"]) for found, n in zip(answers(completions), number, strict=True)]
        is_number = re.compile(r"-?\d{1,9}").fullmatch
        return [
            (1 / (1 + abs(int(found) - int(right))) if is_number(found or "") else 0.0) if is_number(right) else None
            for found, right in pairs
        ]

    training, held_out = split(rows, args.held_out)
    return Dataset.from_list(training), Dataset.from_list(held_out), [verified, near]


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    model, tokenizer = load_model(args, torch.float32)
    if args.reward_model:
        training, held_out = (part.select_columns("prompt") for part in load_data(args, ("prompt",), tokenizer))
        rewards = [args.reward_model]
    else:
        training, held_out, rewards = make_task(args)
    trainer = SharedPrefillGRPOTrainer(
        model,
        rewards,
        args=args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=args.adapter(task_type="CAUSAL_LM"),
        callbacks=CALLBACKS,
    )

    def evaluate() -> dict[str, float]:
        """Of answers drawn as in training, to the prompts that were held out."""
        return {name: value for name, value in trainer.evaluate().items() if name.endswith(("/mean", "_reward"))}

    train(trainer, evaluate)


if __name__ == "__main__":
    run(main)
