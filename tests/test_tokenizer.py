"""World tokenizer: ids against the `rwkv` package and `pyrwkv-tokenizer`, both engines, what transformers expects."""

import copy
import itertools
import json
import multiprocessing
import pickle
import random
import statistics
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from pyrwkv_tokenizer import RWKVTokenizer
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from transformers import AddedToken, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from wkv.models import tokenization_rwkv
from wkv.models.rwkv_vocabulary import encode_with_backend
from wkv.models.tokenization_rwkv import END_OF_TEXT, RwkvTokenizer
from wkv.vocabulary import save_tokenizer, world_vocabulary_file

GOLDEN = {
    "User: hi\n\nAssistant:": [24281, 59, 4571, 261, 5585, 41693, 59],
    "User: 你好！ 😀\n\nAssistant: <think>\n</think>": [
        *[24281, 59, 33, 10464, 11685, 19126, 33, 3319, 153, 129, 261],
        *[5585, 41693, 59, 295, 35762, 63, 11, 754, 35762, 63],
    ],
    "a\n\nb\n\n\nc": [98, 261, 99, 3328, 100],
    "Below is an instruction\r\n\r\n### Response:\n": [32937, 4600, 4419, 63654, 19244, 5201, 55292, 59, 11],
    "Assistant: <think": [5585, 41693, 59, 295, 35762],
    "abc.\n\n": [6891, 47, 261],
    "": [],
}
SMALL = [
    "",
    "a",
    " ",
    "\n\n\n",
    "naïve 😀👋🏽",
    "日本語 ｶﾅ",
    "a\x00b\x7f\u0085\u2028\ufeff",
    "e\u0301",
    "x" * 300,
    " " * 200,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "tokenizer"
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tok(folder) -> RwkvTokenizer:
    tokenizer = RwkvTokenizer.from_pretrained(folder)
    assert tokenization_rwkv.Trie is not None, "these tests are about the compiled trie as well"
    return tokenizer


@pytest.fixture(scope="module")
def plain(folder) -> PreTrainedTokenizerFast:
    """The same folder with nothing of ours: the `tokenizers` library alone."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(str(world_vocabulary_file()))


def mixed_texts(pieces: list[bytes], seed: int) -> list[str]:
    """Emoji, control characters, any code points, concatenated pieces, Chinese (a tenth each) and code, shuffled."""
    rng = random.Random(seed)
    readable = [piece.decode() for piece in pieces if piece and is_utf8(piece)]
    chinese = [piece for piece in readable if "\u4e00" <= piece[0] <= "\u9fff"]
    emoji = [chr(c) for c in (*range(0x1F300, 0x1F6FF), *range(0x1F900, 0x1FAFF))] + [
        "\u200d",
        "\ufe0f",
        "🏽",
        "🇩",
        "🇪",
    ]
    control = [chr(c) for c in (*range(32), *range(127, 160), 0xAD, 0x200B, 0x2028, 0x2029, 0xFEFF)] + [
        "\r\n",
        "  ",
        "x",
    ]
    anything = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    texts = [
        "".join(rng.choices(alphabet, k=count))
        for alphabet, count in [(emoji, 200), (control, 500), (anything, 300), (readable, 200), (chinese, 300)] * 800
    ]
    library = Path(json.__file__).parents[1]
    texts += [
        path.read_text(encoding="utf-8") for path in sorted([*library.glob("*.py"), *library.glob("[a-e]*/*.py")])
    ]
    rng.shuffle(texts)
    return texts


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("text", GOLDEN, ids=ascii)
def test_golden_ids(tok, plain, text):
    assert tok.encode(text) == plain.encode(text) == GOLDEN[text]
    assert tok.decode(GOLDEN[text]) == plain.decode(GOLDEN[text]) == text


def test_ids_equal_the_references_on_mixed_text(tok, plain, reference):
    texts = mixed_texts(list(reference.idx2token.values()), seed=7)
    assert sum(len(text.encode()) for text in texts) > 10_000_000
    rust = RWKVTokenizer()
    rows = tok(texts)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        assert row == rust.encode(text)
        assert row == reference.encode(text)
    assert plain(texts[::4])["input_ids"] == rows[::4]
    assert tok.batch_decode(rows) == texts
    assert plain.batch_decode(rows[::16]) == texts[::16]
    joined = "".join(texts)
    assert tok.encode(joined) == rust.encode(joined)


def test_every_id_and_any_bytes_round_trip(tok, plain, reference):
    pieces = reference.idx2token
    assert [tok.decode_bytes([index]) for index in pieces] == list(pieces.values())
    assert [tok.encode_bytes(piece) for piece in pieces.values()] == [[index] for index in pieces]
    assert tok.encode_bytes(bytes(range(256))) == reference.encodeBytes(bytes(range(256)))
    rng = random.Random(3)
    broken = [piece for piece in pieces.values() if not is_utf8(piece)]
    assert len(broken) == 486
    for population in (broken, list(pieces.values())):
        data = b"".join(rng.choices(population, k=20_000))
        ids = reference.encodeBytes(data)
        assert tok.encode_bytes(data) == encode_with_backend(plain.backend_tokenizer, data) == ids
        assert tok.decode_bytes(ids) == data
        # Invalid bytes become U+FFFD one by one, as Python decodes them, not the whole text.
        assert tok.decode(ids) == plain.decode(ids) == data.decode("utf-8", errors="replace")


def test_sizes_special_tokens_and_ids_without_bytes(tok):
    assert len(tok) == tok.vocab_size == 65530
    assert {tok.pad_token_id, tok.bos_token_id, tok.eos_token_id, tok.unk_token_id} == {0}
    assert tok.padding_side == "left" and tok.model_input_names == ["input_ids", "attention_mask"]
    ids = [98, 0, 65530, 65535, 70000, 99]
    assert tok.decode(ids) == f"a{END_OF_TEXT}b"
    assert tok.decode(ids, skip_special_tokens=True) == "ab"
    assert tok.decode(torch.tensor(ids)) == tok.decode(ids) and tok.decode(98) == "a"
    with pytest.raises(ValueError, match="-100 is negative"):
        tok.decode([98, -100])
    with pytest.raises(UnicodeEncodeError):
        tok.encode("\ud800")


@pytest.mark.parametrize("padding", [False, True, "max_length"])
@pytest.mark.parametrize("truncation", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_engines_agree_on_every_option(tok, plain, padding, truncation, side, monkeypatch):
    for tokenizer in (tok, plain):
        monkeypatch.setattr(tokenizer, "truncation_side", side)
    with_special = f"a{END_OF_TEXT} b {END_OF_TEXT}{END_OF_TEXT}"
    options = {
        "padding": padding,
        "truncation": truncation,
        "max_length": 8 if truncation or padding == "max_length" else None,
        "padding_side": "left" if side == "right" else "right",
    }
    extras = ["return_offsets_mapping", "return_special_tokens_mask", "return_length", "split_special_tokens"]
    for multiple, extra in itertools.product([None, 4], [[], extras[:3], extras[3:]]):
        more = options | dict.fromkeys(extra, True) | {"pad_to_multiple_of": multiple}
        for text in [*SMALL, *GOLDEN, with_special, [*SMALL, with_special], ["only"], "Hi!\n\n\n好。\n"]:
            assert dict(tok(text, **more)) == dict(plain(text, **more)), (text, more)
    if padding is True or (padding and truncation):
        tensors = [tokenizer(SMALL, **options, return_tensors="pt") for tokenizer in (tok, plain)]
        for name, tensor in tensors[1].items():
            assert torch.equal(tensors[0][name], tensor) and tensors[0][name].dtype == tensor.dtype


def test_the_trie_leaves_to_the_library_what_it_cannot_do(tok, plain):
    texts, pairs = ["one two three four five", "six"], ["seven", "eight nine"]
    requests = [
        ((texts, pairs), {}),
        (([["one", "two"], ["three"]],), {"is_split_into_words": True}),
        ((texts,), {"truncation": True, "max_length": 3, "stride": 1, "return_overflowing_tokens": True}),
        ((texts,), {"return_token_type_ids": True}),
    ]
    for arguments, options in requests:
        assert dict(tok(*arguments, **options)) == dict(plain(*arguments, **options))
    lazy, eager = tok(texts), plain(texts)
    for one in (lazy, pickle.loads(pickle.dumps(lazy))):
        assert one.is_fast and [e.offsets for e in one.encodings] == [e.offsets for e in eager.encodings]
        assert one.tokens(0) == eager.tokens(0) and one.char_to_token(0, 5) == eager.char_to_token(0, 5)
        assert one.word_ids(1) == eager.word_ids(1)
    assert lazy.n_sequences == eager.n_sequences == 1
    assert tok.tokenize("two 你") == plain.tokenize("two 你")


def test_offsets_are_those_of_the_reference(tok, reference):
    text = "naïve 😀👋🏽 你好\r\n\x00 end"
    offsets, position = [], 0
    characters = [i for i, c in enumerate(text) for _ in c.encode()]
    for index in reference.encode(text):
        last = position + len(reference.idx2token[index]) - 1
        offsets.append((characters[position], characters[last] + 1))
        position = last + 1
    assert tok(text, return_offsets_mapping=True)["offset_mapping"] == offsets


def test_added_tokens(tok, plain, tmp_path):
    tok, plain = copy.deepcopy(tok), copy.deepcopy(plain)
    added = [
        "<tool>",
        "<tool>x",
        "你好",
        "É!",
        AddedToken("<lr>", lstrip=True, rstrip=True),
        AddedToken("word", single_word=True),
    ]
    for tokenizer in (tok, plain):
        assert tokenizer.add_tokens(added) == 6 and tokenizer.add_special_tokens({"sep_token": "<tool>xy"}) == 1
    assert len(tok) == 65536 and tok.convert_tokens_to_ids("<tool>") == 65530
    texts = ["<tool>xx", "a<tool>xyz你好!", "É!", "a <lr> b", "swordword word", f"{END_OF_TEXT}<tool>", "none"]
    spans = {"return_offsets_mapping": True}
    for text in [*texts, texts]:
        assert dict(tok(text, **spans)) == dict(plain(text, **spans))
        assert tok(text, split_special_tokens=True)["input_ids"] == plain(text, split_special_tokens=True)["input_ids"]
    assert tok.decode(tok.encode(texts[0] + texts[2])) == texts[0] + texts[2]
    tok.save_pretrained(tmp_path)
    again = RwkvTokenizer.from_pretrained(tmp_path)
    assert again(texts)["input_ids"] == tok(texts)["input_ids"] and len(again) == 65536


def test_bos_is_added_only_when_asked_for(tok):
    tok = copy.deepcopy(tok)
    tok.add_bos_token = True
    assert tok.encode("a") == [0, 98] and tok.encode("a", add_special_tokens=False) == [98]
    assert tok(["a", "b"])["input_ids"] == [[0, 98], [0, 99]]


def test_streaming_never_shows_half_a_character(tok):
    text = "Hi 👋🏽 你好，世界！ naïve\n日本語 👨‍👩‍👧 the end 😀"
    ids = tok.encode(text)
    assert any("\ufffd" in tok.decode(ids[:n]) for n in range(len(ids)))
    for streamer in (TextStreamer(tok), TextIteratorStreamer(tok)):
        chunks = []
        streamer.on_finalized_text = lambda chunk, stream_end=False, keep=chunks: keep.append(chunk)
        for index in ids:
            streamer.put(torch.tensor([index]))
        assert len(chunks) > 5
        streamer.end()
        assert "".join(chunks) == text and not any("\ufffd" in chunk for chunk in chunks)


def test_copies_pickles_and_forked_workers(tok):
    ids = tok.encode("Hello 你好")
    for clone in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert clone.encode("Hello 你好") == ids and clone.chat_template == tok.chat_template
    assert tok(["Hello 你好"] * 2000)["input_ids"] == [ids] * 2000
    context = multiprocessing.get_context("fork")
    for batch in (["Hello 你好"], ["Hello 你好"] * 2000):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=lambda batch=batch, sender=sender: sender.send(tok(batch)["input_ids"]))
        worker.start()
        assert receiver.poll(30) and receiver.recv() == [ids] * len(batch)
        worker.join()


def test_threads_change_nothing(tok):
    texts = [text * n for n in (1, 50, 3000) for text in [*SMALL, *GOLDEN]]
    before = torch.get_num_threads()
    try:
        rows = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            rows.append(tok(texts)["input_ids"])
    finally:
        torch.set_num_threads(before)
    assert rows[0] == rows[1] == [tok.encode(text) for text in texts]


def test_at_least_as_fast_as_the_rust_tokenizer(tok, reference, record_property):
    # The best of many runs of a millisecond or two, taken in turns, so that other programs interrupted neither best.
    mixed = "".join(mixed_texts(list(reference.idx2token.values()), seed=1))
    texts = {
        "mixed": mixed[:60_000],
        "prose": json.__doc__ * 20,
        "code": Path(statistics.__file__).read_text(encoding="utf-8"),
    }
    rust = RWKVTokenizer()
    for name, text in texts.items():
        seconds = {"trie": [], "rust": []}
        for _ in range(101):
            for engine, encode in (("trie", tok.encode), ("rust", rust.encode)):
                start = time.perf_counter()
                encode(text)
                seconds[engine].append(time.perf_counter() - start)
        speed = {engine: len(text.encode()) / 1e6 / min(times) for engine, times in seconds.items()}
        ratio = speed["trie"] / speed["rust"]
        record_property(name, ratio)
        print(f"{name}: {speed['trie']:.0f} MB/s, pyrwkv-tokenizer {speed['rust']:.0f} MB/s, ratio {ratio:.2f}")
        assert ratio >= 1.0
