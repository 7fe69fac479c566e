"""The rows of a data file, each with the place it was read from: a line, or in Parquet a row, counted from 1."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


class DataError(ValueError):
    """Data that cannot be trained on; one line that says where and what would be right."""


@dataclass
class Row:
    """`values` by column, and `where` for messages: `train.jsonl, line 3`."""

    values: dict
    where: str


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a .jsonl, .json, .yaml, .csv or .parquet file. Raises DataError naming the file and line."""
    readers = {
        ".jsonl": _json_lines,
        ".json": _json_array,
        ".yaml": _yaml_list,
        ".yml": _yaml_list,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: not a data file or set that is known; files end with {', '.join(readers)}")
    rows = []
    try:
        for place, values in readers[path.suffix](path):
            if not isinstance(values, dict):
                raise DataError(f"{path}, {place}: {values!r:.60}, wanted columns by name")
            rows.append(Row(values, f"{path}, {place}"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8") from None
    return rows


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from None


def _json_array(path: Path) -> Iterator[tuple[str, object]]:
    text = path.read_text(encoding="utf-8")
    try:
        if not isinstance(json.loads(text), list):
            raise DataError(f"{path}: one JSON value, wanted a list of rows")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    # A sound list, read once more element by element to learn their lines.
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    counted, line, position = 0, 1, between.match(text, text.index("[") + 1).end()
    while text[position] != "]":
        counted, line = position, line + text.count("\n", counted, position)
        value, end = decoder.raw_decode(text, position)
        yield f"line {line}", value
        position = between.match(text, end).end()


def _yaml_list(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8") as file:
        try:
            loader = yaml.SafeLoader(file)
            node = loader.get_single_node()
            if not isinstance(node, yaml.SequenceNode):
                raise DataError(f"{path}: wanted a list of rows")
            for child in node.value:
                place = f"line {child.start_mark.line + 1}"
                try:
                    values = loader.construct_object(child, deep=True)
                except ValueError as error:
                    raise DataError(f"{path}, {place}: {error}") from None
                yield place, values
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            raise DataError(f"{path}{place}: not YAML: {getattr(error, 'problem', error)}") from None


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    """Cells are text, but for a `label` (true or false) and cells with a list in JSON, such as `messages`."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, before = csv.DictReader(file, strict=True), 0
        try:
            header = reader.fieldnames or []
            if len(set(header)) < len(header):
                raise DataError(f"{path}: two columns have one name: {', '.join(header)}")
            before = reader.line_num
            for cells in reader:
                place, before = f"line {before + 1}", reader.line_num
                if None in cells or None in cells.values():
                    raise DataError(f"{path}, {place}: {len(header)} cells wanted, as in the header")
                yield place, {name: _cell(name, text, f"{path}, {place}") for name, text in cells.items()}
        except csv.Error as error:
            raise DataError(f"{path}, line {before + 1}: not CSV: {error}") from None


def _cell(name: str, text: str, where: str) -> object:
    if name == "label":
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if name == "messages" or text.startswith('[{"role"'):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: '{name}' is not JSON: {error.msg}") from None
    return text


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(rows, start=1):
        yield f"row {number}", values
