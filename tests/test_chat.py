"""Sampling as the `rwkv` package does it, text that arrives whole, and conversations that live in the state alone."""

import numpy as np
import pytest
import torch
from conftest import busy_model
from transformers import LogitsProcessorList

from wkv.chat import Chat, TextStream, one_paragraph
from wkv.sampling import RwkvSampling, generate_arguments
from wkv.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(pieces=[b"\n\n", "é".encode(), b"12", b" the", b"User"])


@pytest.fixture(scope="module")
def talker():
    return busy_model("rwkv7", vocab_size=262)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.85), (0.3, 0.3), (2.0, 0.99), (1.5, 0.0)])
def test_sampler_has_the_distribution_of_the_official_pipeline(temperature, top_p, tokenizer, monkeypatch):
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    vocabulary, steps = 262, 60
    logits = 3 * torch.randn(steps, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, [33, 49, 259]] += 6  # " ", "0", "12": their repetitions are not counted
    rng, expected, drawn = np.random.default_rng(0), [], []

    def choice(a, p):
        expected.append(torch.tensor(p).float())
        drawn.append(int(rng.choice(a, p=p / p.sum(dtype=np.float64))))
        return drawn[-1]

    class Model:
        def forward(self, tokens, state):
            return logits[len(drawn)].clone(), state

    class Pipeline(PIPELINE):
        def __init__(self):
            self.model, self.tokenizer = Model(), None

        def encode(self, text):
            return [1]

        def decode(self, ids):
            return tokenizer.decode(ids)

    monkeypatch.setattr(np.random, "choice", choice)
    settings = PIPELINE_ARGS(temperature=temperature, top_p=top_p, alpha_frequency=0.4, alpha_presence=0.3)
    Pipeline().generate("", token_count=steps, args=settings)
    # top_p 0 is greedy here, which `generate` does without a sampler.
    options = generate_arguments(tokenizer, 1, temperature, max(top_p, 1e-9), presence=0.3, frequency=0.4)
    processors: LogitsProcessorList = options["logits_processor"]
    for step in range(steps):
        ids = torch.tensor([[1, *drawn[:step]]])
        actual = processors(ids, logits[step : step + 1]).softmax(-1)[0]
        torch.testing.assert_close(actual, expected[step], atol=1e-6, rtol=1e-3)
    assert len(set(drawn)) < steps, "nothing was drawn twice: the penalties were not at work"


@pytest.mark.parametrize(
    "temperature, top_p, culprit", [(0.0, 0.5, "temperature"), (-1.0, 0.5, "temperature"), (1.0, 1.5, "top_p")]
)
def test_sampler_refuses_settings_that_mean_nothing(temperature, top_p, culprit):
    with pytest.raises(ValueError, match=culprit):
        RwkvSampling(0, temperature, top_p)


def streamed(tokenizer, ids: list[int], stop=()) -> tuple[list[str], TextStream]:
    pieces = []
    stream = TextStream(tokenizer, pieces.append, stop)
    stream.put(torch.tensor([[5, 6]]))
    for index in ids:
        stream.put(torch.tensor([index]))
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
    assert "".join(pieces) == "one\nUse" and stream.stopped
    assert stream(torch.zeros(1, 3), None).tolist() == [True]
    pieces, stream = streamed(tokenizer, [byte + 1 for byte in b"one\nUse"], ["\nUser"])
    assert "".join(pieces) == "one\nUse" and not stream.stopped


@pytest.mark.parametrize("longest", [1, 12], ids=["cut-short", "longer"])
def test_a_conversation_equals_its_whole_text_read_again(talker, tokenizer, longest):
    greedy = {"temperature": 0, "presence": 0, "frequency": 0}
    chat, text, said = Chat(talker, tokenizer, system="Be  kind.", **greedy), [], []
    ids = tokenizer.encode("System: Be  kind.\n\n")
    for message in ("hello", "and again?\n\n\nyes", "third"):
        pieces = []
        stream = chat.reply(message, pieces.append, longest)
        said.append("".join(pieces))
        ids += tokenizer.encode(f"User: {one_paragraph(message)}\n\nAssistant:")
        sequence = torch.tensor([ids])
        whole = talker.generate(sequence, max_new_tokens=longest, do_sample=False, suppress_tokens=[0])[0, len(ids) :]
        end = next((n for n in range(longest) if "\n\n" in tokenizer.decode(whole[: n + 1])), longest - 1)
        answer = whole[: end + 1].tolist()
        assert stream.tokens == len(answer)
        text.append(tokenizer.decode(answer).split("\n\n")[0])
        ids += answer + ([] if stream.stopped else tokenizer.encode("\n\n"))
    assert said == text
    # What is kept of the conversation does not grow with it.
    assert all(layer.recurrent_states[0].shape == (1, 4, 16, 16) for layer in chat.cache.layers)


def test_reset_forgets(talker, tokenizer):
    chat, first, again = Chat(talker, tokenizer, temperature=0), [], []
    chat.reply("hello", first.append, 6)
    chat.reply("something else", lambda _: None, 6)
    chat.reset()
    chat.reply("hello", again.append, 6)
    assert first == again


def test_messages_lose_their_blank_lines():
    assert one_paragraph(" a\r\n\r\nb\n \n\nc\nd \n") == "a\nb\nc\nd"
