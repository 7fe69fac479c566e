"""Vocabularies and folders: reading, building, choosing pieces, saving, and loading what others have written."""

import json
import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wkv import vocabulary
from wkv.models import tokenization_rwkv
from wkv.models.rwkv_vocabulary import read_world_vocabulary
from wkv.models.tokenization_rwkv import END_OF_TEXT, Rwkv6Tokenizer, RWKV7Tokenizer, RwkvTokenizer
from wkv.vocabulary import WORLD_FILE, build_tokenizer, save_tokenizer, select_pieces, world_vocabulary_file

BYTES = [bytes([byte]) for byte in range(256)]
TEXT = "User: hi\n\nAssistant: 你好 😀\r\n"


@pytest.fixture(scope="module")
def world() -> dict[int, bytes]:
    return read_world_vocabulary(world_vocabulary_file())


def longest_match(data: bytes, pieces: set[bytes]) -> list[bytes]:
    """Brute force: the definition of the tokenizer."""
    parts, longest = [], max(map(len, pieces))
    while data:
        size = next(n for n in range(longest, 0, -1) if data[:n] in pieces)
        parts.append(data[:size])
        data = data[size:]
    return parts


def test_world_vocabulary(world):
    assert list(world) == list(range(1, 65530)) and max(map(len, world.values())) == 128
    assert world[11] == b"\n" and world[261] == b"\n\n" and world[58683] == b" Assistant"


def test_line_ends_do_not_matter(tmp_path):
    lines = world_vocabulary_file().read_bytes().replace(b"\r\n", b"\n").splitlines()[:300]
    for name, end in (("lf", b"\n"), ("crlf", b"\r\n")):
        (tmp_path / name).write_bytes(end.join(lines) + end)
    assert read_world_vocabulary(tmp_path / "lf") == read_world_vocabulary(tmp_path / "crlf")


@pytest.mark.parametrize(
    ("line", "replacement", "complaint"),
    [
        (300, "300 __import__('os').getpid() 3", "line 300: expected"),
        (300, "300 'abc' 4", "'abc' does not have the stated 4 bytes"),
        (300, "300 12 2", "12 does not have the stated 2 bytes"),
        (300, "301 'abc' 3", "id 301 where 300 was due"),
        (300, "300 'ab 2", "line 300: expected"),
        (300, "", "line 300: expected"),
        (300, "300 '' 0", "empty or came before"),
        (300, "300 'a' 1", "empty or came before"),
        (7, "7 'x' 1", "id 7 must be the byte 0x06"),
        (200, None, "199 pieces, but the single bytes alone need 256"),
        (9, "\ufffdbinary", "line 9: expected"),
    ],
)
def test_a_wrong_vocabulary_file_gives_one_clear_error(tmp_path, line, replacement, complaint):
    lines = world_vocabulary_file().read_text(encoding="utf-8").splitlines()[:400]
    lines[line - 1 :] = [] if replacement is None else [replacement, *lines[line:]]
    path = tmp_path / "vocabulary.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        build_tokenizer(path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_and_a_changed_package_are_refused(tmp_path, monkeypatch):
    path = tmp_path / WORLD_FILE
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a World vocabulary"):
        read_world_vocabulary(path)
    monkeypatch.setattr(vocabulary, "WORLD_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        build_tokenizer()
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install rwkv"):
        build_tokenizer()


@pytest.mark.parametrize("seed", range(6))
def test_any_vocabulary_equals_brute_force_in_both_engines(seed, monkeypatch):
    rng = random.Random(seed)
    alphabet = [*rng.sample(range(256), rng.choice([2, 5, 256])), 0, 255]
    longer = {
        bytes(rng.choices(alphabet, k=rng.randint(2, rng.choice([3, 12])))) for _ in range(rng.choice([0, 30, 2000]))
    }
    tokenizer = build_tokenizer(pieces=sorted(longer))
    data = b"".join(rng.choices([*sorted(longer), *(bytes([byte]) for byte in alphabet)], k=800))
    expected = longest_match(data[:6000], longer | set(BYTES))
    ids = tokenizer.encode_bytes(data[:6000])
    assert [tokenizer.decode_bytes([index]) for index in ids] == expected
    monkeypatch.setattr(tokenizer, "_world", (tokenizer._world_pieces(), None))
    assert tokenizer.encode_bytes(data[:6000]) == ids


def test_reduced_vocabulary_is_self_contained(world, tmp_path):
    pieces = [*BYTES, b"\n\n", b"User", b"Assistant", b" hi", "你".encode(), b"\xf0\x9f"]
    tokenizer = build_tokenizer(pieces=pieces)
    assert len(tokenizer) == tokenizer.vocab_size == len(pieces) + 1
    assert tokenizer.encode("User: hi\n\n") == [258, 59, 260, 257]
    tokenizer.save_pretrained(tmp_path)
    for loaded in (RwkvTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT) and loaded.decode(loaded.encode(TEXT)) == TEXT
    for wrong in ([b"ab", b"ab"], [b""]):
        with pytest.raises(ValueError, match="distinct and not empty"):
            build_tokenizer(pieces=wrong)
    with pytest.raises(ValueError, match="not both"):
        build_tokenizer(world_vocabulary_file(), pieces)


def test_selected_pieces_shorten_the_corpus_more_than_the_most_frequent(world):
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parents[1].glob("[ab]*.py"))]
    pieces = select_pieces(texts, world, 600)
    assert pieces[:256] == BYTES and len(set(pieces)) == 599 and set(pieces) <= set(world.values())
    full = build_tokenizer()
    counts = Counter(index for row in full(texts)["input_ids"] for index in row if index > 256)
    frequent = [world[index] for index, _ in counts.most_common(343)]
    lengths = [sum(map(len, build_tokenizer(pieces=some)(texts)["input_ids"])) for some in (pieces, frequent)]
    assert lengths[0] < 0.95 * lengths[1]
    assert select_pieces(texts, world, 600) == pieces
    with pytest.raises(ValueError, match="at least 257"):
        select_pieces(texts, world, 256)


def test_save_tokenizer_writes_all_or_nothing(tmp_path):
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("1 'a' 1\n")
    with pytest.raises(ValueError, match="line 1"):
        save_tokenizer(tmp_path / "new", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.txt"]
    save_tokenizer(tmp_path / "deep" / "new")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["new"]
    names = {path.name for path in (tmp_path / "deep" / "new").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for occupied in (tmp_path / "deep" / "new", wrong):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            save_tokenizer(occupied)


def test_auto_tokenizer_loads_the_folder_with_and_without_wkv(tmp_path):
    save_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": "rwkv7"}))
    script = f"""
import sys
from transformers import AutoTokenizer, PreTrainedTokenizerFast
messages = [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content": "yo"}}]
def facts(tokenizer):
    chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = tokenizer({TEXT!r})["input_ids"]
    return ids, dict(chat), tokenizer.padding_side, tokenizer.all_special_ids, len(tokenizer)
plain = AutoTokenizer.from_pretrained({str(tmp_path / "t")!r})
assert "wkv" not in sys.modules and "wkv_kernels" not in sys.modules
import wkv
ours = AutoTokenizer.from_pretrained({str(tmp_path / "t")!r})
assert type(plain) is PreTrainedTokenizerFast and type(ours).__name__ == "RwkvTokenizer"
assert facts(plain) == facts(ours), (facts(plain), facts(ours))
print(facts(ours)[0])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == RwkvTokenizer.from_pretrained(tmp_path / "t").encode(TEXT)


FOREIGN = {
    "official": (RwkvTokenizer, {}, END_OF_TEXT),
    "fla": (
        RwkvTokenizer,
        {role: END_OF_TEXT for role in ("bos_token", "pad_token", "unk_token")} | {"eos_token": "\n\n"},
        END_OF_TEXT,
    ),
    "rwkv6": (Rwkv6Tokenizer, {role: "<s>" for role in ("bos_token", "eos_token", "unk_token", "pad_token")}, "<s>"),
    "rwkv7-hf": (RWKV7Tokenizer, {"pad_token": "<|padding|>", "eos_token": "<|endoftext|>"}, "<|endoftext|>"),
}


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_folder_with_only_the_official_file_loads(origin, world, tmp_path, caplog):
    cls, config, end_of_text = FOREIGN[origin]
    lines = world_vocabulary_file().read_bytes().splitlines(keepends=True)[:400]
    (tmp_path / WORLD_FILE).write_bytes(b"".join(lines))
    if config:
        decoder = {"0": {"content": end_of_text, "special": True}, "261": {"content": "\n\n", "special": True}}
        config = config | {"tokenizer_class": cls.__name__, "added_tokens_decoder": decoder}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        tokenizer = cls.from_pretrained(tmp_path)
    assert type(tokenizer) is cls and len(tokenizer) == 401
    assert tokenizer.eos_token == end_of_text and set(tokenizer.all_special_ids) == {0} == {tokenizer.eos_token_id}
    assert [world[index] for index in tokenizer.encode("a\n\nb <s")] == [b"a", b"\n\n", b"b", b" <", b"s"]
    assert tokenizer.encode(f"a{end_of_text}") == [98, 0]
    assert tokenizer.decode([98, 261, 99, 0], skip_special_tokens=True) == "a\n\nb"
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(TEXT) == tokenizer.encode(TEXT)


def test_a_tokenizer_json_of_another_kind_works_as_ever(tmp_path):
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = RwkvTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("aab") == [0, 2] and tokenizer.decode([0, 2]) == "a ab"
    with pytest.raises(ValueError, match="does not hold a World vocabulary"):
        tokenizer.encode_bytes(b"a")


def test_without_the_compiled_trie_everything_still_works(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenization_rwkv, "Trie", None)
    tokenizer = build_tokenizer(pieces=[b"\n\n", b"User", "你".encode()])
    assert tokenizer.encode("User: 你\n\n") == [258, 59, 33, 259, 257]
    assert tokenizer.encode_bytes(b"User\xff") == [258, 256] and tokenizer.decode([256]) == "\ufffd"
