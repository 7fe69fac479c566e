"""What the recipes share: arguments, data and model, measures, training and its report.

A recipe derives its arguments from RecipeArguments and one of TRL's configs, gives its trainer CALLBACKS, and calls
`train`. Its `output_dir` then holds `checkpoint-N` to go on from, `curves.png`, `results.json` (the held-out evaluation
before and after), and `final`, the model or adapter with its tokenizer.
"""

import json
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from checkpoints import SaveOnInterrupt, exit_if_interrupted, is_last, last_complete_checkpoint, new_folder, write_json
from data import load
from datasets import Dataset
from plots import curves
from rows import DataError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainerState, set_seed
from trl import TrlParser

import wkv
from wkv.models.rwkv_chat_templates import CHAT_TEMPLATES


@dataclass
class RecipeArguments:
    """Stands before a TRL config among the bases, and also sets the defaults that suit every recipe."""

    model_name_or_path: str = field(
        default=str(wkv.demo_model_path()), metadata={"help": "Folder or repository; the shipped model by default."}
    )
    data: list[str] = field(
        default_factory=lambda: ["chatterbot"],
        metadata={"help": "Files (JSONL, JSON, YAML, CSV, Parquet), or chatterbot or alpaca_en."},
    )
    held_out: float = field(default=0.1, metadata={"help": "Share of the rows that is kept for evaluation."})
    skip_bad: bool = field(default=False, metadata={"help": "Leave out bad rows and count them, instead of an error."})
    seed: int = 7
    save_steps: float = 50
    save_total_limit: int | None = 2
    logging_steps: float = 5
    gradient_checkpointing: bool | None = None
    dataloader_pin_memory: bool = False
    report_to: str = "none"

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.data = [self.data] if isinstance(self.data, str) else self.data
        super().__post_init__()


def run(main: Callable[[], None]) -> None:
    """Call a recipe's `main`; a DataError ends it with one line and exit code 2, ctrl-C with 130."""
    try:
        main()
    except DataError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _refuse(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: type, description: str):
    """Return the arguments of the command line, and of a YAML file given with `--config`, as one `arguments`."""
    parser = TrlParser(arguments, description=description.splitlines()[0], allow_abbrev=False)
    parser.error = _refuse
    try:
        args = parser.parse_args_and_config()[0]
    except IndexError:
        _refuse("--config: expected a YAML file")
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        _refuse(str(error))
    # Before anything is drawn: adapters begin with random numbers.
    set_seed(args.seed)
    return args


def load_data(args: RecipeArguments, formats: tuple[str, ...], tokenizer) -> tuple[Dataset, Dataset]:
    """Return the checked rows of `args.data` for training and for evaluation, in one of `formats` (data.COLUMNS)."""
    return load(
        args.data,
        formats,
        tokenizer=tokenizer,
        max_length=getattr(args, "max_length", None),
        skip_bad=args.skip_bad,
        held_out=args.held_out,
    )


def load_model(args: RecipeArguments, dtype: torch.dtype | str = "auto", auto_class=AutoModelForCausalLM, **options):
    """Return the model and its tokenizer, which has a chat template that marks what the assistant says."""
    try:
        options = {"dtype": dtype, **options, **(args.model_init_kwargs or {})}
        model = auto_class.from_pretrained(args.model_name_or_path, **options)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    except (OSError, ValueError) as error:
        raise DataError(f"{args.model_name_or_path}: {error}") from error
    if not re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template or ""):
        print("the tokenizer's chat template does not mark the assistant's words: using RWKV's World template")
        tokenizer.chat_template = CHAT_TEMPLATES["world"]
    return model, tokenizer


class Measures(TrainerCallback):
    """Adds tokens per second, of the steps alone, and the peak memory in MB to what is logged with the loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        # TRL counts tokens from the start of the process or of the run, by trainer; known after one report.
        self.tokens, self.seconds = None if state.global_step else 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.monotonic() - self.began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        added = peak_memory()
        tokens = logs.get("num_tokens")
        if None not in (tokens, self.tokens):
            added["tokens_per_second"] = round((tokens - self.tokens) / self.seconds)
        self.tokens, self.seconds = tokens, 0.0
        logs.update(added)
        state.log_history[-1].update(added)


CALLBACKS = [SaveOnInterrupt, Measures]
# What a run cannot go on with when it changes, of those that a recipe has: they make its model and its data.
DATA_ARGUMENTS = (
    *("model_name_or_path", "data", "held_out", "seed"),
    *("task", "task_options", "problems", "chat", "answer_pattern", "reward_model"),
    *("teacher", "prompts", "teacher_tokens"),
)


def peak_memory() -> dict[str, int]:
    """Return the most memory that this process has held so far in MB: resident, and on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6}
    if torch.cuda.is_available():
        peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 10**6
    return peak


def scores(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation that say how good the model is, without the prefix `eval_`."""
    clock = ("runtime", "per_second", "num_tokens", "epoch", "preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if isinstance(value, float | int) and not name.endswith(clock)
    }


def train(trainer: Trainer, evaluate: Callable[[], dict[str, float]] | None = None) -> dict[str, dict[str, float]]:
    """Evaluate on what was held out, train from the last complete checkpoint on, evaluate again, save and report.

    `evaluate` replaces `trainer.evaluate`. Returns the scores `before` and `after`. Ends the program when interrupted.
    """
    output = Path(trainer.args.output_dir)
    evaluate = evaluate or trainer.evaluate
    start = ScoresBefore(trainer, evaluate)
    trainer.add_callback(start)
    checkpoint = last_complete_checkpoint(output)
    if checkpoint and is_last(checkpoint, trainer):
        # `Trainer.train` would take one step too many.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer._load_rng_state(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    before = start.scores
    draw_curves(trainer, before)
    exit_if_interrupted(trainer)
    after = scores(evaluate())
    with new_folder(output / "final", trainer.is_world_process_zero()) as folder:
        trainer.save_model(str(folder))
    draw_curves(trainer, before, after)
    if trainer.is_world_process_zero():
        report(trainer, before, after)
    return {"before": before, "after": after}


class ScoresBefore(TrainerCallback):
    """The scores of the untrained model, from the output folder when an earlier start left them there.

    Else they are made when the training begins: then a model that processes share out among them is ready. Raises
    DataError when one of DATA_ARGUMENTS was another in the earlier start.
    """

    def __init__(self, trainer: Trainer, evaluate: Callable[[], dict[str, float]]):
        args = trainer.args
        self.trainer, self.evaluate, self.scores = trainer, evaluate, None
        self.path = Path(args.output_dir, "before.json")
        self.run = {name: getattr(args, name) for name in DATA_ARGUMENTS if hasattr(args, name)}
        if self.path.exists():
            remembered = json.loads(self.path.read_text())
            for name, value in self.run.items():
                was, folder = remembered["run"].get(name), self.path.parent
                if was != value:
                    raise DataError(f"{folder} holds a run with {name} {was}, not {value}: take another --output_dir")
            self.scores = remembered["scores"]

    def on_train_begin(self, args, state, control, **kwargs):
        if self.scores is None:
            self.scores = scores(self.evaluate())
            if state.is_world_process_zero:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"run": self.run, "scores": self.scores})
        # A resumed run does not evaluate first: both begin with the same random numbers.
        set_seed(args.seed)


def draw_curves(trainer: Trainer, before: dict[str, float], after: dict[str, float] | None = None) -> None:
    steps = trainer.state.global_step
    start, end = (
        {"step": step, **{f"eval_{name}": value for name, value in (values or {}).items()}}
        for step, values in ((0, before), (steps, after))
    )
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir, "curves.png")
        curves([start, *trainer.state.log_history, end], path, f"{Path(sys.argv[0]).stem}, {steps} steps")


def report(trainer: Trainer, before: dict[str, float], after: dict[str, float]) -> None:
    """Write `results.json`, and print the scores beside each other."""
    state = trainer.state
    speeds = sorted(log["tokens_per_second"] for log in state.log_history if "tokens_per_second" in log)
    speed = {"tokens_per_second": speeds[len(speeds) // 2]} if speeds else {}
    measured = {"steps": state.global_step, **speed, **peak_memory()}
    write_json(Path(trainer.args.output_dir, "results.json"), {"before": before, "after": after, **measured})
    print(f"{'held out':32} {'before':>10} {'after':>10}")
    for name, value in after.items():
        print(f"{name:32} {before.get(name, float('nan')):10.4f} {value:10.4f}")
    print(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in measured.items()), flush=True)
