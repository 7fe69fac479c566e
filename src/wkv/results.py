"""Results of `wkv eval`: files in lm-eval's own layout with one key more, and what of them may stand side by side.

A file holds what `lm_eval run` writes, so that its readers read it, and under "wkv" what lm-eval does not record: the
weights' digest, tokens, seconds, memory and settings. No path of this machine is written.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

# A model's own files; a Trainer leaves other .bin files beside them.
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
# What a model or an adapter is beside its weights: configurations, tokenizer, chat templates, code.
OTHER_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.py")
# What a Trainer and evaluations leave beside them, and what changes where a model does not.
NOT_THE_MODEL = re.compile(r"trainer_state\.json|results_.*\.json|.*_results\.json|requirements\.txt")
SURROUNDINGS = ("_name_or_path", "base_model_name_or_path", "transformers_version")
# What lm-eval's files have and the tables need.
KEYS = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
# Half of a 95 % confidence interval, in standard errors.
NORMAL_95 = 1.96
# In running text; what follows https: is none.
ABSOLUTE_PATH = re.compile(r"(?:(?<![\w.~/<-])|(?<=file://))/(?:[^\s/:'\",;<>|]+/)+[^\s/:'\",;<>|]*")


class Cell(NamedTuple):
    """A figure of one model: half of its 95 % confidence interval, if known, and how many documents it is from."""

    value: float
    interval: float | None
    documents: int | None


class Row(NamedTuple):
    """A metric of a task; one cell a model, None where the model did not run the task."""

    task: str
    metric: str
    higher_is_better: bool | None
    cells: tuple[Cell | None, ...]

    def is_share(self) -> bool:
        """Whether this is an accuracy or the like: a share of right answers."""
        values = [cell.value for cell in self.cells if cell]
        return self.higher_is_better is True and all(0 <= value <= 1 for value in values)


def weights_sha256(source: Path) -> str:
    """The digest of the contents of a model's weight files: of a folder, sorted by name, or of one file.

    Raises `ValueError` if the folder has none.
    """
    files = [source] if source.is_file() else sorted({f for pattern in WEIGHT_FILES for f in source.glob(pattern)})
    if not files:
        raise ValueError(f"{source}: has no weights ({', '.join(WEIGHT_FILES)})")
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def files_sha256(folder: Path) -> str:
    """The digest of everything in a model's folder but its weights that decides what the model answers."""
    files = {path for pattern in OTHER_FILES for path in folder.glob(pattern) if path.is_file()}
    whole = hashlib.sha256()
    for path in sorted(path for path in files if not NOT_THE_MODEL.fullmatch(path.name)):
        content = path.read_bytes()
        if path.suffix == ".json":
            # Damaged ones are as they are.
            with contextlib.suppress(ValueError):
                fields = json.loads(content)
                if isinstance(fields, dict):
                    fields = {key: value for key, value in fields.items() if key not in SURROUNDINGS}
                content = json.dumps(fields, sort_keys=True).encode()
        name = path.relative_to(folder).as_posix()
        whole.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()


def without_paths(value):
    """The same with every absolute path of this machine made relative to the working directory, or cut to its name."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    # A whole text may have blanks, which end a path in the middle of one.
    whole = _shortened(value)
    return ABSOLUTE_PATH.sub(lambda match: _shortened(match[0]), value) if whole == value else whole


def without_paths_in_line(arguments: Sequence[str]) -> str:
    """A command line, as one types it, without the absolute paths of this machine."""
    options = [argument.partition("=") if argument.startswith("-") else ("", "", argument) for argument in arguments]
    return shlex.join(option + equals + without_paths(value) for option, equals, value in options)


def _shortened(text: str) -> str:
    path = Path(text)
    try:
        # Of a file that is to be made there is a folder, if not the root.
        found = path.is_absolute() and (path.exists() or (len(path.parts) > 2 and path.parent.exists()))
    # Texts that are too long for a path, or hold what a path cannot.
    except (OSError, ValueError):
        return text
    if not found or path.parent == path:
        return text
    here = Path.cwd()
    inside = path.is_relative_to(here) and path != here and here.parent != here
    return path.relative_to(here).as_posix() if inside else path.name


def write_results(folder: Path, results: dict) -> Path:
    """Write results_MODEL_DATE.json, a name that lm-eval's tools know, complete or not at all."""
    date = datetime.fromtimestamp(results["date"]).isoformat(timespec="microseconds").replace(":", "-")
    path = folder / f"results_{results['model_name_sanitized']}_{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(without_paths(results), indent=2, ensure_ascii=False) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def read_results(path: Path) -> dict:
    """The results in a file of `wkv eval` or lm-eval; `ValueError` says what is wrong with it."""
    try:
        results = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    missing = [key for key in KEYS if not isinstance(results, dict) or not isinstance(results.get(key), dict)]
    if missing:
        raise ValueError(f"{path}: not a results file of lm-eval or `wkv eval`: {', '.join(missing)} missing")
    for task, figures in results["results"].items():
        if not isinstance(figures, dict) or (_figures(figures) and task not in results["versions"]):
            raise ValueError(f"{path}: damaged: the results of {task} have no figures or no version")
    return results


def model_name(results: dict) -> str:
    """What a table calls the model."""
    return results.get("wkv", {}).get("model") or results.get("model_name") or "?"


def labels(all_results: Sequence[dict]) -> list[str]:
    """The models' names, with a number where one stands for several results."""
    names = [model_name(results) for results in all_results]
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def check_model(path: Path, results: dict, digests: dict[str, str], others: dict[str, dict] | None = None) -> str:
    """The one of the models, given as {name: `weights_sha256`}, that a file's results are of; else `ValueError`.

    `others` are more digests by name, `files_sha256` for example, that the file must tell too.
    """
    facts = results.get("wkv", {})
    digest = facts.get("model_sha256")
    same = [name for name, other in digests.items() if digest == other]
    for name in same:
        if all(facts.get(key) == value for key, value in (others or {}).get(name, {}).items()):
            return name
    if same:
        raise ValueError(
            f"{path}: these are results of another model: it has the weights of {' and '.join(same)}, but another "
            "configuration, tokenizer, chat template or base model, or does not tell them"
        )
    raise ValueError(
        f"{path}: these are results of another model: of {model_name(results)} with the weights "
        f"{(digest or 'unknown')[:12]}, not of "
        + " or ".join(f"{name} ({other[:12]})" for name, other in digests.items())
    )


def check_comparable(files: Sequence[tuple[str, dict]]) -> None:
    """Raise `ValueError` if two of the (name, results) ran other versions of a task, or with other examples before."""
    seen: dict[tuple, tuple] = {}
    for name, results in files:
        digests, documents = (results.get("wkv", {}).get(f"{key}_sha256", {}) for key in ("tasks", "documents"))
        for task, config in results["configs"].items():
            facts = {
                "version": results["versions"].get(task),
                "few-shot examples": results["n-shot"].get(task),
                "definition": digests.get(task, "")[:12] or None,
                # What a function makes may be made for a model's tokenizer, as RULER's texts are.
                "documents": None if config.get("custom_dataset") else documents.get(task, "")[:12] or None,
            }
            for fact, value in facts.items():
                first, before = seen.setdefault((task, fact), (name, value))
                # Results by lm-eval itself do not tell the definition.
                if before != value and None not in (before, value):
                    raise ValueError(f"{task} cannot be compared: {fact} {before} in {first}, {value} in {name}")


def _figures(entry: dict) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(metric, filter) -> (value, standard error) of what lm-eval holds of one task or group."""
    found = {}
    for key, value in entry.items():
        metric, comma, name = key.partition(",")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # lm-eval's RULER marks a length that was not asked for with -1.
        if not comma or metric.endswith("_stderr") or not number or (metric.isdigit() and value == -1):
            continue
        error = entry.get(f"{metric}_stderr,{name}")
        found[metric, name] = value, error if isinstance(error, int | float) else None
    return found


def _in_order(results: dict) -> Iterator[str]:
    """Tasks and groups that have figures, every group before its parts."""
    parts = results.get("group_subtasks", {})
    inner = {name for names in parts.values() for name in names}

    def visit(name: str) -> Iterator[str]:
        yield name
        for part in parts.get(name, ()):
            yield from visit(part)

    names = [name for name in parts if name not in inner] + list(results["results"])
    everything = dict.fromkeys(part for name in names for part in visit(name))
    return (name for name in everything if _figures(results["results"].get(name, {})))


def _documents(results: dict, task: str) -> int | None:
    parts = results.get("group_subtasks", {}).get(task)
    if parts:
        counts = [_documents(results, part) for part in parts]
        return None if None in counts else sum(counts)
    return results["n-samples"].get(task, {}).get("effective")


def cell(results: dict, task: str, key: str) -> Cell | None:
    """What a model scored on a task; `key` is as in the file, "acc,none" for example."""
    metric, _, name = key.partition(",")
    value, error = _figures(results["results"].get(task, {})).get((metric, name), (None, None))
    if value is None:
        return None
    # A metric by length is of the documents of that length only. No spread among few documents is no certainty.
    documents = None if metric.isdigit() else _documents(results, task)
    return Cell(value, NORMAL_95 * error if error else None, documents)


def rows(all_results: Sequence[dict]) -> list[Row]:
    """Every metric of every task that any of the models ran, side by side."""
    table = []
    for task in dict.fromkeys(task for results in all_results for task in _in_order(results)):
        keys = [key for results in all_results for key in _figures(results["results"].get(task, {}))]
        better = [results["higher_is_better"].get(task, {}) for results in all_results]
        for metric, name in dict.fromkeys(keys):
            cells = tuple(cell(results, task, f"{metric},{name}") for results in all_results)
            higher = next((known[metric] for known in better if metric in known), None)
            label = f"at {metric} tokens" if metric.isdigit() else metric
            table.append(Row(task, label if name == "none" else f"{label} ({name})", higher, cells))
    return table
