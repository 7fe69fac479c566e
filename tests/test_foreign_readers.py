"""Our folders open in the programs of others: an RWKV-4 in transformers' own class, an RWKV-7 in rwkv7_hf's."""

import subprocess
import sys
from pathlib import Path

import pytest
import rwkv7_hf
import torch
import transformers
from checkpoint_cases import saved
from folder_cases import IDS, assert_loads, case
from oracle.official import official_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wkv.checkpoints import convert

NATIVE = """
import sys
sys.path.append(sys.argv[1])
import torch, transformers
ids = torch.load("ids.pt")
model, report = transformers.AutoModelForCausalLM.from_pretrained("folder", output_loading_info=True)
assert not any(report.values()), report
assert type(model).__module__.startswith("transformers.models.rwkv."), type(model)
with torch.no_grad():
    torch.save(torch.cat([model(row[None]).logits for row in ids]), "logits.pt")
assert not [name for name in sys.modules if name.startswith("wkv")]
"""


def test_our_rwkv4_opens_in_a_transformers_without_us(tmp_path):
    # Eight layers: the native class rescales after every six.
    saved(tmp_path / "model.pth", version="4", L=8, C=32, V=50)
    convert(tmp_path / "model.pth", tmp_path / "converted", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    model.save_pretrained(tmp_path / "folder")
    torch.save(IDS, tmp_path / "ids.pt")
    # Without the site's start-up files nothing of ours can be found.
    libraries = Path(transformers.__file__).parent.parent
    command = [sys.executable, "-S", "-c", NATIVE, str(libraries)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, model(IDS).logits.detach(), atol=1e-4, rtol=0)
    expected = torch.stack([official_logits(tmp_path / "model.pth", row.tolist())[0] for row in IDS])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("to", ["hf", "fla"])
def test_our_rwkv7_loads_in_rwkv7_hf_and_its_folder_in_ours(to, tmp_path):
    _, ours, expected = case("7")
    if to == "fla":
        convert(ours, tmp_path / "fla", to="fla", tokenizer=False)
        ours = tmp_path / "fla"
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(ours)
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/model.safetensors").keys() == load_file(ours / "model.safetensors").keys()
    assert_loads(tmp_path / "theirs", expected)
    convert(tmp_path / "theirs", tmp_path / "back.pth", to="pth", check=True)
