"""`wkv publish`: a folder becomes a repository of the Hugging Face Hub that runs with transformers alone.

What would be sent, and what must not be, is found out without the Hub; nothing is sent unless that is asked for.
"""

import codecs
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import validate_repo_id

from .cards import evaluation_files, is_adapter, make_card
from .hub_files import check_contents, complete_adapter, complete_model, kept_files, state_of
from .hub_upload import Entry, Pushed, push

README = "README.md"
# What PEFT and transformers leave where an author has not written yet.
UNFILLED, MADE = "[More Information Needed]", "This is the model card of a 🤗 transformers model that has been pushed"


@dataclass
class CardFacts:
    """What only the author knows; see `wkv.cards.make_card`."""

    licence: str | None = None
    base_model: str | None = None
    language: Sequence[str] = ()
    data: str | None = None
    training_command: str | None = None
    results: Sequence[Path] = ()
    notes: str | None = None


@dataclass
class Plan:
    """What a repository is to hold, and what of the folder stays behind."""

    entries: list[Entry]
    left_out: list[str]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    push_now: bool = False,
    private: bool = True,
    revision: str = "main",
    commit_message: str | None = None,
    max_shard_size: str = "50GB",
    allow_pickles: bool = False,
    exclude: Sequence[str] = (),
    facts: CardFacts | None = None,
) -> Pushed | None:
    """Show what a folder becomes on the Hub and, with `push_now`, upload it as one commit.

    `folder` is a model's or a PEFT adapter's, or the official file of a tuned state, for which the configuration of its
    base model is read, from the Hub where it is there, without `push_now` too. Raises ValueError, one line that
    names the file, for what cannot or must not be published, and for whatever the Hub refuses.
    """
    folder, facts = Path(folder), facts or CardFacts()
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id}: whose? Name the user or the organisation too: USER/{repo_id}")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(folder, repo_id, Path(scratch), max_shard_size, allow_pickles, exclude, facts)
        show(plan, repo_id, private, revision)
        if not push_now:
            print("dry run: nothing was sent; --push sends it")
            return None
        pushed = push(plan.entries, repo_id, private, revision, commit_message or f"Publish {folder.resolve().name}")
    print(f"published: {pushed.url}" if pushed.is_new else f"unchanged, no commit made: {pushed.url}")
    return pushed


def make_plan(
    folder: Path,
    repo_id: str,
    scratch: Path,
    max_shard_size: str,
    allow_pickles: bool,
    exclude: Sequence[str],
    facts: CardFacts,
) -> Plan:
    """The files of the repository; those made on the way lie in `scratch`. Raises ValueError as `publish` does."""
    if (state := state_of(folder)) is not None:
        folder, plan = _adapter_of_state(state, folder, scratch, exclude, facts.base_model)
    else:
        plan = kept_files(folder, exclude, allow_pickles)
    entries, left_out = plan
    if is_adapter(folder):
        complete_adapter(folder, entries, scratch, facts.base_model)
    elif "config.json" in entries:
        complete_model(folder, entries, scratch, max_shard_size)
    else:
        raise ValueError(f"{folder}: neither a model (config.json), an adapter (adapter_config.json) nor a tuned state")
    # Before the card is made: it quotes them.
    check_contents(folder, {name: entry for name, entry in entries.items() if not _is_unfilled(entry)})
    _add(entries, README, *_card(folder, repo_id, entries, facts))
    for name, data in evaluation_files(facts.results).items():
        _add(entries, name, "generated", data)
    check_contents(folder, {name: entry for name, entry in entries.items() if entry.origin == "generated"})
    return Plan(sorted(entries.values()), left_out)


def show(plan: Plan, repo_id: str, private: bool, revision: str) -> None:
    """Print every file with its size and where it comes from."""
    print(f"{repo_id}: {'private' if private else 'public'}, revision {revision}")
    width = max(len(entry.path) for entry in plan.entries)
    for entry in plan.entries:
        print(f"{_size(entry.size):>10}  {entry.path:<{width}}  {entry.origin}")
    print(f"{_size(sum(entry.size for entry in plan.entries)):>10}  in {len(plan.entries)} files")
    for name in plan.left_out:
        print(f"  left out: {name}")


def _adapter_of_state(state: Path, folder: Path, scratch: Path, exclude: Sequence[str], base_model: str | None):
    """The folder of an adapter with a tuned state, which PEFT loads, and its files with the official one."""
    from .commands import make_adapter

    if base_model is None:
        raise ValueError(f"{state}: name the model that it was tuned for with --base-model")
    adapter = scratch / "adapter"
    make_adapter(state, adapter, base_model)
    entries, _ = kept_files(adapter, (), False)
    entries = {name: entry._replace(origin="generated") for name, entry in entries.items()}
    beside, left_out = kept_files(folder, (*exclude, state.name), False) if folder.is_dir() else ({}, [])
    return adapter, (entries | beside, [name for name in left_out if name != state.name])


def _card(folder: Path, repo_id: str, entries: dict[str, Entry], facts: CardFacts) -> tuple[str, bytes]:
    """Where the card comes from, and its text: the folder's own with what its metadata lack, or a new one."""
    own = entries.get(README)
    own = None if own is None or _is_unfilled(own) else _read_card(own.content)
    known = own.data.to_dict() if own else {}
    if not isinstance(stated := known.get("license", ""), str):
        raise ValueError(f"{folder / README}: its license is {stated!r}, not the Hub's identifier of one")
    if stated:
        # As the Hub has them.
        known["license"] = stated.strip().lower()
    licence = facts.licence.lower() if facts.licence else known.get("license")
    if licence is None:
        raise ValueError(f"{folder}: no licence: give it with --licence, or as `license:` in the metadata of {README}")
    for key, given in {"license": licence, "base_model": facts.base_model, "language": facts.language}.items():
        if given and _listed(known.get(key, given)) != _listed(given):
            raise ValueError(f"{folder / README}: its {key} is {known[key]}, not {given} as the option says")
    new = make_card(folder, repo_id, **asdict(facts) | {"licence": licence})
    if own is None:
        return "generated", new.encode()
    missing = {key: value for key, value in RepoCard(new).data.to_dict().items() if key not in known}
    if facts.results and (there := {"model-index"} & known.keys()):
        raise ValueError(f"{folder / README}: has a {there.pop()} of its own; remove it, or leave out --results")
    if stated and known["license"] != stated:
        missing["license"] = known["license"]
    if not missing:
        return entries[README].origin, entries[README].content.read_bytes().removeprefix(codecs.BOM_UTF8)
    for key, value in missing.items():
        setattr(own.data, key, value)
    return "kept, with metadata", str(own).encode()


def _read_card(path: Path) -> RepoCard:
    try:
        return RepoCard(path.read_text("utf-8-sig"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: its metadata cannot be read ({error})") from error


def _listed(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_unfilled(entry: Entry) -> bool:
    """Whether a card is as PEFT or transformers made it; ValueError if its author began to fill it in."""
    if entry.path != README or UNFILLED not in (text := entry.content.read_text("utf-8-sig", errors="replace")):
        return False
    text = re.sub(r"\A---\n.*?\n---\n|<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    made = {line.split("<!--")[0].strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = [line.strip() for line in text.splitlines()]
    if all(line in made or line.startswith(("#", "- PEFT ", MADE)) for line in lines):
        return True
    first = next(number for number, line in enumerate(lines, 1) if UNFILLED in line)
    raise ValueError(f"{entry.content}: line {first} still says {UNFILLED}; fill it in or remove it")


def _add(entries: dict[str, Entry], name: str, origin: str, data: bytes) -> None:
    entries[name] = Entry(name, origin, len(data), data)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
