"""Data for the recipes as `datasets.Dataset` in TRL's formats, every row checked before training starts.

A source is a file (JSONL, JSON, YAML, CSV, Parquet), several files, or the name of a set that pip can fetch:
`chatterbot` and `alpaca_en` (conversations), `chatterbot_pairs` and `dpo_en` (preferences), `kto_en` (labels). Their
rows pass the same checks as anybody's. A bad row raises DataError, which names file and row, or is counted when
`skip_bad`.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import yaml
from datasets import Dataset
from rows import DataError, Row, read_rows

CACHE = Path.home() / ".cache" / "wkv-data"
CHATTERBOT = "chatterbot-corpus==1.3.3"
LLAMAFACTORY = "llamafactory==0.9.5"
COLUMNS = {
    "messages": ("messages",),
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "label": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
# Who may follow whom, None being the start.
BEFORE = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


class BadRowError(DataError):
    """`reason` is the kind of mistake, `detail` what was found and what would be right."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def load(
    source: str | list[str],
    formats: tuple[str, ...],
    *,
    tokenizer=None,
    max_length: int | None = None,
    skip_bad: bool = False,
    held_out: float = 0.1,
) -> tuple[Dataset, Dataset]:
    """Return checked rows for training and for evaluation; the first of `formats` (COLUMNS) that the rows have.

    With a tokenizer each row is rendered as it will be trained on, and with `max_length` one that is longer is bad.
    Prints the counts. Raises DataError for a bad row, or with `skip_bad` when none is left.
    """
    sources = [source] if isinstance(source, str) else source
    rows = [row for name in sources for row in (FETCHED[name]() if name in FETCHED else read_rows(Path(name)))]
    if not rows:
        raise DataError(f"{', '.join(sources)}: no rows")
    columns, kind = _layout(rows, formats)
    good, skipped = [], Counter()
    for row in rows:
        try:
            good.append(check(row.values, columns, kind, tokenizer, max_length))
        except BadRowError as error:
            if not skip_bad:
                raise DataError(f"{row.where}: {error}") from None
            skipped[error.reason] += 1
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    if skipped:
        print(f"{', '.join(sources)}: skipped {skipped.total()} of {len(rows)} rows ({reasons})", flush=True)
    if not good:
        raise DataError(f"{', '.join(sources)}: all {len(rows)} rows are bad ({reasons})")
    if left_out := sorted({column for row in rows for column in row.values} - set(columns)):
        print(f"{', '.join(sources)}: left out the columns {', '.join(left_out)}", flush=True)
    train, test = split(good, held_out)
    print(f"{', '.join(sources)}: {len(train)} rows to train on, {len(test)} held out", flush=True)
    return Dataset.from_list(train), Dataset.from_list(test)


def _layout(rows: list[Row], formats: tuple[str, ...]) -> tuple[tuple[str, ...], type]:
    """Return the columns, and whether prompts and answers are str or lists of messages: Arrow has one type a column."""
    for row in rows:
        for columns in (COLUMNS[name] for name in formats):
            if set(columns) <= set(row.values):
                kinds = (type(row.values[columns[0]]) for row in rows if columns[0] in row.values)
                return columns, next((kind for kind in kinds if kind in (str, list)), str)
    wanted = "; or ".join(" + ".join(COLUMNS[name]) for name in formats)
    raise DataError(f"{rows[0].where}: missing column: found {', '.join(rows[0].values) or 'none'}, wanted {wanted}")


def check(values: dict, columns: tuple[str, ...], kind: type, tokenizer=None, max_length: int | None = None) -> dict:
    """Return the columns of one row, and nothing else, when it can be trained on; raises BadRowError."""
    if columns == COLUMNS["completion"] and "label" in values:
        raise BadRowError("labelled answer", "where there is a 'label' answers may be bad: use kto.py, or leave it out")
    for column in columns:
        if column not in values:
            raise BadRowError("missing column", f"no '{column}', wanted {' + '.join(columns)}")
        content = values[column]
        if column == "label":
            if not isinstance(content, bool):
                raise BadRowError("label not true or false", f"'label' is {content!r}")
            continue
        wanted = {"messages": list, "text": str}.get(column, kind)
        if not isinstance(content, wanted):
            wanted = {str: "text", list: "a list of messages"}[wanted]
            raise BadRowError("wrong type", f"'{column}' is {content!r:.60}, wanted {wanted} as elsewhere")
        before = None if column in ("messages", "prompt") else "user"
        check_content(content, column, before, last="user" if column == "prompt" else "assistant")
    if "chosen" in columns and values["chosen"] == values["rejected"]:
        raise BadRowError("chosen equals rejected", "the two answers must differ")
    row = {column: values[column] for column in columns}
    if tokenizer is not None:
        check_length(row, tokenizer, max_length)
    return row


def check_content(content: str | list, column: str, before: str | None, last: str) -> None:
    """Raise BadRowError unless `content` is a text, or messages that may follow role `before` and end with `last`."""
    if isinstance(content, str):
        if not content.strip():
            raise BadRowError(f"empty {column}", f"'{column}' must have text")
        return
    if not content:
        raise BadRowError("empty conversation", f"'{column}' has no messages")
    for number, message in enumerate(content, start=1):
        place = f"message {number} of '{column}'"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRowError("not a message", f"{place} is {message!r:.60}, wanted {{'role': ..., 'content': ...}}")
        role, text = message["role"], message["content"]
        if role not in BEFORE:
            raise BadRowError("unknown role", f"{place} has role {role!r}, wanted one of {', '.join(BEFORE)}")
        if before not in BEFORE[role]:
            wanted = " or ".join(sorted(name for name, allowed in BEFORE.items() if before in allowed))
            raise BadRowError(
                "roles out of order", f"{place} is {role!r} after {before or 'the start'}, wanted {wanted}"
            )
        if not isinstance(text, str) or not (text.strip() or message.get("tool_calls")):
            raise BadRowError("empty or non-string content", f"{place} has content {text!r:.60}, wanted text")
        before = role
    if (before == "assistant") != (last == "assistant"):
        raise BadRowError("wrong last message", f"'{column}' ends with role {before!r}, wanted {last!r}")


def check_length(row: dict, tokenizer, max_length: int | None) -> None:
    """Raise BadRowError when a text of the row has more than `max_length` tokens or its prompt leaves no room."""
    if "messages" in row or "text" in row:
        longest = count_tokens(row.get("messages", row.get("text")), tokenizer)
    else:
        prompt = count_tokens(row["prompt"], tokenizer, add_generation_prompt=True)
        if max_length is not None and prompt >= max_length:
            raise BadRowError("prompt leaves no room for an answer", f"{prompt} tokens, max_length is {max_length}")
        answers = [row[column] for column in ("completion", "chosen", "rejected") if column in row]
        longest = max((count_tokens(row["prompt"] + answer, tokenizer) for answer in answers), default=prompt)
    if max_length is not None and longest > max_length:
        raise BadRowError("over-long", f"{longest} tokens, max_length is {max_length}")


def count_tokens(content: str | list, tokenizer, **options) -> int:
    if isinstance(content, str):
        return len(tokenizer(content)["input_ids"])
    try:
        return len(tokenizer.apply_chat_template(content, return_dict=False, **options))
    except Exception as error:
        raise BadRowError("refused by the chat template", str(error)) from error


def split(rows: list[dict], held_out: float) -> tuple[list[dict], list[dict]]:
    """Return rows for training and about the share `held_out` of them for evaluation, the same ones every time.

    Rows with the same prompt, or first question, stay together, so that no question is in both. Which are held out
    depends on their questions alone, not on the order of the file. Raises DataError when a part is empty.
    """

    def question(row: dict) -> str:
        asked = row.get("prompt", row.get("text"))
        if "messages" in row:
            asked = next(message for message in row["messages"] if message["role"] == "user")
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    keys = [question(row) for row in rows]
    sizes, count = Counter(keys), 0
    chosen = set()
    for key in sorted(sizes):
        if count >= held_out * len(rows):
            break
        chosen.add(key)
        count += sizes[key]
    train = [row for key, row in zip(keys, rows, strict=True) if key not in chosen]
    test = [row for key, row in zip(keys, rows, strict=True) if key in chosen]
    if not train or not test:
        raise DataError(
            f"held_out={held_out} of {len(rows)} rows leaves {len(train)} to train on, {len(test)} held out"
        )
    return train, test


def chatterbot() -> list[Row]:
    """Return the English conversations of the package chatterbot-corpus, user first, up to the last answer."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None:
        raise DataError(f"the conversations are missing: pip install {CHATTERBOT}")
    rows = []
    for path in sorted(Path(spec.submodule_search_locations[0], "data", "english").glob("*.yml")):
        conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        for number, turns in enumerate(conversations, start=1):
            # One entry of trivia.yml is a text where a pair was meant.
            if isinstance(turns, list):
                turns = [" ".join(turn.split()) for turn in turns[: len(turns) // 2 * 2]]
                messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
                rows.append(Row({"messages": messages}, f"{path}, conversation {number}"))
    return rows


def chatterbot_pairs() -> list[Row]:
    """Return every first question with its short answer, preferred to the question said back."""
    rows = []
    for row in chatterbot():
        question, answer = row.values["messages"][:2]
        if len(answer["content"]) <= 200 and answer["content"] != question["content"]:
            echo = {"role": "assistant", "content": question["content"]}
            rows.append(Row({"prompt": [question], "chosen": [answer], "rejected": [echo]}, row.where))
    return rows


def _llamafactory(name: str) -> list[Row]:
    """Return the rows of a demonstration file of llamafactory, fetched with pip the first time, as they are there."""
    path = CACHE / LLAMAFACTORY / f"{name}.json"
    if not path.exists():
        print(f"fetching {LLAMAFACTORY} for its {name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = ["download", "--quiet", "--no-deps", "--no-binary", "llamafactory", "-d", folder, LLAMAFACTORY]
            pip = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
            if pip.returncode:
                reason = (pip.stderr.strip() or "no message").splitlines()[-1]
                raise DataError(f"{name} needs pip to fetch {LLAMAFACTORY}, once (offline now?): {reason}")
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/data/{name}.json")
                text = member.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(text)
        temporary.replace(path)
    return read_rows(path)


def alpaca_en() -> list[Row]:
    rows = []
    for row in _llamafactory("alpaca_en_demo"):
        question = "\n".join(filter(None, (row.values["instruction"], row.values["input"])))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row.values["output"]}]
        rows.append(Row({"messages": turns}, row.where))
    return rows


def dpo_en() -> list[Row]:
    role = {"system": "system", "human": "user", "gpt": "assistant"}

    def messages(turns: list[dict]) -> list[dict]:
        return [{"role": role[turn["from"]], "content": turn["value"]} for turn in turns]

    return [
        Row(
            {
                "prompt": messages(row.values["conversations"]),
                "chosen": messages([row.values["chosen"]]),
                "rejected": messages([row.values["rejected"]]),
            },
            row.where,
        )
        for row in _llamafactory("dpo_en_demo")
    ]


def kto_en() -> list[Row]:
    rows = []
    for row in _llamafactory("kto_en_demo"):
        turns = row.values["messages"]
        rows.append(Row({"prompt": turns[:-1], "completion": turns[-1:], "label": row.values["label"]}, row.where))
    return rows


FETCHED = {
    "chatterbot": chatterbot,
    "chatterbot_pairs": chatterbot_pairs,
    "alpaca_en": alpaca_en,
    "dpo_en": dpo_en,
    "kto_en": kto_en,
}
