"""Stopping a training and going on as if nothing had happened: signals, checkpoints, files that are whole or absent."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainerState


class SaveOnInterrupt(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second one ends the program at once."""

    received: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self.interrupt) for number in numbers}

    def interrupt(self, number, frame):
        self.received = number
        self.on_train_end()
        print("interrupted: saving a checkpoint after this step", file=sys.stderr, flush=True)

    def on_train_end(self, *args, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # Signals reach the processes in different steps, but all must stop in the same one.
            number = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.received = number.item()
        if self.received:
            control.should_save = control.should_training_stop = True


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose saving was finished: the Trainer writes `trainer_state.json` last."""

    def is_complete(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False
        return True

    numbered = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    newest = sorted((path for path in numbered if numbered[path]), key=lambda path: -int(numbered[path][1]))
    return next(filter(is_complete, newest), None)


def is_last(checkpoint: Path, trainer: Trainer) -> bool:
    """Return whether the training ended with this checkpoint, and the arguments ask for no more than then."""
    state, args = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")), trainer.args
    same = args.max_steps <= state.max_steps if args.max_steps > 0 else args.num_train_epochs <= state.num_train_epochs
    return same and state.global_step >= state.max_steps


def exit_if_interrupted(trainer: Trainer) -> None:
    """End the program with 128 + signal, as shells do, when a signal stopped the training before its last step."""
    number = trainer.pop_callback(SaveOnInterrupt).received
    if number and trainer.state.global_step < trainer.state.max_steps:
        print(f"interrupted at step {trainer.state.global_step}; run the same command to go on", flush=True)
        sys.exit(128 + number)


def write_json(path: Path, values: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


@contextmanager
def new_folder(folder: Path, main: bool = True) -> Iterator[Path]:
    """Give the path of a folder to fill, which takes the place of `folder` once that is done, by the main process."""
    unfinished = folder.with_name(folder.name + ".tmp")
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    if main:
        old = folder.with_name(folder.name + ".old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
