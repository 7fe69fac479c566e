"""The data of the recipes: every kind of file, every mistake with its file and line, and the split."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

import wkv

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import data
from data import COLUMNS, load, split
from rows import DataError, read_rows

SFT = ("messages", "completion", "text")


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def conversation(n: int) -> dict:
    return {"messages": [user(f"Question {n}?"), assistant(f"Answer {n}.")]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(wkv.demo_model_path())


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"prompt": f"Is {n} even?", "chosen": "Yes, it is.", "rejected": 'No, "odd"\nit is.'} for n in range(4)]
FILES = {
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "rows.json": json.dumps(ROWS, indent=1),
    "compact.json": json.dumps(ROWS),
    "rows.yaml": "".join(
        f"- prompt: {row['prompt']}\n  chosen: {row['chosen']}\n  rejected: {json.dumps(row['rejected'])}\n"
        for row in ROWS
    ),
    "rows.csv": "prompt,chosen,rejected\n"
    + "".join(f'{row["prompt"]},"{row["chosen"]}","No, ""odd""\nit is."\n' for row in ROWS),
}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("rows.jsonl", [1, 2, 3, 4]),
        ("rows.json", [2, 7, 12, 17]),
        ("compact.json", [1, 1, 1, 1]),
        ("rows.yaml", [1, 4, 7, 10]),
        ("rows.csv", [2, 4, 6, 8]),
        ("rows.parquet", [1, 2, 3, 4]),
    ],
)
def test_every_kind_of_file_gives_rows_and_their_lines(tmp_path, name, lines):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(FILES[name])
    rows = read_rows(path)
    assert [row.values for row in rows] == ROWS
    unit = "row" if name.endswith(".parquet") else "line"
    assert [row.where for row in rows] == [f"{path}, {unit} {line}" for line in lines]
    train, test = load(str(path), ("preference",), held_out=0.3)
    assert len(train) == len(test) == 2 and train.column_names == list(COLUMNS["preference"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": oops}\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "fine"}\n[1]\n', r"a\.jsonl, line 2: \[1\], wanted columns by name"),
        ("a.jsonl", "", r"a\.jsonl: no rows"),
        ("a.json", '[{"text": "a"},\n{"text" 3}]', r"a\.json, line 2: not JSON"),
        ("a.json", '{"text": "a"}', r"a\.json: one JSON value, wanted a list"),
        ("a.yaml", "text: a\n", r"a\.yaml: wanted a list of rows"),
        ("a.yaml", "- text: a\n- text: 'b\n", r"a\.yaml, line 3: not YAML"),
        ("a.csv", "text,more\na,b\nc\n", r"a\.csv, line 3: 2 cells wanted"),
        ("a.csv", 'text\na\n"b\nc\n', r"a\.csv, line 3: not CSV: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: two columns have one name: text, text"),
        ("a.yaml", "- text: a\n- text: 2020-13-45\n", r"a\.yaml, line 2: month must be in 1\.\.12"),
        ("a.csv", "messages\nhello\n", r"a\.csv, line 2: 'messages' is not JSON"),
        ("a.parquet", "not at all", r"a\.parquet: not Parquet"),
        ("a.txt", "text", r"a\.txt: not a data file or set that is known; files end with \.jsonl"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / name), SFT)


def test_csv_takes_long_cells_and_the_mark_that_spreadsheets_put_in_front(tmp_path):
    path, long = tmp_path / "rows.csv", "word " * 40_000
    path.write_text(f'prompt,completion\na,"{long}"\n', encoding="utf-8-sig")
    (row,) = read_rows(path)
    assert row.values == {"prompt": "a", "completion": long}


def test_missing_or_undecodable_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file"):
        load(str(tmp_path / "nowhere.jsonl"), SFT)
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl: byte 11 is not UTF-8"):
        load(str(tmp_path / "latin.jsonl"), SFT)


PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
LABELLED = {"prompt": [user("Why?")], "completion": [assistant("So.")], "label": True}
BAD = {
    "empty conversation": ("messages", {"messages": []}, "empty conversation: 'messages' has no messages"),
    "empty content": ("messages", {"messages": [user("a"), assistant(" ")]}, "empty or non-string content: message 2"),
    "no text": ("messages", {"messages": [user("a"), assistant(None)]}, "empty or non-string content: message 2"),
    "number": ("messages", {"messages": [user(3), assistant("b")]}, "empty or non-string content: message 1"),
    "two users": (
        "messages",
        {"messages": [user("a"), user("b")]},
        "roles out of order: message 2 .* wanted assistant",
    ),
    "answer first": (
        "messages",
        {"messages": [assistant("a"), user("b")]},
        "roles out of order: message 1 of 'messages' is 'assistant' after the start, wanted system or user",
    ),
    "unknown role": (
        "messages",
        {"messages": [{"role": "bot", "content": "a"}]},
        "unknown role: .*'bot', wanted one of",
    ),
    "no role": ("messages", {"messages": [{"from": "human", "value": "a"}]}, "not a message: message 1"),
    "text for messages": ("messages", {"messages": "User: a"}, "wrong type: 'messages' is 'User: a', wanted a list"),
    "no answer": ("messages", {"messages": [user("a")]}, "wrong last message: .* ends with role 'user', wanted 'assis"),
    "other column": ("messages", {"conversation": []}, "missing column: no 'messages', wanted messages"),
    "equal pair": ("preference", {**PAIR, "rejected": "So."}, "chosen equals rejected: the two answers must differ"),
    "empty chosen": ("preference", {**PAIR, "chosen": ""}, "empty chosen: 'chosen' must have text"),
    "no rejected": ("preference", {"prompt": "Why?", "chosen": "So."}, "missing column: no 'rejected', wanted prompt"),
    "mixed types": ("preference", {**PAIR, "prompt": [user("Why?")]}, "wrong type: 'prompt' is .* wanted text as else"),
    "word for label": ("label", {**LABELLED, "label": "good"}, "label not true or false: 'label' is 'good'"),
    "number for label": ("label", {**LABELLED, "label": 1}, "label not true or false: 'label' is 1"),
    "no completion": ("label", {**LABELLED, "completion": []}, "empty conversation: 'completion' has no messages"),
    "label in a completion": (
        "completion",
        {"prompt": "Why?", "completion": "So.", "label": True},
        "labelled answer: where there is a 'label' answers may be bad: use kto.py, or leave it out",
    ),
    "asked again": (
        "label",
        {**LABELLED, "completion": [user("So.")]},
        "roles out of order: message 1 of 'completion'",
    ),
    "prompt answered": (
        "label",
        {**LABELLED, "prompt": [user("Why?"), assistant("So.")]},
        "wrong last message: 'prompt' ends with role 'assistant', wanted 'user'",
    ),
    "over-long": (
        "messages",
        {"messages": [user("a"), assistant("b " * 80)]},
        r"over-long: \d+ tokens, max_length is 64",
    ),
    "long prompt": ("preference", {**PAIR, "prompt": "b " * 80}, "prompt leaves no room for an answer: .* is 64"),
    "long answer": ("preference", {**PAIR, "rejected": "b " * 60}, r"over-long: \d+ tokens, max_length is 64"),
    "role unknown to the template": (
        "messages",
        {"messages": [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]},
        "refused by the chat template: .*'tool' is not one of",
    ),
}
GOOD = {
    "completion": [{"prompt": "When?", "completion": "Now."}, {"prompt": "Where?", "completion": "Here."}],
    "messages": [conversation(1), conversation(2)],
    "preference": [{**PAIR, "prompt": "When?"}, {**PAIR, "prompt": "Where?"}],
    "label": [LABELLED, {**LABELLED, "prompt": [user("Where?")]}],
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path, tokenizer, capsys, mistake):
    kind, row, message = BAD[mistake]
    path = write(tmp_path / "rows.jsonl", [GOOD[kind][0], row, GOOD[kind][1]])
    options = {"formats": (kind,), "tokenizer": tokenizer, "max_length": 64, "held_out": 0.5}
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {message}"):
        load(str(path), **options)
    train, test = load(str(path), skip_bad=True, **options)
    assert len(train) == len(test) == 1
    reason = message.split(":")[0]
    assert f"skipped 1 of 3 rows (1 {reason})" in capsys.readouterr().out
    write(path, [row, row])
    with pytest.raises(DataError, match=r"rows\.jsonl.*: (all 2 rows are bad \(2|missing column)"):
        load(str(path), skip_bad=True, **options)


def test_columns_decide_the_format_and_others_are_left_out_aloud(tmp_path, capsys):
    rows = [{"prompt": f"{n}", "completion": "b", "source": "web"} for n in range(4)]
    train, _ = load(str(write(tmp_path / "a.jsonl", rows)), SFT)
    assert train.column_names == ["prompt", "completion"]
    assert "left out the columns source" in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"line 1: missing column: found prompt, completion, source, wanted prompt \+ ch"
    ):
        load(str(tmp_path / "a.jsonl"), ("preference", "label"))


def test_the_split_depends_on_what_the_rows_say_alone():
    rows = [{**conversation(n % 30), "n": n} for n in range(120)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    train, test = split(rows, 0.1)
    assert 12 <= len(test) < 18 and len(train) + len(test) == 120
    questions = [{row["messages"][1]["content"] for row in part} for part in (train, test)]
    assert not questions[0] & questions[1]
    again = split(rows[::-1], 0.1)[1]
    assert sorted(row["n"] for row in again) == sorted(row["n"] for row in test)
    for share in (0, 1):
        with pytest.raises(DataError, match="held_out"):
            split(rows, share)


def test_several_files_become_one_set(tmp_path):
    paths = [str(write(tmp_path / f"{n}.jsonl", [conversation(10 * n + i) for i in range(5)])) for n in range(2)]
    train, test = load(paths, SFT, held_out=0.2)
    assert (len(train), len(test)) == (8, 2)


def test_the_built_in_conversations(tokenizer):
    train, test = load("chatterbot", SFT, tokenizer=tokenizer, max_length=1024)
    assert (len(train), len(test)) == (1821, 204)
    assert train[0]["messages"][0] == user("What is AI?")
    assert max(len(row["messages"]) for row in train) == 26


def test_fetched_rows_have_trl_formats_and_pass_the_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    folder = tmp_path / data.LLAMAFACTORY
    folder.mkdir()
    turn = lambda who, text: {"from": who, "value": text}  # noqa: E731
    files = {
        "alpaca_en_demo": [{"instruction": f"Add {n}", "input": "2 and 3", "output": "5"} for n in range(2)],
        "dpo_en_demo": [
            {
                "conversations": [turn("system", "Be kind."), turn("human", f"Hi {n}")],
                "chosen": turn("gpt", "Hello"),
                "rejected": turn("gpt", "What?"),
            }
            for n in range(2)
        ],
        "kto_en_demo": [{"messages": [user(f"Hi {n}"), assistant("Hello")], "label": n == 0} for n in range(2)],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    got = {
        name: sorted(load(name, (kind,), held_out=0.5)[0][0])
        for name, kind in (("alpaca_en", "messages"), ("dpo_en", "preference"), ("kto_en", "label"))
    }
    assert got == {
        "alpaca_en": ["messages"],
        "dpo_en": ["chosen", "prompt", "rejected"],
        "kto_en": ["completion", "label", "prompt"],
    }
    row = data.FETCHED["dpo_en"]()[0].values
    assert row["prompt"] == [{"role": "system", "content": "Be kind."}, user("Hi 0")]
    assert (row["chosen"], row["rejected"]) == ([assistant("Hello")], [assistant("What?")])
    assert data.FETCHED["alpaca_en"]()[0].values == {"messages": [user("Add 0\n2 and 3"), assistant("5")]}


def test_without_a_network_the_fetch_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        DataError, match=r"dpo_en_demo needs pip to fetch llamafactory==0\.9\.5, once \(offline now\?\)"
    ):
        load("dpo_en", ("preference",))
    assert not list(tmp_path.rglob("*.json"))


def test_without_the_package_the_conversations_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install chatterbot-corpus==1\.3\.3"):
        load("chatterbot", SFT)
