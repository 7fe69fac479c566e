"""`wkv eval`: models on tasks of lm-eval, one results file a model, and a table and a chart of them all.

Whatever can be wrong with the command line is found before a model is loaded. A model whose results, with the same
files, settings, tasks and documents, are in the output folder is not run again; an interrupted run goes on.
"""

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console

from .results import check_comparable, check_model, model_name, read_results, write_text
from .results_chart import chart_series, draw_chart
from .results_published import find_published, published_of, published_table
from .results_tables import comparison_table, notes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for: results with the same settings, weights and tasks are the same."""

    tasks: tuple[str, ...]
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: str = "auto"
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    leading_token: bool = False
    apply_chat_template: bool = False
    seed: int | None = None
    context_lengths: tuple[int, ...] = ()


def parse_limit(text: str | None) -> float | None:
    """Documents of each task, or their share; `ValueError` for anything else."""
    if text is None:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise ValueError(f"--limit {text}: a number of documents, or a share of them between 0 and 1, is needed")
    return limit if limit < 1 else int(limit)


def parse_lengths(text: str) -> tuple[int, ...]:
    """The numbers in "512,1024"; none in an empty text."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--context-lengths {text}: numbers of tokens with commas between them are needed")
    return tuple(sorted(set(map(int, parts))))


def usual_device() -> str:
    """cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(
    names: Sequence[str],
    settings: Settings,
    output: Path,
    given: Sequence[Path] = (),
    include_path: Path | None = None,
    published: str | None = None,
) -> list[Path]:
    """Run `names`, models or results files, write table and chart, print the table; return the results files.

    `given` are files with the results of models among `names`, which then are not run. `published` names the model
    whose published figures are to stand beside the first one's; without it, every unmistakable name finds its own.
    """
    names = list(dict.fromkeys(names))
    _check(settings, output)
    if published:
        find_published(published)
    read = {Path(name): read_results(Path(name)) for name in names if name.endswith(".json")}
    read_given = {path: read_results(path) for path in given}
    check_comparable([(str(path), results) for path, results in (read | read_given).items()])
    models = [name for name in names if Path(name) not in read]
    if given and not models:
        raise ValueError("--from takes the place of running a model, which must be named; show files by naming them")
    if not models:
        _refuse_what_is_for_models(settings, include_path)
    with _quiet():
        run = _runner(models, settings, output, read_given, include_path) if models else None
        files = [Path(name) if Path(name) in read else run(name) for name in names]
    all_results = [read_results(path) for path in files]
    check_comparable([(str(path), results) for path, results in zip(files, all_results, strict=True)])
    render(all_results, output, published)
    for path in files:
        print(path)
    return files


def _runner(models: list[str], settings: Settings, output: Path, given: dict[Path, dict], include_path: Path | None):
    """Check models and tasks; return a function that makes the results file of a model of that name."""
    from .eval_models import check_chat_template, find_model
    from .eval_run import run
    from .eval_selection import TaskChoice

    if settings.threads:
        torch.set_num_threads(settings.threads)
    subjects = {name: find_model(name) for name in models}
    counts = Counter(subject.name for subject in subjects.values())
    for name, subject in subjects.items():
        if counts[subject.name] > 1:
            subjects[name] = dataclasses.replace(subject, name="/".join(Path(name).resolve().parts[-2:]))
    known = {name: dict(subject.digests) for name, subject in subjects.items() if subject.sha256}
    weights = {name: digests.pop("model_sha256") for name, digests in known.items()}
    ready = {check_model(path, results, weights, known): path for path, results in given.items()}
    if settings.apply_chat_template:
        for name in models:
            if name not in ready:
                check_chat_template(subjects[name])
    choice = TaskChoice(settings.tasks, include_path)
    first = next((subjects[name] for name in models if name not in ready), None)
    if first:
        choice.load(first.arguments["pretrained"], first.tokenizer)
    return lambda name: ready.get(name) or run(subjects[name], settings, choice, output)


@contextlib.contextmanager
def _quiet():
    """Keep standard output for results: lm-eval prints, and has remarks on every task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _refuse_what_is_for_models(settings: Settings, include_path: Path | None) -> None:
    """Raise `ValueError` if an option was given that says how to run a model."""
    usual = Settings(("offline",), device=usual_device(), context_lengths=settings.context_lengths)
    given = [
        field.name
        for field in dataclasses.fields(Settings)
        if getattr(settings, field.name) != getattr(usual, field.name)
    ]
    given += ["include_path"] * (include_path is not None)
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{options}: there is no model to run, and results files are shown as they are")


def _check(settings: Settings, output: Path) -> None:
    """Raise `ValueError` for no tasks, a device or batch size that there is not, or an output that is no folder."""
    # Beneath a file nothing can be made either.
    if file := next((path for path in (output, *output.parents) if path.is_file()), None):
        raise ValueError(f"--output {output}: {file} is a file, not a folder")
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise ValueError(f"--device {settings.device}: no such device") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {settings.device}: there are {torch.cuda.device_count()} CUDA devices here")
    if device.type == "meta":
        raise ValueError("--device meta: it computes nothing")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {settings.device}: {str(error).splitlines()[0]}") from None
    if not settings.tasks:
        raise ValueError("--tasks names no task")
    if settings.batch_size != "auto" and not (settings.batch_size.isdecimal() and int(settings.batch_size)):
        raise ValueError(f"--batch-size {settings.batch_size}: auto or a number is needed")


def render(all_results: Sequence[dict], output: Path, published: str | None = None) -> None:
    """Print the tables, and write them as comparison.md and the chart as comparison.png to `output`."""
    tables, remarks = [comparison_table(all_results)], notes(all_results)
    for position, results in enumerate(all_results):
        figures = find_published(published) if published and position == 0 else published_of(model_name(results))
        if table := published_table(results, figures):
            tables.append(table)
        elif published and position == 0:
            remarks.append(
                f"{model_name(results)}: none of its tasks and metrics has a published figure of {published}."
            )
    console = Console()
    if not console.is_terminal:
        # Files and pipes have no width to keep to.
        console.width = 1000
        console.width = max(console.measure(table.rich()).maximum for table in tables)
    for table in tables:
        console.print(table.rich())
    console.print("\n".join(remarks), markup=False, highlight=False, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(table.markdown() for table in tables) + "\n" + "".join(f"- {remark}\n" for remark in remarks)
    write_text(output / "comparison.md", text)
    draw_chart(chart_series(all_results), output / "comparison.png")
