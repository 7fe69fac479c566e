"""The command `wkv` for tests: in a process of its own, or, since importing torch takes longer than a test, without."""

import contextlib
import io
import subprocess
import sys

import pytest

from wkv.cli import main

COMMAND = [sys.executable, "-c", "import sys; from wkv.cli import main; sys.exit(main())"]
PLAIN = [
    sys.executable,
    "-c",
    "import sys; sys.modules['wkv_kernels'] = None; from wkv.cli import main; sys.exit(main())",
]


def process(*arguments, command=COMMAND, **options) -> subprocess.CompletedProcess:
    line = [*command, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


def wkv(*arguments, input: str = "") -> subprocess.CompletedProcess:
    """The same without a process of its own."""
    line, stdout, stderr = ["wkv", *map(str, arguments)], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", line)
        patch.setattr(sys, "stdin", io.StringIO(input))
        code = main()
    return subprocess.CompletedProcess(line, code, stdout.getvalue(), stderr.getvalue())


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line on standard error that holds the words, nothing on standard output, exit code 2."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("wkv: ")
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr, result.stderr
