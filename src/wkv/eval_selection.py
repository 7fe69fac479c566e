"""Which of lm-eval's tasks `wkv eval` runs: looked up, and loaded, before any model is."""

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub.constants
from huggingface_hub.utils import get_session
from lm_eval.tasks import TaskManager

from .eval_tasks import tasks_path
from .results import without_paths

SECONDS_TO_ANSWER = 3
# Dataset builders that read the files that they are given.
LOCAL_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "webdataset", "imagefolder", "audiofolder")
# What lm-eval adds to every task's metadata and is no part of its definition.
SURROUNDINGS = ("pretrained", "tokenizer", "config_source", "config")


class TaskChoice:
    """The tasks and groups of the names that the user gave; `load` builds them for a model."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None):
        """Find the names, and fetch nothing. Raises `ValueError` for an unknown one."""
        if include_path is not None and not include_path.is_dir():
            raise ValueError(f"{include_path}: no such folder of tasks")
        paths = [str(path) for path in (tasks_path(), include_path) if path is not None]
        # RULER's tasks read from it whose tokens they count; a later model takes its place.
        self._metadata = {"pretrained": ""}
        self.names = list(dict.fromkeys(names))
        # lm-eval's own fifteen thousand take seconds to read.
        self.manager = TaskManager(include_path=paths, include_defaults=False, metadata=self._metadata)
        if any(name not in self.manager.task_index for name in self._all_names()):
            self.manager = TaskManager(include_path=paths, metadata=self._metadata)
        known = self.manager.task_index
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists lm-eval's own"
                raise ValueError(f"there is no task {name}{hint}")

    def _all_names(self) -> Iterator[str]:
        """The names, those of the groups' and tags' members, and so on inwards."""
        waiting, seen = list(self.names), set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            if (entry := self.manager.task_index.get(name)) is None:
                continue
            members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else entry.tags
            if entry.kind.name in ("GROUP", "TAG"):
                waiting += [m if isinstance(m, str) else m.get("task") or m.get("group") for m in members or ()]

    def load(self, model: str, tokenizer: str | None = None) -> list:
        """lm-eval's tasks and groups for a model, with their data.

        Raises `ValueError` that names the tasks whose data are on the Hub if it cannot be reached and they are not in
        the cache of `datasets`, or the task that cannot be loaded for another reason.
        """
        self._metadata.update(pretrained=model, tokenizer=tokenizer or model)
        datasets.disable_progress_bars()
        index = self.manager.task_index
        remote = [name for name in self._all_names() if name in index and _is_remote(index[name].cfg or {})]
        if remote and (why := why_offline()):
            missing = [name for name in sorted(remote) if not self._is_cached(name)]
            if missing:
                names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                raise ValueError(
                    f"{names}: the data are on the Hub and not in this machine's cache, and {why}; run where it can be "
                    "reached, or take --tasks offline"
                )
        loaded = []
        for name in self.names:
            try:
                built = self.manager.load([name])
            # Loading runs the code of tasks, which raises whatever it likes.
            except Exception as error:
                raise ValueError(f"task {name} cannot be loaded: {type(error).__name__}: {error}") from error
            loaded += [built["groups"][name]] if name in built["groups"] else built["tasks"].values()
        # Of tasks that are built it only checks that none comes twice.
        self.manager.load(loaded)
        return loaded

    def _is_cached(self, name: str) -> bool:
        try:
            self.manager.load([name])
        # Offline, a missing dataset shows as one of many types.
        except Exception:
            return False
        return True


def tasks_sha256(loaded: Iterable) -> dict[str, str]:
    """Digests of the tasks' definitions, by which later runs know whether they are the same."""
    digests = {}
    for task in _all_tasks(loaded):
        config = without_paths(task.dump_config())
        metadata = {k: v for k, v in (config.get("metadata") or {}).items() if k not in SURROUNDINGS}
        digests[task.config.task] = hashlib.sha256(_as_text(config | {"metadata": metadata})).hexdigest()
    return digests


def documents_sha256(loaded: Iterable, num_fewshot: int | None = None) -> dict[str, str]:
    """Digests of the tasks' documents and, with examples, of those that these are drawn from.

    `num_fewshot` takes the place of the tasks' own.
    """
    digests = {}
    for task in _all_tasks(loaded):
        digest = hashlib.sha256()
        shots = task.config.num_fewshot if num_fewshot is None else num_fewshot
        for documents in (task.eval_docs, task.fewshot_docs() if shots else ()):
            for document in documents:
                digest.update(_as_text(document))
        digests[task.config.task] = digest.hexdigest()
    return digests


def _all_tasks(loaded: Iterable) -> Iterator:
    for item in loaded:
        yield from item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def _as_text(value) -> bytes:
    """JSON that is the same in every process: without the addresses of functions."""
    return re.sub(" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True, default=str)).encode()


def _is_remote(config: dict) -> bool:
    path = config.get("dataset_path")
    if not path or not isinstance(path, str) or config.get("custom_dataset"):
        return False
    return path not in LOCAL_BUILDERS and not Path(path).exists()


@functools.cache
def why_offline() -> str | None:
    """Why the Hub cannot be used, or None if it answers; asked once, so that nothing waits, and caches stay usable."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE says to stay off it"
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        reply = get_session().get(f"{endpoint}/api/models?limit=1", timeout=SECONDS_TO_ANSWER)
        reply.raise_for_status()
        # A proxy's page is no JSON.
        reply.json()
    # Of the library that the Hub's client happens to be built on.
    except Exception as error:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return f"{endpoint} cannot be reached ({error})"
    return None
