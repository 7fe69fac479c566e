"""Recipes in processes of their own, as users run them: started, stopped by a signal, finished."""

import os
import signal
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


def start(recipe: str, **options) -> subprocess.Popen:
    """A recipe with its options; what it says of errors comes among what it prints, so that no pipe is left unread."""
    arguments = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-u", str(RECIPES / f"{recipe}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def stop_after(process: subprocess.Popen, losses: int, number: signal.Signals) -> int:
    """Send a signal once that many steps have been logged; return the exit code."""
    for line in process.stdout:
        losses -= line.startswith("{'loss'")
        if losses == 0:
            break
    assert losses == 0, "the run ended before it could be stopped"
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode
