"""Where the evaluation files are: `eval/` of a checkout, which a wheel carries as `wkv/eval`."""

from pathlib import Path


def eval_folder() -> Path:
    """The folder with the tasks, metrics and published figures.

    Raises FileNotFoundError where the package was taken out of its checkout.
    """
    packaged, checkout = Path(__file__).with_name("eval"), Path(__file__).parents[2] / "eval"
    for folder in (packaged, checkout):
        if (folder / "tasks").is_dir():
            return folder
    raise FileNotFoundError(f"the evaluation tasks are missing: neither {packaged} nor {checkout} is there")


def tasks_path() -> Path:
    """The folder for lm-eval's `TaskManager(include_path=...)` and `--include_path`."""
    return eval_folder() / "tasks"


def published_figures() -> list[dict]:
    """Scores that others published, as `eval/published.yaml` lists and explains them."""
    import yaml

    return yaml.safe_load((eval_folder() / "published.yaml").read_text(encoding="utf-8"))
