"""Model cards: the README.md of a published folder, from its files, its results and the template `model_card.md`.

What a file tells is read from it; what only the author knows is asked for, and where nobody knows, the card says so.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .card_facts import PIPELINES, about_adapter, about_model
from .card_scores import benchmark_files, model_index, read_scores, refuse_other_models, score_table
from .hub_checks import LOCAL_PATH

TEMPLATE = Path(__file__).with_name("model_card.md")
# The identifiers of licences on the Hub.
LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0
gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
unknown other
"""
PROMPT = "The meaning of life is"


def make_card(
    folder: Path,
    repo_id: str,
    *,
    licence: str,
    base_model: str | None = None,
    language: Sequence[str] = (),
    data: str | Sequence[str] | None = None,
    training_command: str | None = None,
    results: Sequence[Path] = (),
    notes: str | None = None,
) -> str:
    """The text of README.md, with its metadata, for a model's folder or a PEFT adapter's, to be published as `repo_id`.

    `licence` is the Hub's identifier, `base_model` the Hub's id of what it was made from (an adapter's by default the
    one in its configuration), `language` codes of ISO 639, `data` a description or the Hub's ids of datasets, `notes`
    the intended use and limits, `results` files of `wkv eval` or lm-eval.

    Raises ValueError that names the file or the argument that is missing, damaged, or of another model.
    """
    folder, files = Path(folder), read_scores(results)
    validate_repo_id(repo_id)
    _refuse_paths(licence=licence, data=data, training_command=training_command, notes=notes)
    refuse_other_models(files, folder, repo_id)
    about = about_adapter(folder, base_model) if is_adapter(folder) else about_model(folder, base_model)
    datasets = [data] if isinstance(data, str) else list(data or ())
    hub_datasets = [name for name in datasets if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    links = [f"[{name}](https://huggingface.co/datasets/{name})" if name in hub_datasets else name for name in datasets]
    evaluation = model_index(files)
    metadata = ModelCardData(
        language=_languages(language),
        license=_licence(licence),
        library_name="peft" if about["adapter"] else "transformers",
        pipeline_tag=PIPELINES[about["auto_class"]],
        tags=about.pop("tags"),
        base_model=about["base_model"],
        base_model_relation="adapter" if about["adapter"] else None,
        datasets=hub_datasets or None,
        metrics=sorted({result.metric_type for result in evaluation}) or None,
        model_name=repo_id.rpartition("/")[2] if evaluation else None,
        eval_results=evaluation or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        prompt=PROMPT,
        data=", ".join(links),
        training_command=training_command,
        curves=sorted(path.name for path in folder.glob("curve*.png")),
        scores=score_table(files) if files else "",
        notes=notes,
        **about,
    )
    return f"{card}\n"


def evaluation_files(results: Sequence[Path]) -> dict[str, bytes]:
    """`.eval_results/NAME.yaml` for the tasks whose dataset has a leaderboard on the Hub; none for local tasks."""
    return benchmark_files(read_scores(results))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, a tuned state among them, and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _licence(licence: str) -> str:
    name = (licence or "").strip().lower().replace(" ", "-")
    if not name:
        raise ValueError("licence is missing: give the Hub's identifier of one, apache-2.0 for example")
    if name not in LICENCES.split():
        raise ValueError(f"licence {licence!r} is none that the Hub knows, such as apache-2.0; others are `other`")
    return name


def _languages(codes: Sequence[str]) -> list[str] | None:
    codes = [codes] if isinstance(codes, str) else list(codes)
    for code in codes:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual", code):
            raise ValueError(f"language {code!r} is no code of ISO 639, such as en or zh")
    return codes or None


def _refuse_paths(**texts: str | Sequence[str] | None) -> None:
    for name, text in texts.items():
        if found := LOCAL_PATH.search(text if isinstance(text, str) else " ".join(text or ())):
            raise ValueError(f"{name} holds the path {found[0]!r} of this machine; write it relative to the project")
