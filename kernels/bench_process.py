"""A contender of `bench.py` in a process of its own: both ends of the pipe."""

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import resource
import traceback

# Most contenders are forked from a process that has imported these, which saves three seconds each.
multiprocessing.set_forkserver_preload(
    ["torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]
)


class Contender:
    """The bench's end. `problem` says why a contender cannot be measured, `peak` is its largest memory in bytes."""

    def __init__(self, distribution: str, path: str, *arguments, method: str = "forkserver"):
        """Start the class `path` (module.class) of an installed distribution; it loads while others are started.

        The `method` is that of multiprocessing; "spawn" starts without PyTorch.
        """
        context = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.peak, self.problem, self.started = 0, None, False
        self.process = context.Process(target=serve, args=(theirs, distribution, path, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is loaded."""
        if not self.started:
            self.started, self.problem = True, self._receive()

    def call(self, method: str, *arguments):
        """The result of a method, or None once there is a problem."""
        self.wait()
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


class Absent:
    """A contender that could not be started, with the interface of one."""

    peak = 0

    def __init__(self, problem: str):
        self.problem = problem

    def wait(self) -> None:
        """For nothing."""

    def call(self, method: str, *arguments) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def serve(pipe, distribution: str, path: str, arguments: tuple) -> None:
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
