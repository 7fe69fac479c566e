"""`push_to_hub` of models and tokenizers, and of the Trainer: with the code, which what is saved does not have."""

import json
import re
import threading
from contextlib import suppress
from pathlib import Path

import peft
import pytest
import torch
from conftest import assert_close, busy_model
from hub_cases import WITHOUT, byte_tokenizer, download, hub_of_this_process
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import wkv.models
from wkv.hub_trainer import PushWithCode

MODELS = Path(wkv.models.__file__).parent
# Push again what was loaded from the Hub, to another repository.
PUSH_AGAIN = """
model.push_to_hub("somebody/again")
tokenizer.push_to_hub("somebody/again")
"""
AUTO_MAP = {
    "AutoConfig": "configuration_rwkv7.Rwkv7Config",
    "AutoModel": "modeling_rwkv7.Rwkv7Model",
    "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_rwkv7.RWKV7ForSequenceClassification",
}


@pytest.fixture
def hub(tmp_path):
    with hub_of_this_process(tmp_path / "home") as hub:
        yield hub


def assert_complete(repo, auto_map=AUTO_MAP):
    files = repo.files()
    assert json.loads(files["config.json"].data)["auto_map"] == auto_map
    for name, file in files.items():
        if name.endswith(".py"):
            assert file.data == (MODELS / name).read_bytes(), name
    for name in set(auto_map.values()):
        assert name.partition(".")[0] + ".py" in files


def code_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.py"))


def test_models_and_tokenizers(hub, tmp_path):
    model, tokenizer = busy_model("rwkv7", vocab_size=257), byte_tokenizer()
    model.push_to_hub("somebody/tiny", private=True)
    tokenizer.push_to_hub("somebody/tiny")
    assert_complete(hub.repos["somebody/tiny"])
    # Nothing of it stays: what is saved here afterwards has no code.
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert code_in(tmp_path / "saved") == []
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == {}
    assert "auto_map" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


@pytest.mark.slow
def test_pushed_once_more_without_this_package(hub, tmp_path):
    """By a process that knows them from the Hub alone."""
    model = busy_model("rwkv7", vocab_size=257)
    model.push_to_hub("somebody/tiny")
    byte_tokenizer().push_to_hub("somebody/tiny")
    found = download(WITHOUT, tmp_path / "out.pt", "somebody/tiny", home=tmp_path / "home-1", then=PUSH_AGAIN)
    with torch.no_grad():
        assert_close(found["somebody/tiny"]["logits"], model(found["ids"]).logits)
    assert_complete(hub.repos["somebody/again"])
    first, again = (hub.repos[name].files() for name in ("somebody/tiny", "somebody/again"))
    assert first.keys() == again.keys()
    written, expected = (json.loads(files["tokenizer_config.json"].data)["auto_map"] for files in (again, first))
    assert written == expected


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(hub, auto_class):
    model = busy_model("rwkv6", auto_class)
    model.push_to_hub("somebody/other")
    auto_map = {name: re.sub("RWKV7|Rwkv7", "Rwkv6", text.replace("rwkv7", "rwkv6")) for name, text in AUTO_MAP.items()}
    assert_complete(hub.repos["somebody/other"], auto_map)
    loaded = auto_class.from_pretrained("somebody/other")
    assert type(loaded) is type(model)


def test_saving_with_push(hub, tmp_path):
    model, tokenizer = busy_model("rwkv7", vocab_size=257), byte_tokenizer()
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="somebody/tiny")
    tokenizer.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="somebody/tiny")
    assert_complete(hub.repos["somebody/tiny"])
    assert "tokenization_rwkv.py" in hub.repos["somebody/tiny"].files()


@pytest.mark.parametrize("while_training", [True, False])
def test_trainer(hub, tmp_path, while_training):
    model, tokenizer = busy_model("rwkv7", vocab_size=257), byte_tokenizer()
    arguments = TrainingArguments(
        tmp_path / "run",
        push_to_hub=while_training,
        hub_model_id="somebody/trained",
        max_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
    )
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert bool(code_in(tmp_path / "run" / "checkpoint-1")) == while_training
    if while_training:
        assert_complete(hub.repos["somebody/trained"])
    trainer.push_to_hub()
    assert_complete(hub.repos["somebody/trained"])
    assert "tokenization_rwkv.py" in hub.repos["somebody/trained"].files()
    # Others of these classes are saved as before.
    busy_model("rwkv7", vocab_size=257).save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    assert code_in(tmp_path / "saved") == []


def test_the_trainer_sends_no_code_with_adapters(tmp_path):
    model = busy_model("rwkv7", vocab_size=257)
    model.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM"))
    trainer = Trainer(model, TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True))
    PushWithCode().on_push_begin(trainer.args, trainer.state, trainer.control, model=model)
    model.save_pretrained(tmp_path / "saved")
    assert code_in(tmp_path / "run") == code_in(tmp_path / "saved") == []


def test_pushes_of_one_model_at_the_same_time(tmp_path):
    """Each has the code, and afterwards nothing stays registered."""
    model, both, errors = busy_model("rwkv7", vocab_size=257), threading.Barrier(2, timeout=0.3), []

    def push(name):
        with model._code_goes_along():
            with suppress(threading.BrokenBarrierError):
                both.wait()
            model.save_pretrained(tmp_path / name)
        if not code_in(tmp_path / name):
            errors.append(name)

    threads = [threading.Thread(target=push, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and type(model)._auto_class is None and not model.config.auto_map
