"""The vocabulary in GGUF files: the same tokenizer comes back, also from llama.cpp's own files."""

import pytest
from gguf_cases import VERSIONS, lazy, written
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from wkv import gguf_format
from wkv.gguf_files import read_gguf_tokenizer, write_gguf
from wkv.tensor_files import CheckpointError
from wkv.vocabulary import build_tokenizer

# Ends of turns, quotes and backslashes, and bytes that are no text.
PIECES = [b"\n\n", b" hello", b"'\"\\x4", "é".encode(), b"\xff\x00\t", b"<s>"]
TEXTS = ["User: hello\n\nAssistant: <s> 'é' \"'\"\\x4\t", "日本"]


@pytest.mark.parametrize("version", VERSIONS)
def test_tokenizer_in_the_file(version, tmp_path):
    tokenizer = build_tokenizer(pieces=PIECES)
    tokenizer.add_tokens(["<think>\t"])
    _, path = written(version, tmp_path, tokenizer, V=300)
    assert AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").vocab_size == 300
    for found in (AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"), read_gguf_tokenizer(path)):
        assert type(found) is type(tokenizer) and found.get_vocab() == tokenizer.get_vocab()
        assert found.special_tokens_map == tokenizer.special_tokens_map
        assert (found.padding_side, found.chat_template) == (tokenizer.padding_side, tokenizer.chat_template)
        for text in (*TEXTS, "a<think>\tb"):
            assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert found.decode(found(text)["input_ids"]) == text
    metadata = gguf_format.read(path).metadata
    roles = ("bos", "eos", "unknown", "padding", "eot")
    assert [metadata[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [0, 0, 0, 0, 257]
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD299]"
    types = metadata["tokenizer.ggml.token_type"]
    assert types == [3] + [1] * 262 + [4] + [5] * 36


def test_tokenizer_as_llama_cpp_writes_it(tmp_path):
    """There end-of-text is `<s>` and has two of its four roles, and old files only name the chat template."""
    _, path = written("7", tmp_path, build_tokenizer(pieces=PIECES[:5]), V=300)
    metadata, tensors = gguf_format.read(path)
    metadata["tokenizer.ggml.tokens"][0] = "<s>"
    del metadata["tokenizer.ggml.unknown_token_id"], metadata["tokenizer.ggml.padding_token_id"]
    metadata["tokenizer.chat_template"] = "rwkv-world"
    gguf_format.write(tmp_path / "theirs.gguf", metadata, tensors)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="theirs.gguf")
    assert set(tokenizer.special_tokens_map.values()) == {"<s>"} and len(tokenizer.special_tokens_map) == 4
    assert tokenizer("<s>\n\n")["input_ids"] == [0, 257] and len(tokenizer) == 262
    messages = [{"role": "user", "content": "hello"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "User: hello\n\nAssistant:"
    padded = tokenizer(["ab", "a"], padding=True)
    assert padded["input_ids"] == [[98, 99], [0, 98]] and padded["attention_mask"][1] == [0, 1]


def test_tokenizers_that_do_not_fit(tmp_path):
    weights, path = written("7", tmp_path, V=300)
    assert read_gguf_tokenizer(path) is None
    with pytest.raises(CheckpointError, match="300 embedding rows"):
        write_gguf(path, "7", lazy(weights), build_tokenizer(pieces=[str(n).encode() for n in range(300)]))
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(CheckpointError, match="World vocabularies"):
        write_gguf(path, "7", lazy(weights), other)
    metadata, tensors = gguf_format.read(path)
    numbers = [str(n) for n in range(300)]
    metadata |= {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": numbers}
    gguf_format.write(tmp_path / "numbers.gguf", metadata | {"tokenizer.ggml.token_type": [3] + [1] * 299}, tensors)
    with pytest.raises(CheckpointError, match=r"numbers\.gguf: .*no World vocabulary"):
        read_gguf_tokenizer(tmp_path / "numbers.gguf")
