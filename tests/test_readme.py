"""The README: its table of generations names tests that exist, and the Chinese one says the same.

README.zh.md is compared section by section, in the order of README.md: code and commands must be equal, tables have the
same cells, and what needs no translation (numbers, links, titles of tests, `code`) stands in each cell and section.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from oracle.official import VERSIONS

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r'\[[^]]+\]\((\S+) "([^"]+)"\)')
# What is the same in every language: the target and title of a link, code, a number.
FACT = re.compile(r'\]\(([^)"]*(?:"[^"]*")?[^)]*)\)|(`[^`]+`)|(\d(?:[\d.,]*\d)?)')
# Between a command and what it does.
GAP = re.compile(r" {2,}")


class Block(NamedTuple):
    """Lines of a kind that stand together: `code` between fences, `commands` that are indented, `table` or `prose`."""

    kind: str
    lines: list[str]


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


def sections(text: str) -> list[tuple[str, list[Block]]]:
    """Headings and the blocks below them."""
    found, fenced = [("the beginning", [])], False
    for line in text.splitlines():
        blocks = found[-1][1]
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                blocks.append(Block("code", []))
            blocks[-1].lines.append(line)
        elif fenced:
            blocks[-1].lines.append(line)
        elif line.startswith("#"):
            found.append((line, []))
        elif line.strip():
            kind = "table" if line.startswith("|") else "commands" if line.startswith("    ") else "prose"
            if not blocks or blocks[-1].kind != kind:
                blocks.append(Block(kind, []))
            blocks[-1].lines.append(line)
        elif blocks and blocks[-1].kind == "table":
            # Two tables with nothing between are two blocks.
            blocks.append(Block("gap", []))
    return [(heading, [block for block in blocks if block.kind != "gap"]) for heading, blocks in found]


def facts(text: str) -> Counter:
    """What of a text is the same in every language, but for the links from one README to the other."""
    found = Counter(next(filter(None, match.groups())) for match in FACT.finditer(text))
    return Counter({fact: n for fact, n in found.items() if fact not in ("README.md", "README.zh.md")})


def differences(english: str, chinese: str) -> list[str]:
    """Where the Chinese README says something else, a line each."""
    pairs = list(zip(sections(english), sections(chinese), strict=False))
    told = [f"README.md has {len(sections(english))} sections, README.zh.md {len(sections(chinese))}"]
    told = told if len(sections(english)) != len(sections(chinese)) else []
    for (heading, ours), (title, theirs) in pairs:
        where = f"{heading.strip('# ')} ({title.strip('# ')})"
        if heading.split(" ")[0] != title.split(" ")[0] and heading.startswith("#"):
            told.append(f"{where}: a heading of another level")
        told += _prose_differences(where, ours, theirs)
        for kind, compare in (
            ("code", _code_differences),
            ("commands", _command_differences),
            ("table", _table_differences),
        ):
            here, there = ([block.lines for block in blocks if block.kind == kind] for blocks in (ours, theirs))
            if len(here) != len(there):
                told.append(f"{where}: {len(here)} blocks of {kind} in README.md, {len(there)} in README.zh.md")
            for n, (left, right) in enumerate(zip(here, there, strict=False), start=1):
                told += [f"{where}, {kind} {n}: {difference}" for difference in compare(left, right)]
    return told


def _prose_differences(where: str, ours: list[Block], theirs: list[Block]) -> list[str]:
    here, there = (
        facts("\n".join("\n".join(block.lines) for block in b if block.kind == "prose")) for b in (ours, theirs)
    )
    told = [f"{where}: {fact} ({n} times) stands in README.md's text only" for fact, n in (here - there).items()]
    return told + [
        f"{where}: {fact} ({n} times) stands in README.zh.md's text only" for fact, n in (there - here).items()
    ]


def _code_differences(ours: list[str], theirs: list[str]) -> list[str]:
    lines = [f"line {n}: {a!r}, there {b!r}" for n, (a, b) in enumerate(zip(ours, theirs, strict=False), 1) if a != b]
    return lines or ([f"{len(ours)} lines, there {len(theirs)}"] if len(ours) != len(theirs) else [])


def _command_differences(ours: list[str], theirs: list[str]) -> list[str]:
    """Commands must be equal; what they do, behind a gap, is translated."""
    here, there = ([GAP.split(line.strip()) for line in lines] for lines in (ours, theirs))
    if [len(parts) for parts in here] != [len(parts) for parts in there]:
        return ["descriptions, which begin behind two blanks, stand behind other commands"]
    return _code_differences([command for command, *_ in here], [command for command, *_ in there])


def _table_differences(ours: list[str], theirs: list[str]) -> list[str]:
    here, there = ([[c.strip() for c in line.strip("|").split("|")] for line in lines] for lines in (ours, theirs))
    if [len(row) for row in here] != [len(row) for row in there]:
        return [
            f"{len(here)} rows by {len(here[0])} columns, there {len(there)} by {len(there[0])}, or rows that differ"
        ]
    told = []
    for row, (left, right) in enumerate(zip(here, there, strict=True), start=1):
        for column, (a, b) in enumerate(zip(left, right, strict=True), start=1):
            if facts(a) != facts(b):
                told.append(f"row {row}, column {column}: {a!r}, there {b!r}")
    return told


@pytest.fixture(scope="module")
def readmes() -> tuple[str, str]:
    return tuple((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))


def test_the_chinese_readme_says_the_same(readmes):
    told = differences(*readmes)
    assert not told, "README.zh.md must follow README.md:\n" + "\n".join(told)


def test_each_readme_leads_to_the_other(readmes):
    english, chinese = readmes
    assert "](README.zh.md)" in english.split("\n## ")[0]
    assert "](README.md)" in chinese.split("\n## ")[0]


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("| 1278, 66% |", "| 1279, 66% |", "row 3, column 2"),
        ("test_beams[rwkv-4]", "test_beams[rwkv-5]", "test_beams[rwkv-5]"),
        ("wkv chat FOLDER --state", "wkv chat FOLDER --stat", "--stat"),
        ("import wkv\nfrom transformers", "from transformers", "line"),
        ("](CONTRIBUTING.md)", "](CONTRIBUTE.md)", "CONTRIBUTE.md"),
        ("`KeyError: 'RWKV_STATE'`", "", "KeyError"),
        ("| [reward.py](recipes/reward.py)", "| [reward.py](recipes/reward.py) |", "rows"),
        ("\n## ", "\n### ", "level"),
        ("`outputs.logits`", "`logits`", "`outputs.logits`"),
    ],
)
def test_a_difference_is_found_and_named(readmes, before, after, word):
    english, chinese = readmes
    assert before in chinese
    told = differences(english, chinese.replace(before, after, 1))
    assert told and any(word in line for line in told), told
