"""`wkv chat` and the state files of `wkv generate` as a person uses them, on the shipped model and tiny ones."""

import re

import pytest
import torch
from command_line import assert_refused, process, wkv
from conftest import busy_model

from wkv import demo_model_path
from wkv.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """By model type, a tiny model with a tokenizer of bytes and a few longer pieces."""
    folders = {}

    def folder_of(model_type: str):
        if model_type not in folders:
            path = folders[model_type] = tmp_path_factory.mktemp(model_type)
            busy_model(model_type, vocab_size=320).save_pretrained(path)
            build_tokenizer(pieces=[b" the", b"\n\n", b"User", "é".encode()]).save_pretrained(path)
        return folders[model_type]

    return folder_of


@pytest.fixture
def folder(model_type, folder_of):
    return folder_of(model_type)


def test_a_conversation_with_the_shipped_model(tmp_path):
    """A process of its own, with every command: what is loaded and what is said again continues as before."""
    state, again = tmp_path / "talk.state", tmp_path / "again.state"
    lines = [
        "/help",
        "/retry",
        "Who are you?",
        f"/save {state}",
        "And what do you want?",
        "/retry",
        "/paint",
        "/save",
        "/load no-such-file",
        f"/load {state}",
        f"/save {again}",
        "And what do you want?",
        "/reset",
        "Who are you?",
        "/exit",
        "never read",
    ]
    arguments = ["chat", demo_model_path(), "--max-new-tokens", 12, "--temperature", 0, "--dtype", "float32"]
    result = process(*arguments, input="\n".join(lines) + "\n", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for command in ("/reset", "/retry", "/save FILE", "/load FILE", "/exit"):
        assert command in result.stdout.split("Assistant:")[0]
    answers = [part.split("\n\n")[0] for part in result.stdout.split("Assistant:")[1:]]
    who, want, retried, loaded, anew = answers
    assert len(who) > 10 and len(want) > 10 and who == anew and want == retried == loaded != who
    assert again.read_bytes() == state.read_bytes()
    errors = [line for line in result.stderr.splitlines() if line.startswith("wkv: ")]
    for line, words in zip(errors, ("no answer", "/paint", "/save needs", "no-such-file: cannot be read"), strict=True):
        assert words in line
    assert f"({state} is written)" in result.stdout and f"({state} is loaded)" in result.stdout
    assert sorted(tmp_path.iterdir()) == [again, state]
    # A turn after the first reads no more than its own message and one token before it.
    read = [int(tokens) for tokens in re.findall(r"prompt (\d+) tokens", result.stderr)]
    assert len(read) == 5 and max(read) < 25


def test_chat_answers_each_line_and_reset_forgets(folder):
    lines = "hello\n/reset\nhello\n\nmore\n/exit\nnever read\n"
    result = wkv("chat", folder, "--max-new-tokens", 8, "--temperature", 0, input=lines)
    assert result.returncode == 0, result.stderr
    first, _, again = result.stdout.partition("(forgotten)")
    answers = [part.split("\n\n")[0] for part in (first + again).split("Assistant:")[1:]]
    assert len(answers) == 3 and len(result.stderr.strip().splitlines()) == 3
    assert answers[0] == answers[1] != ""
    end_of_input = wkv("chat", folder, "--max-new-tokens", 2, input="hello\n")
    assert end_of_input.returncode == 0, end_of_input.stderr


def test_chat_in_other_formats(folder_of):
    folder = folder_of("rwkv")
    for options, opening in (
        (["--chat-template", "raven"], "Bob: Alice:"),
        (["--chat-template", "g1", "--thinking"], "User: Assistant: <think"),
        (["--chat-template", "g1", "--no-thinking", "--preset", "reasoning"], "User: Assistant: <think>\n</think"),
    ):
        result = wkv("chat", folder, "--max-new-tokens", 3, "--seed", 1, *options, input="hello\n")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(opening)
    assert_refused(wkv("chat", folder, "--thinking", input="hello\n"), "world has no thinking")


def test_generate_goes_on_from_a_state_as_from_the_text(folder, tmp_path):
    state = tmp_path / "prefix.state"
    options = ("--temperature", 0, "--max-new-tokens", 20)
    whole = wkv("generate", folder, "Hello, you and more", *options)
    saved = wkv("generate", folder, "Hello, you", *options, "--save-state", state)
    assert saved.returncode == 0 and saved.stdout == "" and "10 tokens were read" in saved.stderr
    for _ in range(2):
        continued = wkv("generate", folder, " and more", *options, "--state", state)
        assert continued.returncode == 0, continued.stderr
        assert "Hello, you" + continued.stdout == whole.stdout
    twice = tmp_path / "twice.state"
    assert wkv("generate", folder, " and", *options, "--state", state, "--save-state", twice).returncode == 0
    continued = wkv("generate", folder, " more", *options, "--state", twice)
    assert "Hello, you and" + continued.stdout == whole.stdout


def test_states_that_do_not_fit_are_refused_in_one_line(folder_of, tmp_path):
    folder = folder_of("rwkv6")
    state, tuned = tmp_path / "demo.state", tmp_path / "tuned.pth"
    assert wkv("generate", demo_model_path(), "Hello", "--save-state", state).returncode == 0
    torch.save({"blocks.0.att.time_state": torch.zeros(4, 16, 16)}, tuned)
    for path in (state, tuned, tmp_path / "none"):
        for command in (["generate", folder, "Hello"], ["chat", folder]):
            assert_refused(wkv(*command, "--state", path, input="Hello\n"), str(path))
    assert_refused(wkv("generate", folder, "x", "--save-state", tmp_path / "no" / "s"), "no such folder")


def test_a_tuned_state_begins_every_conversation(tmp_path):
    model, path = busy_model("rwkv7", vocab_size=320), tmp_path / "model"
    model.save_pretrained(path)
    build_tokenizer(pieces=[b"\n\n"]).save_pretrained(path)
    tuned = {f"blocks.{layer}.att.time_state": 3 * torch.randn(4, 16, 16) for layer in range(3)}
    torch.save(tuned, tmp_path / "tuned.pth")
    options = ("--max-new-tokens", 8, "--temperature", 0)
    plain = wkv("chat", path, *options, input="hello\n")
    result = wkv("chat", path, *options, "--state", tmp_path / "tuned.pth", input="hello\n/reset\nhello\n")
    assert result.returncode == 0, result.stderr
    answers = [part.split("\n\n")[0] for part in result.stdout.split("Assistant:")[1:]]
    assert answers[0] == answers[1] != plain.stdout.split("Assistant:")[1].split("\n\n")[0]
