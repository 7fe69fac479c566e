"""Text that arrives whole, and conversations that live in the state alone."""

import pytest
import torch
from conftest import assert_close, busy_model, states
from transformers import LogitsProcessor, LogitsProcessorList

from wkv import chat as chat_module
from wkv.chat import Chat, TextStream, encode_prompt, format_of
from wkv.models.rwkv_chat_templates import CHAT_TEMPLATES
from wkv.states import load_state, read_text, save_state
from wkv.vocabulary import build_tokenizer, pile_tokenizer_file

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(pieces=[b"\n\n", "é".encode(), b"12", b" the", b"User"])


@pytest.fixture(scope="module")
def pile():
    return build_tokenizer(pile_tokenizer_file())


@pytest.fixture(scope="module")
def _talkers():
    return {}


@pytest.fixture
def talker(model_type, _talkers):
    if model_type not in _talkers:
        _talkers[model_type] = busy_model(model_type, vocab_size=262)
    return _talkers[model_type]


def say(chat: Chat, message: str, longest: int = 6) -> str:
    pieces = []
    chat.reply(message, pieces.append, longest)
    return "".join(pieces)


def script(monkeypatch, tokenizer, *answers: str) -> None:
    """Make the model say these answers, a turn each; "<end>" is id 0."""

    class Scripted(LogitsProcessor):
        def __init__(self, ids):
            self.ids = iter(ids)

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, float("-inf"))
            forced[:, next(self.ids)] = 0
            return forced

    turns = iter(answers)

    def arguments(*_):
        text, end, _ = next(turns).partition("<end>")
        ids = tokenizer.encode(text, add_special_tokens=False) + [0] * bool(end)
        return {"do_sample": False, "logits_processor": LogitsProcessorList([Scripted(ids)])}

    monkeypatch.setattr(chat_module, "generate_arguments", arguments)


def streamed(tokenizer, ids: list[int], stop=()) -> tuple[list[str], TextStream]:
    pieces = []
    stream = TextStream(tokenizer, pieces.append, stop)
    prompt = torch.tensor([[5, 6]])
    stream.put(prompt)
    for index in ids:
        prompt = torch.cat([prompt, torch.tensor([[index]])], 1)
        if stream(prompt, None).item():
            break
        stream.put(prompt[0, -1:])
    stream.end()
    return pieces, stream


def test_stream_gives_whole_characters(tokenizer):
    text = "a é 世界 😀."
    ids = [byte + 1 for byte in text.encode()]
    pieces, stream = streamed(tokenizer, ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert (stream.prompt_tokens, stream.tokens, stream.stopped) == (2, len(ids), False)
    assert stream.decode_seconds > 0


def test_stream_lets_invalid_bytes_through(tokenizer):
    pieces, _ = streamed(tokenizer, [0xFF + 1, *(byte + 1 for byte in b"abc"), 0xE4 + 1])
    assert "".join(pieces) == "\ufffdabc\ufffd"


def test_stream_stops_before_a_stop_string_that_comes_in_pieces(tokenizer):
    pieces, stream = streamed(tokenizer, [byte + 1 for byte in b"one\nUse\nUser: x"], ["\nUser"])
    assert "".join(pieces) == "one\nUse" and stream.stopped and stream.tokens == len(b"one\nUse\nUser")
    pieces, stream = streamed(tokenizer, [byte + 1 for byte in b"one\nUse"], ["\nUser"])
    assert "".join(pieces) == "one\nUse" and not stream.stopped


def test_a_conversation_equals_its_whole_text_read_again(talker, tokenizer):
    for longest in (1, 12):
        chat, text, said = Chat(talker, tokenizer, system="Be  kind.", **GREEDY), [], []
        ids = tokenizer.encode("System: Be  kind.\n\n")
        for message, cleaned in (("hello", "hello"), ("and again?\r\n\n\nyes ", "and again?\nyes"), ("third", "third")):
            pieces = []
            stream = chat.reply(message, pieces.append, longest)
            said.append("".join(pieces))
            ids += tokenizer.encode(f"User: {cleaned}\n\nAssistant:")
            options = {"max_new_tokens": longest, "do_sample": False, "suppress_tokens": [0]}
            whole = talker.generate(torch.tensor([ids]), **options)[0, len(ids) :]
            end = next((n for n in range(longest) if "\n\n" in tokenizer.decode(whole[: n + 1])), longest - 1)
            answer = whole[: end + 1].tolist()
            assert stream.tokens == len(answer)
            text.append(tokenizer.decode(answer).split("\n\n")[0])
            ids += answer + ([] if stream.stopped else tokenizer.encode("\n\n"))
        assert said == text
        assert_close(states(chat.state()), states(read_text(talker, torch.tensor([ids]))))
    # What is kept of the conversation does not grow with it.
    assert all(layer.recurrent_states[0].shape == (1, *talker.config.state_shape) for layer in chat.cache.layers)


@pytest.mark.parametrize("format", ["world", "g1"])
def test_a_turn_reads_its_own_tokens_only(talker, tokenizer, format, monkeypatch):
    """Of a G1 turn that ran into the next one, those of the turn before as well."""
    script(monkeypatch, tokenizer, *[" yes, the\n\nUser: x"] * 5)
    chat, counts = Chat(talker, tokenizer, format=format), []
    hook = talker.get_input_embeddings().register_forward_hook(lambda _, ids, __: counts.append(ids[0].numel()))
    try:
        for _ in range(5):
            counts.append(0)
            assert say(chat, "hello", 50) == " yes, the"
    finally:
        hook.remove()
    turns = [0]
    for count in counts:
        turns.append(0) if count == 0 else None
        turns[-1] += count
    assert turns[2] == turns[3] == turns[4] == turns[5] < 100


def test_reset_retry_and_states_go_back_exactly(talker, tokenizer, tmp_path):
    chat = Chat(talker, tokenizer, **GREEDY)
    with pytest.raises(ValueError, match="no answer to give again"):
        chat.retry(print)
    assert chat.state() is None
    first = say(chat, "hello")
    after_first = states(chat.state())
    save_state(chat.state(), tmp_path / "s", talker)
    second, after_second = say(chat, "something else"), states(chat.state())
    pieces = []
    chat.retry(pieces.append, 6)
    assert "".join(pieces) == second
    assert_close(states(chat.state()), after_second)
    third, after_third = say(chat, "more"), states(chat.state())
    assert not torch.allclose(after_first[2], after_second[2], atol=0.1)
    assert not torch.allclose(after_second[2], after_third[2], atol=0.1)
    chat.resume(load_state(tmp_path / "s", talker))
    with pytest.raises(ValueError, match="no answer to give again"):
        chat.retry(print)
    assert [say(chat, "something else"), say(chat, "more")] == [second, third]
    assert_close(states(chat.state()), after_third)
    chat.reset()
    assert say(chat, "hello") == first
    assert_close(states(chat.state()), after_first)


def test_an_interrupted_answer_was_never_begun(talker, tokenizer):
    chat, calm = Chat(talker, tokenizer, **GREEDY), Chat(talker, tokenizer, **GREEDY)

    def interrupt(text):
        raise KeyboardInterrupt

    assert say(chat, "one") == say(calm, "one")
    for speak in (lambda: chat.reply("two", interrupt, 6), lambda: chat.retry(interrupt, 6)):
        with pytest.raises(KeyboardInterrupt):
            speak()
    assert say(chat, "three") == say(calm, "three")


def test_a_state_to_begin_with_is_only_borrowed(talker, tokenizer):
    start = read_text(talker, torch.tensor([tokenizer.encode("User: hi\n\nAssistant: Hi.\n\n")]))
    before = [tensor.clone() for tensor in states(start)]
    chats = [Chat(talker, tokenizer, start=start, **GREEDY) for _ in range(2)]
    first = say(chats[0], "hello")
    chats[0].reset()
    assert say(chats[0], "hello") == say(chats[1], "hello") == first != say(Chat(talker, tokenizer, **GREEDY), "hello")
    assert all(map(torch.equal, states(start), before))


@pytest.mark.parametrize(
    "answer, told, kept",
    [
        (">\nhm\n\nwell</think>\nYes.\n\nAnd no.\n\nUser: x", ">\nhm\n\nwell</think>\nYes.\n\nAnd no.", "\n\n"),
        (">a</think>\nUsers.\n\nUsers<end>", ">a</think>\nUsers.\n\nUsers", "\n\n"),
    ],
    ids=["next turn", "end of text"],
)
def test_g1_answers_hold_blank_lines(talker, tokenizer, answer, told, kept, monkeypatch):
    """What the model read of a next turn, or id 0, is not in the state behind the answer."""
    script(monkeypatch, tokenizer, answer, " ok\n\nUser:")
    chat = Chat(talker, tokenizer, format="g1", thinking=True)
    assert chat.opening == "Assistant: <think"
    assert say(chat, "why", 100) == told
    text = f"User: why\n\nAssistant: <think{told}{kept}"
    assert_close(states(chat.state()), states(read_text(talker, torch.tensor([tokenizer.encode(text)]))))
    assert say(chat, "and", 100) == " ok"


def test_thinking_is_for_g1(talker, tokenizer):
    assert Chat(talker, tokenizer, format="g1", thinking=False).opening == "Assistant: <think>\n</think"
    assert Chat(talker, tokenizer, format="g1").opening == Chat(talker, tokenizer).opening == "Assistant:"
    with pytest.raises(ValueError, match="world has no thinking"):
        Chat(talker, tokenizer, thinking=True)
    with pytest.raises(ValueError, match="'x': one of world, g1, raven"):
        Chat(talker, tokenizer, format="x")
    with pytest.raises(ValueError, match="'x': one of text, chat, "):
        Chat(talker, tokenizer, preset="x")


def test_formats_and_settings_follow_the_tokenizer(talker, tokenizer, pile, monkeypatch):
    assert format_of(tokenizer) == "world" and format_of(pile) == "raven"
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATES["g1"])
    assert format_of(tokenizer) == "g1"
    monkeypatch.setattr(tokenizer, "chat_template", "other")
    monkeypatch.setattr(pile, "chat_template", None)
    assert format_of(tokenizer) == "world" and format_of(pile) == "raven"
    assert format_of(build_tokenizer(pieces=[b"User"])) == "world"
    settings = Chat(talker, pile, top_p=0.1).settings
    assert (settings.temperature, settings.top_p, settings.presence, settings.forbids_end) == (1.2, 0.1, 0.4, True)
    assert Chat(talker, tokenizer, preset="tuned").settings[:4] == (1.0, 0.2, 0.3, 0.3)
    assert Chat(talker, tokenizer).settings[:6] == (1.0, 0.3, 0.5, 0.5, 0.996, False)
    assert not Chat(talker, tokenizer, format="g1").settings.forbids_end


def test_raven_reads_what_the_official_program_reads(pile, monkeypatch):
    """Its own order: the preamble first, whose blank line at the end is split, then turn by turn."""
    bird, read = busy_model("rwkv", vocab_size=50277, num_hidden_layers=1), []
    chat = Chat(bird, pile)
    script(monkeypatch, pile, " Hi!\n\n", " Bye.\n\n")
    bird.get_input_embeddings().register_forward_hook(lambda _, ids, __: read.extend(ids[0].flatten().tolist()))
    assert say(chat, "Hello\n\nyou", 20) == " Hi!" and say(chat, "Bye", 20) == " Bye."
    preamble = pile.encode("\n" + chat.system + "\n\n")
    assert preamble[-1] == 535
    turns = pile.encode("Bob: Hello\nyou\n\nAlice:"), pile.encode(" Hi!"), pile.encode("Bob: Bye\n\nAlice:")
    # The script's blank lines are single tokens; the last one is not read any more.
    assert read == [*preamble[:-1], 187, 187, *turns[0], *turns[1], 535, *turns[2], *pile.encode(" Bye.")]


def test_prompts_that_end_in_a_blank_line(pile, tokenizer):
    assert pile.encode("a\n\n") == [66, 535] and pile.encode("a\n\nb") == [66, 187, 187, 67]
    assert encode_prompt(pile, "a\n\n") == [66, 187, 187] and encode_prompt(pile, "a\n\nb") == [66, 187, 187, 67]
    assert encode_prompt(pile, "") == [] and encode_prompt(tokenizer, "a\n\n") == tokenizer.encode("a\n\n")
