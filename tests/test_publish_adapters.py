"""Publishing adapters and tuned states, which name their base model and load with PEFT from the Hub."""

import json

import peft
import pytest
import torch
from command_line import assert_refused, wkv
from conftest import assert_close, busy_model, random_ids
from hub_cases import byte_tokenizer, hub_of_this_process, save_model
from peft_cases import adapted
from transformers import AutoModelForCausalLM

from wkv import StateTuningConfig, export_time_state
from wkv.states import load_state

BASE, REPO = "somebody/base", "somebody/adapter"
PUSH = ("--licence", "apache-2.0", "--push")
IDS = random_ids(2, 9)


@pytest.fixture
def hub(tmp_path):
    with hub_of_this_process(tmp_path / "home") as hub:
        yield hub


def publish(folder, *arguments, repo=REPO):
    result = wkv("publish", folder, repo, *PUSH, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def tuned(model_type="rwkv7"):
    """A model with states that are not zero as its adapter, in eval mode."""
    model = peft.get_peft_model(busy_model(model_type, vocab_size=257), StateTuningConfig()).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rwkv_state_S" in name:
                parameter.normal_(generator=generator)
    return model


def assert_loads(model, repo=REPO):
    """The adapter from the Hub, on the base model from the Hub, does what it did."""
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo).eval()
    assert loaded.active_peft_config.base_model_name_or_path == BASE
    with torch.no_grad():
        assert_close(loaded(IDS).logits, model(IDS).logits)
        with loaded.disable_adapter():
            assert (loaded(IDS).logits - model(IDS).logits).abs().max() > 0.1


def test_lora(hub, tmp_path):
    save_model(tmp_path / "base", "rwkv7")
    publish(tmp_path / "base", repo=BASE)
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "lora")
    assert_refused(
        wkv("publish", tmp_path / "lora", REPO, *PUSH), "adapter_config.json", str(tmp_path / "base"), "--base-model"
    )
    publish(tmp_path / "lora", "--base-model", BASE)
    files = hub.repos[REPO].files()
    assert files.keys() == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.verdicts[-1] == ([], []) and f"base_model: {BASE}" in files["README.md"].data.decode()
    assert_loads(model)


def test_an_adapter_and_a_model_take_turns(hub, tmp_path):
    """Each removes what would make the repository look like the other."""
    save_model(tmp_path / "base", "rwkv7")
    publish(tmp_path / "base", repo=BASE)
    adapted(AutoModelForCausalLM.from_pretrained(BASE)).save_pretrained(tmp_path / "lora")
    for folder, kind, other in (("base", "", "adapter_"), ("lora", "adapter_", ""), ("base", "", "adapter_")):
        publish(tmp_path / folder)
        files = hub.repos[REPO].files().keys()
        assert {f"{kind}config.json", f"{kind}model.safetensors"} < files
        assert not {f"{other}config.json", f"{other}model.safetensors"} & files
    for name in ("adapter_model*", "adapter_config*"):
        result = wkv("publish", tmp_path / "lora", REPO, *PUSH, "--exclude", name)
        assert_refused(result, name[:-1], "excluded")


def test_tuned_state(hub, tmp_path):
    """From the adapter's folder, and from the official file alone; both hold the official file and the adapter."""
    save_model(tmp_path / "base", "rwkv7")
    publish(tmp_path / "base", repo=BASE)
    model = tuned()
    model.save_pretrained(tmp_path / "state")
    publish(tmp_path / "state", "--base-model", BASE)
    assert_loads(model)
    export_time_state(model, tmp_path / "official.pth")
    publish(tmp_path / "official.pth", "--base-model", BASE, repo="somebody/file")
    assert_loads(model, "somebody/file")
    expected = load_state(tmp_path / "official.pth", model.get_base_model())
    for repo in (REPO, "somebody/file"):
        (tmp_path / "found.pth").write_bytes(hub.repos[repo].files()["time_state.pth"].data)
        found = load_state(tmp_path / "found.pth", model.get_base_model())
        for ours, theirs in zip(expected.layers, found.layers, strict=True):
            assert torch.equal(ours.recurrent_states[0], theirs.recurrent_states[0])
    assert_refused(wkv("publish", tmp_path / "official.pth", REPO, *PUSH), "official.pth", "--base-model")


def test_states_of_rwkv4_have_no_official_file(tmp_path):
    tuned("rwkv").save_pretrained(tmp_path / "state")
    result = wkv("publish", tmp_path / "state", REPO, "--licence", "mit", "--base-model", BASE)
    assert result.returncode == 0 and "adapter_model" in result.stdout and "time_state" not in result.stdout


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    model = adapted(busy_model("rwkv7"))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "lora")
    result = wkv("publish", tmp_path / "lora", REPO, *PUSH, "--base-model", BASE)
    assert_refused(result, "adapter_model.safetensors", "NaN", "lora_B")


def test_peft_pushes_by_itself(hub, tmp_path):
    """`PeftModel.push_to_hub` sends the adapter and no code; `push_to_hub` of a model with adapters neither."""
    save_model(tmp_path / "base", "rwkv7")
    publish(tmp_path / "base", repo=BASE)
    model = adapted(AutoModelForCausalLM.from_pretrained(BASE))
    model.push_to_hub(REPO)
    assert not [name for name in hub.repos[REPO].files() if name.endswith(".py")]
    assert json.loads(hub.repos[REPO].files()["adapter_config.json"].data)["base_model_name_or_path"] == BASE
    assert_loads(model)
    own = AutoModelForCausalLM.from_pretrained(BASE)
    own.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM"))
    own.push_to_hub("somebody/own")
    assert not [name for name in hub.repos["somebody/own"].files() if name.endswith(".py")]
    byte_tokenizer().push_to_hub(REPO)
    assert "tokenization_rwkv.py" in hub.repos[REPO].files()
