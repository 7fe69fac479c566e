"""`wkv activate`: a start-up file, so that programs which import only transformers or peft know our classes too.

Python runs the .pth files of an environment whenever an interpreter starts, so this one does next to nothing: it waits
until transformers, peft or lm_eval is asked for, and imports wkv first, which waits in turn (auto.py).
"""

import os
import site
import sysconfig
from contextlib import suppress
from pathlib import Path

NAME = "wkv_activation.pth"
# What the file runs, with `file`, its own path. It must import nothing by itself and never stop an interpreter.
START = """
try:
    import sys

    class _WkvActivation:
        def find_spec(self, name, path=None, target=None):
            if name in ("transformers", "peft", "lm_eval") and self in sys.meta_path:
                sys.meta_path.remove(self)
                try:
                    import wkv
                except Exception as error:
                    print(f"{file} is there to import wkv, but {error!r}; delete it if wkv is gone", file=sys.stderr)

    sys.meta_path.insert(0, _WkvActivation())
    del _WkvActivation
except Exception:
    pass
"""


def activate() -> Path:
    """Write the start-up file of this environment and return its path; one that is there already is replaced.

    Raises `OSError` where no folder of installed packages can be written to.
    """
    for folder in _folders():
        file, new = folder / NAME, folder / f"{NAME}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Only lines that begin with `import` are run.
            new.write_text(f"import sys; exec({START!r}, {{'file': {str(file)!a}}})\n", encoding="ascii")
            os.replace(new, file)
        except OSError:
            with suppress(OSError):
                new.unlink()
            continue
        return file
    places = " nor ".join(map(str, _folders()))
    raise PermissionError(f"cannot write to {places}; activate in a virtual environment of your own")


def deactivate() -> list[Path]:
    """Remove the start-up files of this environment and return their paths."""
    removed = active()
    for file in removed:
        file.unlink()
    return removed


def active() -> list[Path]:
    """The start-up files of this environment that are there."""
    return [folder / NAME for folder in _folders() if (folder / NAME).is_file()]


def _folders() -> list[Path]:
    """Where packages are installed, and for the user alone where Python looks there."""
    folders = [sysconfig.get_path("purelib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return list(map(Path, folders))
