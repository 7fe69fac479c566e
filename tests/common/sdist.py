"""transformers' own test-suite, taken at test time from the sdist of the installed version.

The sdist holds the common mixins but neither their helpers nor anything that a model's own test file imports from.
`load` puts the mixins and our helpers (the modules beside this one) together under one package name, so that the
relative imports inside the mixins find both. Nothing of transformers is stored in this repository.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

CACHE = Path(__file__).parents[2] / ".cache" / "transformers-sdist"
PACKAGE = "transformers_tests"
# What the mixins import from files that the sdist lacks -> where we wrote it.
ALIASES = {
    "exporters.test_export": "common.exporting",
    "generation.test_utils": "common.generation",
    "utils.test_configuration_utils": "common.configuration",
}


class SdistUnavailableError(Exception):
    """The sdist of the installed transformers could not be downloaded."""


def fetch() -> Path:
    """Return the folder of the sdist's `tests`, downloading it once into the project's `.cache`."""
    folder = CACHE / f"transformers-{transformers.__version__}" / "tests"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
        command += ["--no-build-isolation", "-d", work, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(work).glob("transformers-*.tar.gz"))
        if not archives:
            raise SdistUnavailableError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
        with tarfile.open(archives[0]) as archive:
            tests = [member for member in archive.getmembers() if "/tests/" in member.name]
            archive.extractall(Path(work) / "unpacked", tests, filter="data")
        unpacked = next((Path(work) / "unpacked").iterdir())
        # The configuration tests import this folder as if it were the library.
        (unpacked / "tests" / "__init__.py").touch()
        try:
            unpacked.rename(folder.parent)
        except OSError:
            # Another process was first.
            if not folder.exists():
                raise
    return folder


def load(module: str) -> types.ModuleType:
    """Import one module of the sdist's tests, e.g. `test_modeling_common`."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(fetch())]
        sys.modules[PACKAGE] = package
        for alias, ours in ALIASES.items():
            parent, _, _ = alias.partition(".")
            sys.modules.setdefault(f"{PACKAGE}.{parent}", types.ModuleType(f"{PACKAGE}.{parent}"))
            sys.modules[f"{PACKAGE}.{alias}"] = importlib.import_module(ours)
    return importlib.import_module(f"{PACKAGE}.{module}")
