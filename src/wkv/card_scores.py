"""Scores for model cards: results files as a table, as `model-index` and as files of `.eval_results`."""

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from .results import Row, check_model, read_results, rows, weights_sha256
from .results_tables import cell_text

# Names of metrics on the Hub, where they differ from lm-eval's.
METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "word_perplexity": "perplexity", "byte_perplexity": "perplexity"}
# Datasets with a leaderboard on the Hub: (dataset, its task, the metric that stands there in percent) by lm-eval's name
# of the task. The tasks of the RWKV papers have none.
BENCHMARKS = {
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "diamond", "acc"),
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match (strict-match)"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match (custom-extract)"),
}
# What lm-eval names as the dataset of a task that reads local files.
FILE_FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "text"}
HEAD = "| task | shots | documents | metric | value |\n|---|---|---|---|---|\n"


class Scores(NamedTuple):
    """What a results file holds, and its rows, one a metric of a task or of a group."""

    path: Path
    content: dict
    rows: list[Row]

    def about(self, table: str, task: str, default=None):
        """What one of the file's tables, `n-shot` for example, says of a task."""
        return self.content.get(table, {}).get(task, default)

    @property
    def time(self) -> datetime | None:
        """When it was measured."""
        date = self.content.get("date")
        return datetime.fromtimestamp(date, UTC) if isinstance(date, int | float) else None


def read_scores(paths: Sequence[Path]) -> list[Scores]:
    """Read results files. Raises ValueError that names the file and what is wrong in it, or told by two of them."""
    files, seen = [], {}
    for path in map(Path, paths):
        content = read_results(path)
        for task, entry in content["results"].items():
            for key, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{path}: field results.{task}.{key} is {value}, no score")
        for row in (found := rows([content])):
            if (other := seen.setdefault((row.task, row.metric), path)) is not path:
                raise ValueError(
                    f"{path}: field results.{row.task}: {row.metric} is told by {other} too; give one of them"
                )
        files.append(Scores(path, content, found))
    return files


def refuse_other_models(files: Sequence[Scores], folder: Path, repo_id: str) -> None:
    """Raise ValueError if a results file is of another model, by its weights or, if it tells no digest, by its name."""
    if any("model_sha256" in file.content.get("wkv", {}) for file in files):
        digests = {folder.resolve().name: weights_sha256(folder)}
    for path, content, _ in files:
        if "model_sha256" in content.get("wkv", {}):
            check_model(path, content, digests)
        elif (name := Path(str(content.get("model_name"))).name) not in (
            folder.resolve().name,
            repo_id.rpartition("/")[2],
        ):
            raise ValueError(
                f"{path}: field model_name is {name!r}: results of another model than {folder.resolve().name}, or of a "
                "copy of it under that name; `wkv eval` writes results that know their weights"
            )


def score_table(files: Sequence[Scores]) -> str:
    """All scores as Markdown; the tasks of a group that has a score of its own are folded away."""
    lines = {False: [], True: []}
    for file in files:
        scored = {row.task for row in file.rows}
        groups = file.content.get("group_subtasks", {})
        parts = {part for group in scored & groups.keys() for part in groups[group]}
        for row in file.rows:
            cells = (
                row.task,
                file.about("n-shot", row.task, ""),
                _documents(file, row),
                _metric(row),
                cell_text(row.cells[0]),
            )
            lines[row.task in parts].append("| " + " | ".join(map(str, cells)) + " |")
    text = (
        HEAD + "\n".join(lines[False]) + "\n\nA ± is half of a 95 % confidence interval, ↑ and ↓ say what is better.\n"
    )
    text += "\n".join(map(_measured, files))
    if lines[True]:
        text += "\n\n<details><summary>The tasks of the groups</summary>\n\n" + HEAD + "\n".join(lines[True])
        text += "\n\n</details>"
    return text


def _documents(file: Scores, row: Row) -> str:
    """How many documents were scored, of how many if not of all."""
    used, available = row.cells[0].documents, file.about("n-samples", row.task, {}).get("original")
    return "" if used is None else f"{used:,}" + (f" of {available:,}" if available not in (None, used) else "")


def _metric(row: Row) -> str:
    return row.metric + {True: " ↑", False: " ↓"}.get(row.higher_is_better, "")


def _measured(file: Scores) -> str:
    """When and how a file's scores were measured."""
    content, run = file.content, file.content.get("wkv", {})
    line = f"Measured {file.time:%Y-%m-%d}" if file.time else "Measured"
    line += f" by `{run['command']}`" if "command" in run else ""
    line += f" with lm-eval {content['lm_eval_version']}" if "lm_eval_version" in content else ""
    if {"tokens_asked", "tokens_computed", "seconds"} <= run.keys():
        line += (
            f": {run['tokens_asked']:,} tokens asked for, {run['tokens_computed']:,} computed in {run['seconds']:.0f} s"
        )
    return line + "."


def model_index(files: Sequence[Scores]) -> list[EvalResult]:
    """The scores as the Hub's `model-index` has them, with lm-eval's values.

    A dataset is the Hub's where lm-eval loads it from there; a task that reads local files goes by its own name.
    """
    return [_eval_result(file, row) for file in files for row in file.rows]


def _eval_result(file: Scores, row: Row) -> EvalResult:
    config, shots, documents = (
        file.about("configs", row.task, {}),
        file.about("n-shot", row.task),
        _documents(file, row),
    )
    dataset = str(config.get("dataset_path") or "")
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", dataset) and dataset not in FILE_FORMATS
    metric = row.metric.partition(" (")[0]
    # Lengths are the metrics of lm-eval's RULER.
    metric = "string_match" if metric.startswith("at ") else metric
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=dataset if on_hub else row.task,
        dataset_name=row.task,
        dataset_config=config.get("dataset_name") if on_hub else None,
        dataset_split=config.get("test_split") or config.get("validation_split"),
        metric_type=METRICS.get(metric, metric),
        metric_name=f"{row.task} {row.metric}"
        + ("" if shots is None else f", {shots}-shot")
        + (f", {documents} documents" if " of " in documents else ""),
        metric_value=row.cells[0].value,
    )


def benchmark_files(files: Sequence[Scores]) -> dict[str, bytes]:
    """`.eval_results/TASK.yaml` for each whole task whose dataset has a leaderboard on the Hub, in percent as there."""
    written = {}
    for file in files:
        for row in file.rows:
            dataset, task, metric = BENCHMARKS.get(row.task, (None, None, None))
            counts = file.about("n-samples", row.task, {})
            # A leaderboard compares whole datasets.
            if metric != row.metric or counts.get("effective") != counts.get("original"):
                continue
            entry = EvalResultEntry(
                dataset_id=dataset,
                task_id=task,
                value=round(100 * row.cells[0].value, 4),
                date=f"{file.time:%Y-%m-%dT%H:%M:%SZ}" if file.time else None,
                notes=f"{row.metric}, {file.about('n-shot', row.task, 0)}-shot, lm-eval's {row.task}",
            )
            text = yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            written[f".eval_results/{row.task}.yaml"] = text.encode()
    return written
