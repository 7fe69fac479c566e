"""Uploading to the Hub: the large files first, each once, then one commit that names them all."""

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .tensor_files import LazyTensor, write_safetensors

# Seconds before a request that failed on the way, or in the Hub, is tried again.
WAITS = (1, 5)
LARGE = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
WEIGHTS = re.compile(r"(?:adapter_)?(?:model|pytorch_model)[-\w]*\.(?:safetensors|bin)(?:\.index\.json)?")
# What a former revision of another kind, with other shards or without a template would let loaders take for this one's.
STALE = re.compile(
    rf"{WEIGHTS.pattern}|(?:config|generation_config|adapter_config|tokenizer_config|special_tokens_map|tokenizer)\.json"
    r"|chat_template\.jinja|time_state\.pth|\.eval_results/.*"
)


class Entry(NamedTuple):
    """A file of a repository: its path there, where it comes from, its size, and a file, bytes or tensors to write."""

    path: str
    origin: str
    size: int
    content: Path | bytes | dict[str, LazyTensor]


class Pushed(NamedTuple):
    """The address of the revision, its name, and whether anything in it is new."""

    url: str
    oid: str
    is_new: bool


def push(entries: Sequence[Entry], repo_id: str, private: bool, revision: str, message: str) -> Pushed:
    """Upload the files as one commit, or as none where the revision has them all.

    Whatever interrupts it, the revision is as before, and doing it again sends what is still missing. Raises
    ValueError, one line, for whatever the Hub refuses.
    """
    if get_token() is None:
        raise ValueError("no token of the Hugging Face Hub: log in with `hf auth login`, or set HF_TOKEN")
    with _progress_bars(), _one_line(repo_id):
        for wait in WAITS:
            try:
                return _push(HfApi(), entries, repo_id, private, revision, message)
            except (HfHubHTTPError, httpx2.TransportError) as error:
                response = getattr(error, "response", None)
                if response is not None and response.status_code < 500:
                    raise
                print(f"{_reason(error, repo_id)}; trying again in {wait} s", file=sys.stderr)
                time.sleep(wait)
        return _push(HfApi(), entries, repo_id, private, revision, message)


def _push(api: HfApi, entries: Sequence[Entry], repo_id: str, private: bool, revision: str, message: str) -> Pushed:
    _validate_card(next(entry for entry in entries if entry.path == "README.md"), repo_id)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if api.model_info(repo_id).private != private:
        asked, found = ("private", "public") if private else ("public", "private")
        raise ValueError(f"{repo_id} exists and is {found}, not {asked}: give --{found}, or change it on the Hub first")
    try:
        before, base = api.model_info(repo_id, revision=revision), revision
    except RevisionNotFoundError:
        before, base = api.model_info(repo_id), "main"
    changes = []
    with tempfile.TemporaryDirectory() as folder:
        # Large files one at a time and in this thread: an interrupt is felt at once, and the disk holds one new shard.
        for entry in sorted(entries, key=_is_large, reverse=True):
            content = entry.content
            if isinstance(content, dict):
                content = Path(folder) / entry.path
                write_safetensors(content, entry.content)
            changes.append(CommitOperationAdd(entry.path, content))
            if _is_large(entry):
                api.preupload_lfs_files(repo_id, changes[-1:], revision=base, num_threads=1)
                # Sent large files are let go of.
                if isinstance(entry.content, dict) and changes[-1].path_or_fileobj == b"":
                    content.unlink()
        new = {entry.path for entry in entries}
        there = [sibling.rfilename for sibling in before.siblings]
        stale = [path for path in there if STALE.fullmatch(path) and path not in new]
        changes += map(CommitOperationDelete, stale)
        # Not before: an interrupt leaves no branch that is a copy of another.
        if base != revision:
            api.create_branch(repo_id, branch=revision, revision=before.sha, exist_ok=True)
        commit = api.create_commit(
            repo_id, changes, commit_message=message, revision=revision, parent_commit=before.sha
        )
    for path in stale:
        print(f"removed on the Hub: {path}")
    return Pushed(commit.commit_url, commit.oid, commit.oid != before.sha)


def _validate_card(entry: Entry, repo_id: str) -> None:
    """Ask the Hub about the metadata before anything is made there."""
    text = entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()
    try:
        RepoCard(text.decode()).validate(repo_type="model")
    except ValueError as error:
        raise ValueError(f"{repo_id}: the Hub does not take the metadata of {entry.path}: {error}") from error


def _is_large(entry: Entry) -> bool:
    return isinstance(entry.content, dict) or entry.size > 5_000_000 or Path(entry.path).suffix in LARGE


@contextmanager
def _progress_bars() -> Iterator[None]:
    """Progress bars where somebody can see them."""
    off = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            enable_progress_bars()


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the network as ValueErrors of one line."""
    try:
        yield
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, RuntimeError) as error:
        # What goes wrong in an upload is wrapped.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise ValueError(_reason(cause, repo_id)) from error


def _reason(error: Exception, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: the Hub cannot be reached: HF_HUB_OFFLINE is set"
    if isinstance(error, httpx2.TransportError):
        return f"{repo_id}: {constants.ENDPOINT} cannot be reached ({error})"
    if not isinstance(error, HfHubHTTPError):
        return f"{repo_id}: {error}"
    status, said = error.response.status_code, error.server_message or str(error)
    told = {
        401: f"{repo_id}: the Hub refuses the token (401); log in with `hf auth login`, or set HF_TOKEN",
        403: f"{repo_id}: the token may not write there (403); it needs the role `write` and rights to that name",
        404: f"{repo_id}: not found (404); its name or its revision is wrong, or the token cannot see it",
        412: f"{repo_id}: somebody else changed it meanwhile (412); publish again",
    }
    return told.get(status, f"{repo_id}: the Hub answers {status}: {said}")
