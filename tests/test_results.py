"""Results of `wkv eval` as data: what is read from them, what may stand side by side, what tables and charts show."""

from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from wkv import results_published
from wkv.eval_command import parse_lengths, parse_limit
from wkv.results import (
    Cell,
    check_comparable,
    check_model,
    files_sha256,
    labels,
    read_results,
    rows,
    weights_sha256,
    without_paths,
    without_paths_in_line,
    write_results,
)
from wkv.results_chart import chart_series, draw_chart
from wkv.results_published import find_published, published_of, published_table
from wkv.results_tables import comparison_table, notes


def make_results(model: str = "a", acc: float = 0.5, **facts) -> dict:
    """A group with a figure of its own, `knowledge` of `easy` and `hard`, beside `speech` and `ruler`."""
    choices = {"acc,none": acc, "acc_stderr,none": 0.1, "exact_match,strict": acc / 2, "alias": "x", "sample_len": 10}
    return {
        "results": {
            "easy": choices,
            "hard": choices | {"acc,none": 0.0, "acc_stderr,none": 0.0},
            "speech": {"bits_per_byte,none": 1.25, "bits_per_byte_stderr,none": "N/A", "word_perplexity,none": 600.5},
            "ruler": {"1024,none": 0.75, "2048,none": -1, "acc,none": 0.75},
            "knowledge": {"acc,none": acc / 2, "acc_stderr,none": 0.05},
            "all": {"alias": "all"},
        },
        "group_subtasks": {"knowledge": ["easy", "hard"], "all": ["knowledge", "speech", "ruler"]},
        "configs": {name: {} for name in ("easy", "hard", "speech", "ruler")},
        "versions": dict.fromkeys(("easy", "hard", "speech", "ruler", "knowledge", "all"), 1),
        "n-shot": dict.fromkeys(("easy", "hard", "speech", "ruler"), 0),
        "higher_is_better": {
            name: {"acc": True, "exact_match": True, "1024": True, "bits_per_byte": False, "word_perplexity": False}
            for name in ("easy", "hard", "speech", "ruler", "knowledge")
        },
        "n-samples": {n: {"original": 40, "effective": 10} for n in ("easy", "hard", "speech", "ruler")},
        "config": {"limit": None},
        "model_name_sanitized": model,
        "date": 0,
        "wkv": {"model": model, "model_sha256": 64 * model, "tokens_per_second": 100.0} | facts,
    }


MEMORY = {"512": {"cache_bytes": 1000, "process_bytes": 10**9}, "64": {"cache_bytes": 1000, "process_bytes": 10**8}}


def test_rows_hold_every_figure_once_with_its_interval():
    both = [make_results(), make_results("b", acc=0.25)]
    del both[1]["results"]["speech"]
    table = {(row.task, row.metric): row for row in rows(both)}
    assert list(dict.fromkeys(task for task, _ in table)) == ["knowledge", "easy", "hard", "speech", "ruler"]
    assert table["easy", "acc"].cells == (Cell(0.5, 0.196, 10), Cell(0.25, 0.196, 10))
    assert table["easy", "exact_match (strict)"].cells[0] == Cell(0.25, None, 10)
    # A group is of all its parts' documents; no spread is no interval; a length says nothing of other lengths.
    assert table["knowledge", "acc"].cells[0].documents == 20
    assert table["hard", "acc"].cells[0] == Cell(0.0, None, 10)
    assert table["ruler", "at 1024 tokens"].cells[0] == Cell(0.75, None, None)
    assert ("ruler", "at 2048 tokens") not in table
    assert table["speech", "bits_per_byte"].cells == (Cell(1.25, None, 10), None)
    assert table["easy", "acc"].is_share() and not table["speech", "bits_per_byte"].is_share()


def test_table_and_notes():
    limited = make_results("b", resumed=True, tokens_asked=12345, memory_by_context=MEMORY)
    limited["config"]["limit"] = 3
    table = comparison_table([make_results(), limited])
    assert table.header == ["task", "metric", "documents", "a", "b"]
    lines = {(line[0], line[1]): line[2:] for line in table.lines}
    assert lines["easy", "acc ↑"] == ["10", "0.5000 ± 0.1960", "0.5000 ± 0.1960"]
    assert lines["speech", "word_perplexity ↓"] == ["10", "600.50", "600.50"]
    assert lines["", "tokens asked for"] == ["", "", "12,345"]
    assert lines["", "state or cache, process: 64 tokens"] == ["", "", "1.0 kB, 100.0 MB"]
    assert [line[1] for line in table.lines[-2:]] == [f"state or cache, process: {n} tokens" for n in (64, 512)]
    assert table.markdown().splitlines()[2:4] == [
        "| task | metric | documents | a | b |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    assert ["--limit 3" in note for note in notes([make_results(), limited])] == [False, True, False]
    assert "b: an interrupted run" in notes([limited])[2]
    shots = make_results(settings={"num_fewshot": 2})
    shots["n-shot"] |= {"easy": 2, "hard": 2}
    led = make_results(settings={"leading_token": True})
    assert len(notes([led])) == 1
    led["config"]["model"] = "hf"
    assert notes([led])[1] == "a: without --leading-token, which is for RWKV models alone."
    assert notes([shots])[1].endswith("--num-fewshot 2, for their own number is fixed: speech, ruler.")


def test_several_results_of_one_model_are_told_apart():
    assert labels([make_results(), make_results("b"), make_results()]) == ["a (1)", "b", "a (2)"]


def test_chart_draws_the_figures(tmp_path):
    both = [make_results(memory_by_context=MEMORY), make_results("b", acc=0.25)]
    series = chart_series(both)
    assert series.accuracy["b"]["easy acc"] == Cell(0.25, 0.196, 10)
    assert "knowledge acc" in series.accuracy["a"] and "speech word_perplexity" not in series.accuracy["a"]
    assert series.bits_per_byte == {n: {"speech bits_per_byte": Cell(1.25, None, 10)} for n in "ab"}
    assert series.tokens_per_second == {"a": 100.0, "b": 100.0}
    assert series.cache == {"a": {64: 1000, 512: 1000}, "b": {}}
    assert series.process["a"] == {64: 10**8, 512: 10**9}
    for drawn in (series, chart_series(both[1:])):
        draw_chart(drawn, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


def test_groups_stand_for_their_parts_in_a_full_chart(monkeypatch):
    monkeypatch.setattr("wkv.results_chart.MOST_BARS", 3)
    assert list(chart_series([make_results()]).accuracy["a"]) == ["knowledge acc", "ruler at 1024 tokens", "ruler acc"]


def test_files_are_whole_and_hold_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.json").touch()
    texts = [f"{tmp_path}/data/x.json", f"see {tmp_path}/data/x.json,", f"{Path(__file__)}", str(tmp_path)]
    assert without_paths({"a": texts}) == {"a": ["data/x.json", "see data/x.json,", "test_results.py", tmp_path.name]}
    # What a task says is no path, though it may look like one.
    kept = ["https://example.org/a/b", "and/or", "</s>", "1/2/3", "/no/such/place/here"]
    assert without_paths(kept) == kept
    # Names with blanks, folders of the root, what follows a colon, options.
    (tmp_path / "my model").mkdir()
    own = [f"{tmp_path}/my model", f"path:{tmp_path}/data", f"file://{tmp_path}/data", "/tmp", "/"]
    assert without_paths(own) == ["my model", "path:data", "file://data", "tmp", "/"]
    line = without_paths_in_line(["wkv", f"{tmp_path}/my model", f"--output={tmp_path}/out", "a/b"])
    assert line == "wkv 'my model' --output=out a/b"
    with monkeypatch.context() as patch:
        patch.chdir("/")
        assert without_paths([f"{tmp_path}/my model"]) == ["my model"]
    path = write_results(tmp_path / "new", make_results())
    assert write_results(tmp_path / "second", make_results() | {"date": 0.5}).name != path.name
    assert path.name.startswith("results_a_19") and read_results(path) == make_results()
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_results(tmp_path / "new", make_results() | {"date": 10**9})
    assert [file.name for file in (tmp_path / "new").glob("*.json")] == [path.name]


def test_weights_tell_models_apart(tmp_path):
    def save(name: str, **tensors) -> str:
        (tmp_path / name).mkdir()
        for part, tensor in tensors.items():
            save_file({part: tensor}, tmp_path / name / f"{part}.safetensors")
        (tmp_path / name / "training_args.bin").write_text(name)
        return weights_sha256(tmp_path / name)

    one = save("one", x=ones(3), y=ones(4))
    assert save("copy", x=ones(3), y=ones(4)) == one
    assert len({one, save("trained", x=ones(3), y=2 * ones(4)), save("smaller", x=ones(3))}) == 3
    assert weights_sha256(tmp_path / "one" / "x.safetensors") == weights_sha256(tmp_path / "smaller")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has no weights"):
        weights_sha256(tmp_path / "empty")


def test_files_beside_the_weights_tell_models_apart(tmp_path):
    def digest(**files) -> str:
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return files_sha256(tmp_path)

    found = [digest(config__json='{"eps": 1, "_name_or_path": "a"}')]
    assert digest(config__json='{"_name_or_path": "b", "eps": 1}', trainer_state__json="1", README__md="") == found[0]
    for changed in (
        {"config__json": '{"eps": 2}'},
        {"generation_config__json": "{}"},
        {"chat_template__jinja": "a"},
        {"vocab__txt": "a"},
        {"tokenizer__model": "a"},
        {"modeling__py": "a"},
        {"tokenizer__json": "{"},
    ):
        found.append(digest(**changed))
    assert len(set(found)) == 8


def test_results_know_their_model():
    digests = {"one": 64 * "a", "two": 64 * "b"}
    others = {"two": {"files_sha256": "1", "base_sha256": None}}
    assert check_model(Path("x.json"), make_results("b", files_sha256="1"), digests, others) == "two"
    for stale in (make_results("b"), make_results("b", files_sha256="1", base_sha256="2")):
        with pytest.raises(ValueError, match=r"x.json: .*another model: it has the weights of two, but another"):
            check_model(Path("x.json"), stale, digests, others)
    assert check_model(Path("x.json"), make_results("b"), digests) == "two"
    with pytest.raises(ValueError, match=r"x.json: .*another model: of c with the weights cccccccccccc, not of one"):
        check_model(Path("x.json"), make_results("c"), digests)


def test_what_may_stand_side_by_side():
    plain = make_results("b")
    del plain["wkv"]
    digest = {"tasks_sha256": {"easy": "1" * 64}}
    check_comparable([("x", make_results(**digest)), ("y", plain), ("z", make_results("c", **digest))])
    with pytest.raises(ValueError, match=r"easy cannot be compared: definition 111111111111 in x, 222222222222 in z"):
        others = ("x", make_results(**digest)), ("y", plain), ("z", make_results(tasks_sha256={"easy": "2" * 64}))
        check_comparable(others)
    data = [(n, make_results(documents_sha256={"easy": n})) for n in "xy"]
    with pytest.raises(ValueError, match="easy cannot be compared: documents x in x, y in y"):
        check_comparable(data)
    # Made by a function, perhaps for the model's tokenizer.
    for _, results in data:
        results["configs"]["easy"] = {"custom_dataset": "def f(): ..."}
    check_comparable(data)


def test_limits_and_lengths():
    assert [parse_limit(text) for text in (None, "5", "5.0", "0.25")] == [None, 5, 5, 0.25]
    assert (parse_lengths("512, 64,64"), parse_lengths("")) == ((64, 512), ())


FIGURES = [
    {
        "model": "RWKV-4 Pile 169M",
        "task": "easy",
        "metric": "acc,none",
        "value": 0.25,
        "source": "card",
        "status": "read",
    },
    {"model": "RWKV-4 Pile 169M", "task": "hard", "metric": "acc,none", "value": 0.3, "num_fewshot": 5}
    | {"source": "paper", "status": "secondary"},
    {
        "model": "RWKV-4 Pile 169M",
        "task": "elsewhere",
        "metric": "acc,none",
        "value": 0.3,
        "source": "",
        "status": "read",
    },
    {
        "model": "RWKV-7 World 1.5B",
        "task": "easy",
        "metric": "acc,none",
        "value": 0.7,
        "source": "card",
        "status": "read",
    },
]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.setattr(results_published, "published_figures", lambda: FIGURES)


def test_ours_published_and_difference(figures):
    table = published_table(make_results(), find_published("rwkv-4 pile 169m"))
    assert table.title == "a beside the published figures of RWKV-4 Pile 169M"
    assert table.lines == [
        ["easy", "acc", "0.5000 ± 0.1960", "0.2500", "+0.2500", "card"],
        # Five examples are another question.
        ["hard", "acc", "0.0000", "0.3000", "", "paper; with 5 examples, ours with 0 (quoted)"],
    ]
    unknown = published_table(make_results(), [FIGURES[0] | {"num_fewshot": None}]).lines[0]
    assert unknown[4:] == ["", "card; with an unknown number of examples, ours with 0"]
    limited = make_results() | {"config": {"limit": 3}}
    assert "--limit 3, so not all" in published_table(limited, FIGURES).title
    assert published_table(make_results(), FIGURES[2:3]) is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rwkv-4-169m-pile", "RWKV-4 Pile 169M"),
        ("RWKV-4-Pile-169M-20220807-8023", "RWKV-4 Pile 169M"),
        ("RWKV7-Goose-World3-1.5B-HF", "RWKV-7 World 1.5B"),
        ("rwkv-4-pile-430m", None),
        ("rwkv-7-world-0.1B", None),
        ("demo_model", None),
    ],
)
def test_a_name_finds_its_figures_only_if_unmistakable(figures, name, found):
    assert {figure["model"] for figure in published_of(name)} == ({found} if found else set())


def test_the_figures_that_ship_are_found_by_their_names():
    for name in {figure["model"] for figure in results_published.published_figures()}:
        assert published_of(name) == find_published(name.upper()) != []
