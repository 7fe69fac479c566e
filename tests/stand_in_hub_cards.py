"""What the stand-in Hub has to say about the metadata of model cards and about files of evaluation results."""

import re

import yaml

LICENCES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "gpl-3.0", "mit", "other", "unknown"}


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a README.md, as the Hub gives them."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if not block:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"], []
    errors = [
        f'"{key}" must be a string' for key in ("library_name", "pipeline_tag") if key in data and not _text(data[key])
    ]
    errors += _model_index_errors(data.get("model-index", []))
    if "license" in data and data["license"] not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}')
    for key in ("base_model", "datasets", "tags", "language"):
        values = data.get(key, [])
        if not all(map(_text, values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or an array of strings')
    return errors, [] if "license" in data else ['"license" is missing']


def check_eval_results(text: str) -> list[str]:
    """Errors in a file of `.eval_results/`."""
    entries = yaml.safe_load(text)
    if not isinstance(entries, list) or not entries:
        return ["a list of results is expected"]
    return [
        f"result {n} needs dataset.id, dataset.task_id and value"
        for n, entry in enumerate(entries)
        if not all(map(_text, (entry.get("dataset", {}).get("id"), entry.get("dataset", {}).get("task_id"))))
        or not isinstance(entry.get("value"), int | float)
    ]


def _text(value) -> bool:
    return isinstance(value, str) and value != ""


def _model_index_errors(index) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for entry in index:
        if not isinstance(entry, dict) or not _text(entry.get("name")) or not isinstance(entry.get("results"), list):
            errors.append('"model-index" needs a name and results')
            continue
        for n, result in enumerate(entry["results"]):
            wanted = {"task": ("type",), "dataset": ("type", "name")}
            missing = [f"{a}.{b}" for a, keys in wanted.items() for b in keys if not _text(result.get(a, {}).get(b))]
            metrics = result.get("metrics") or [{}]
            if not all(_text(metric.get("type")) and metric.get("value") is not None for metric in metrics):
                missing.append("metrics[].type and value")
            if missing:
                errors.append(f'"model-index[0].results[{n}]" lacks {", ".join(missing)}')
    return errors
