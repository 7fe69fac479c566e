"""A contender of `bench.py` in a process of its own: both ends of the pipe."""

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import resource
import traceback


class Contender:
    """The bench's end. `problem` says why a contender cannot be measured, `peak` is its largest memory in bytes."""

    def __init__(self, distribution: str, path: str, threads: int, *arguments):
        """Start the class `path` (module.class) of an installed distribution; it loads while others are started."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.peak, self.problem, self.started = 0, None, False
        self.process = context.Process(target=serve, args=(theirs, distribution, path, threads, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, method: str, *arguments):
        """The result of a method, or None once there is a problem."""
        if not self.started:
            self.started, self.problem = True, self._receive()
        if self.problem:
            return None
        self.pipe.send((method, *arguments))
        answer = self._receive()
        if isinstance(answer, str):
            self.problem = answer
            return None
        result, self.peak = answer
        return result

    def close(self) -> None:
        """End the process."""
        if self.started and not self.problem:
            self.pipe.send(None)
        elif self.process.is_alive():
            self.process.kill()
        self.process.join()

    def _receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"failed: exit code {self.process.exitcode}"


def serve(pipe, distribution: str, path: str, threads: int, arguments: tuple) -> None:
    """Load the contender `path`, then answer calls `(method, arguments)` with `(result, peak memory)` until None comes.

    `path` is module.class; memory is in bytes. A contender whose distribution is not installed, or that fails, answers
    with a string that says so.
    """
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pipe.send(f"not installed: pip install {distribution}")
        return
    try:
        import torch
        from transformers.utils import logging

        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        module, name = path.split(".")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            contender = getattr(importlib.import_module(module), name)(*arguments)
            pipe.send(None)
            while (call := pipe.recv()) is not None:
                result = getattr(contender, call[0])(*call[1:])
                pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        # The bench was interrupted; nobody listens any more.
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"failed: {type(error).__name__}")
