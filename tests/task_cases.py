"""The functions that make the rows of the offline tasks, and digests of what they make."""

import hashlib
import importlib.util
import json

from wkv.eval_tasks import tasks_path

LENGTHS = (1024, 4096, 16384, 65536)
QUICK = ("mmlu_dev", "last_words", "whole_speeches", *(f"state_recall {tokens}" for tokens in LENGTHS))
RULER = ("variable_tracking", "common_words", "frequent_words")


def load_data():
    spec = importlib.util.spec_from_file_location("data", tasks_path() / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_by(data, name: str) -> list[dict]:
    """The rows of a function of the tasks, `name` being it and the tokens that it takes."""
    function, *tokens = name.split()
    return list(getattr(data, function)(version=1.0, **({"tokens": int(*tokens)} if tokens else {}))["test"])


def digests(rows: dict[str, list[dict]]) -> dict[str, str]:
    return {name: hashlib.sha256(json.dumps(rows[name]).encode()).hexdigest() for name in rows}
