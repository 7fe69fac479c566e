"""Adapters go where models go: trained on other classes they load on ours, merged they run in the `rwkv` package."""

import pytest
import rwkv7_hf
import torch
from conftest import assert_close
from folder_cases import FLA7_CONFIG, IDS, case, write_folder
from oracle.official import official_logits
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft_cases import adapted, train
from safetensors.torch import load_file
from test_foreign_fla import fused_mixes
from transformers import AutoModelForCausalLM
from transformers.models.rwkv.configuration_rwkv import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM

from wkv.checkpoints import convert


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def in_transformers_own_class(folder):
    """Three layers, so that it does not rescale its weights."""
    ours = AutoModelForCausalLM.from_pretrained(folder)
    fields = set(RwkvConfig().to_dict()) & ours.config.to_dict().keys() - {"architectures"}
    theirs = RwkvForCausalLM(RwkvConfig(**{name: getattr(ours.config, name) for name in fields}))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


@pytest.mark.parametrize(
    "version, theirs",
    [("4", in_transformers_own_class), ("7", rwkv7_hf.RWKV7ForCausalLM.from_pretrained)],
    ids=["transformers-rwkv", "rwkv7_hf"],
)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapters_of_other_classes(version, theirs, targets, tmp_path):
    _, folder, _ = case(version)
    foreign = theirs(folder)
    assert not type(foreign).__module__.startswith("wkv.")
    model = get_peft_model(foreign, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    train(model, IDS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert type(loaded.get_base_model()).__module__.startswith("wkv.")
    expected = logits_of(model)
    assert_close(logits_of(loaded), expected)
    own = AutoModelForCausalLM.from_pretrained(folder)
    report = own.load_adapter(tmp_path)
    assert not report.unexpected_keys and not report.missing_keys
    assert_close(logits_of(own), expected)


def official_names(official, folder):
    """The tensors of a `.pth` in a folder: other names, and low-rank pairs that are turned on loading."""
    return write_folder(folder, official, FLA7_CONFIG)


def fused(official, folder):
    weights = load_file(case("7")[1] / "model.safetensors")
    fused_mixes(weights)
    return write_folder(folder, weights, FLA7_CONFIG)


@pytest.mark.parametrize("write", [official_names, fused], ids=["official-names", "fla-fused"])
def test_adapters_of_models_in_other_layouts(write, tmp_path):
    """What turns and renames the tensors of the base model leaves the adapter's alone."""
    folder = write(case("7")[0], tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), target_modules="all-linear")
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits_of(auto_class.from_pretrained(tmp_path / "adapter")), expected)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_merged_adapters_in_the_official_package(version, tmp_path):
    """After training, decoding and merging: `wkv convert --to pth` and the `rwkv` package's logits."""
    _, folder, before = case(version)
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), target_modules="all-linear")
    train(model, IDS)
    model.generate(input_ids=IDS, max_new_tokens=3)
    expected = logits_of(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "merged.pth", to="pth", check=True)
    found, _ = official_logits(tmp_path / "merged.pth", IDS[0].tolist())
    assert_close(found, expected[0])
    assert (found - before[0]).abs().max() > 0.1
