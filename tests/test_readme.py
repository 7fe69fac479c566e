"""The README's table of generations: every entry names a test that exists."""

import re
import subprocess
import sys
from pathlib import Path

from oracle.official import VERSIONS

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r'\[[^]]+\]\((\S+) "([^"]+)"\)')


def table() -> list[list[str]]:
    """The rows of the table under "What runs where", cell by cell, without its heading."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What runs where")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_generation_has_a_row():
    assert [row[0] for row in table()] == [f"RWKV-{version}" for version in VERSIONS]


def test_every_entry_is_backed_by_a_test():
    entries = set()
    for name, *cells in table():
        for cell in cells:
            found = ENTRY.findall(cell)
            assert found, f"{name}: nothing backs {cell!r}"
            assert not ENTRY.sub("", cell).strip(", "), f"{name}: an entry without a test in {cell!r}"
            entries |= {f"{file}::{test}" for file, test in found}
    files = sorted({entry.partition("::")[0] for entry in entries})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:xdist", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert not entries - set(collected.stdout.splitlines())
