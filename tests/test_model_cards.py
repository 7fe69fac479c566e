"""The cards of the official families: commands that the command line knows, formats that are the templates', figures
that are those of `eval/published.yaml`, sizes that fit together, links that lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from huggingface_hub import ModelCard
from huggingface_hub.cli.hf import app as hub_app
from yaml import safe_load

from wkv.card_facts import CONVERSATION
from wkv.cards import LICENCES
from wkv.chat import FORMATS
from wkv.cli import app
from wkv.presets import PRESETS
from wkv.vocabulary import build_tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "model_cards"
FAMILIES = sorted(path.stem for path in FOLDER.glob("rwkv-*.md"))
# `hf` is such a group, `wkv` is made one where it runs.
GROUPS = {"wkv": typer.main.get_command(app), "hf": hub_app}
# Columns of the tables of scores: lm-eval's task and metric.
COLUMNS = {
    "LAMBADA ppl": ("lambada_openai", "perplexity,none"),
    "LAMBADA acc": ("lambada_openai", "acc,none"),
    "PIQA acc": ("piqa", "acc,none"),
    "StoryCloze acc": ("storycloze_2016", "acc,none"),
    "HellaSwag acc": ("hellaswag", "acc,none"),
    "HellaSwag acc_norm": ("hellaswag", "acc_norm,none"),
    "WinoGrande acc": ("winogrande", "acc,none"),
    "MMLU acc": ("mmlu", "acc,none"),
}
WIDTHS = {"4": lambda C: 4 * C, "5": lambda C: 7 * C // 64 * 32, "6": lambda C: 7 * C // 64 * 32, "7": lambda C: 4 * C}


def read(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table, by the names of its columns."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    head, _, *rows = (
        ([c.strip() for c in line.strip("|").split("|")] for line in lines[0].splitlines()) if lines else [[], []]
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def parse(group, words: list[str]) -> dict:
    """The options and arguments of a command line that the group's commands take; else typer's usage error."""
    name, command, rest = group.resolve_command(typer.Context(group), words)
    if hasattr(command, "resolve_command"):
        return parse(command, rest)
    return {"command": name} | command.make_context(name, list(rest)).params


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if re.match(r"    (wkv|hf) ", line)]


@pytest.mark.parametrize("name", ["README", *FAMILIES])
def test_commands_are_known(name):
    """Each takes what the one before wrote."""
    made = {}
    found = commands(read(name))
    assert found
    for program, *words in found:
        given = parse(GROUPS[program], words)
        if program == "hf":
            made[f"{given['local_dir']}/{given['filenames'][0]}"] = True
        elif given["command"] == "convert":
            assert str(given["source"]) in made
            made[str(given["destination"])] = True
        elif name != "README":
            assert str(given["folder"]) in made


def test_an_unknown_option_is_found():
    with pytest.raises(typer.BadParameter.__base__):
        parse(GROUPS["wkv"], ["convert", "a", "b", "--chek"])
    with pytest.raises(typer.BadParameter.__base__):
        parse(GROUPS["wkv"], ["chat", "a", "--chat-template", "g2"])


@pytest.mark.parametrize("name", ["README", *FAMILIES])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", read(name)):
        assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_every_family_is_listed():
    listed = {row["card"] for row in table(read("README"))}
    assert {f"[{name}.md]({name}.md)" for name in FAMILIES} == listed - {
        "[demo_model](../src/wkv/demo_model/README.md)"
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_metadata(name):
    data = ModelCard.load(FOLDER / f"{name}.md").data
    assert data.license in LICENCES.split() and data.language and data.pipeline_tag == "text-generation"
    generation = name.split("-")[1]
    assert data.tags == ["rwkv"] + ([] if generation == "4" else [f"rwkv{generation}"])


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_fit_together(name):
    text = read(name)
    for row in table(text):
        width = int(row["width"])
        assert int(row["channel-mix"]) == WIDTHS[name.split("-")[1]](width), row
    rows = "50304" if name == "rwkv-7-pile" else "50277" if re.search("pile|raven", name) else "65536"
    assert f"{rows} embeddings" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_published_ones(name):
    text = read(name)
    family = re.search(r"^# (.*)$", text, re.MULTILINE)[1]
    told, scores = set(), section(text, "Published scores")
    for row in table(scores):
        for column, value in row.items():
            if column in COLUMNS and value != "-":
                value = float(value) if column.endswith("ppl") else round(float(value) / 100, 6)
                told.add((row["size"], row.get("source"), *COLUMNS[column], value))
        assert row.keys() <= {"size", "source", *COLUMNS}
    published, sources = set(), set()
    for figure in safe_load((ROOT / "eval" / "published.yaml").read_text(encoding="utf-8")):
        if figure["model"].startswith(f"{family} "):
            published.add(tuple(figure[key] for key in ("size", "source", "task", "metric", "value")))
            sources.add(figure["source"])
    if any(figure[1] for figure in told):
        assert told == published
    else:
        assert told == {(size, None, *rest) for size, _, *rest in published}
        assert all(source in scores for source in sources) and len(sources) <= 1
    assert told or "None are known to us" in scores


def template_of(name: str) -> str | None:
    return {"rwkv-4-pile": None, "rwkv-7-pile": None, "rwkv-4-raven": "raven", "rwkv-7-g1": "g1"}.get(name, "world")


@pytest.mark.parametrize("name", [name for name in FAMILIES if template_of(name)])
def test_prompts_are_the_templates(name):
    text, style = section(read(name), "Prompt format"), template_of(name)
    tokenizer = build_tokenizer(pieces=[bytes([i]) for i in range(256)], chat_template=style)
    question = CONVERSATION[-1:]
    conversations = {
        "world": [(CONVERSATION, {})],
        "raven": [(CONVERSATION, {}), (question, {"instruction": True})],
        "g1": [(question, {}), (question, {"enable_thinking": True}), (question, {"enable_thinking": False})],
    }[style]
    shown = re.findall(r"```\n(.*?)\n```", text, re.DOTALL)
    for conversation, options in conversations:
        prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options)
        assert prompt.removesuffix("\n") in shown, prompt
    assert len(shown) == len(conversations)
    preset = PRESETS[FORMATS[style].preset]
    sampling = f"temperature {preset.temperature}, top-p {preset.top_p}, penalties {preset.presence} (presence) and "
    assert sampling + f"{preset.frequency} (frequency)" in text
    listed = {row["card"]: row["chat template"] for row in table(read("README"))}
    assert listed[f"[{name}.md]({name}.md)"] == style
